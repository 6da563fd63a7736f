"""Networks as people write them that cannot be trained, and what the network check says of each."""

import textwrap

HEAD = """
import torch
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(512, classes)
"""
TAIL = """
def build(num_classes):
    return Net(num_classes)
"""
PLAIN = "return self.head(F.relu(self.norm(self.conv(x))).flatten(1))"


def forward(*lines):
    return HEAD + "    def forward(self, x):\n" + textwrap.indent("\n".join(lines), " " * 8) + TAIL


BODY = "h = F.relu(self.norm(self.conv(x))).flatten(1)"


def with_norm(norm):
    return HEAD + f"        self.norm = {norm}\n    def forward(self, x):\n        {PLAIN}\n" + TAIL


REFUSED = {
    "BatchNorm without running statistics": (with_norm("nn.BatchNorm2d(8, track_running_stats=False)"), "other images"),
    "statistics over the batch": (forward(BODY, "return self.head(h - h.mean(0))"), "other images of its batch"),
    "softmax over the batch": (forward(BODY, "return F.log_softmax(self.head(h), 0)"), "other images of its batch"),
    "a mean over the batch": (forward(BODY, "return self.head(h + h.mean())"), "other images of its batch"),
    "dropout that is always on": (forward(BODY, "return self.head(F.dropout(h, 0.5))"), "differ from call to call"),
    "noise that is always on": (forward(BODY, "return self.head(h + torch.randn_like(h))"), "differ from call to call"),
    "1,000 logits": (HEAD.replace("512, classes", "512, 1000") + "    def forward(self, x):\n        " + PLAIN + TAIL,
                     "returns [4, 1000], not logits [4, 10]"),
    "one logit too many": (HEAD.replace("512, classes", "512, classes + 1") + "    def forward(self, x):\n        "
                           + PLAIN + TAIL, "returns [4, 11], not logits [4, 10]"),
    "logits of one dimension": (forward(BODY, "return self.head(h).mean(1)"), "returns [4], not logits"),
    "logits as a map": (forward(BODY, "return self.head(h)[:, :, None, None]"), "returns [4, 10, 1, 1], not logits"),
    "a tuple": (forward(BODY, "return self.head(h), h"), "returns a tuple, not logits"),
    "a tuple in training alone": (forward(BODY, "return (self.head(h), h) if self.training else self.head(h)"),
                                  "in training it returns a tuple"),
    "a dict": (forward(BODY, "return {'logits': self.head(h)}"), "returns a dict, not logits"),
    "classes, not logits": (forward(BODY, "return self.head(h) > 0"), "returns torch.bool"),
    "a sparse gradient": (
        HEAD + "        self.of = nn.Embedding(256, 512, sparse=True)\n    def forward(self, x):\n"
        "        return self.head(self.of((x[:, 0, 0, 0] > 0).long()))\n" + TAIL,
        "of.weight gets a sparse gradient, which the optimisers refuse",
    ),
    "not finite": (forward(BODY, "return self.head(h) / 0"), "returns logits that are not finite"),
    "no gradient": (forward(BODY, "return self.head(h).detach() + 0 * h.detach().sum()"), "training step"),
    "another input size": (HEAD.replace("512, classes", "999, classes") + "    def forward(self, x):\n        " + PLAIN
                           + TAIL, "fails in evaluation on images [4, 3, 32, 32]"),
    "kernel larger than the image": (
        HEAD.replace("3, 8, 3, padding=1, stride=4", "3, 8, 99") + "    def forward(self, x):\n        " + PLAIN + TAIL,
        "fails in evaluation",
    ),
    "no module": ("def build(num_classes):\n    return lambda x: x", "build() returns a function; return a torch.nn"),
    "nothing": ("def build(num_classes):\n    pass", "build() returns a NoneType"),
    "no weights": ("from torch import nn\ndef build(num_classes):\n    return nn.Flatten()", "has no weights to train"),
    "all weights frozen": (
        "from torch import nn\ndef build(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3072, "
        "num_classes)).requires_grad_(False)",
        "has no weights to train",
    ),
    "sys.exit in build": ("import sys\ndef build(num_classes):\n    sys.exit(0)", "SystemExit(0)"),
    "sys.exit in the file": ("import sys\nsys.exit(0)", "cannot be loaded: SystemExit"),
    "an exception in build": ("def build(num_classes):\n    return {}['x']", "KeyError('x')"),
    "a random tensor that is not saved": (
        HEAD + "        self.register_buffer('mix', torch.randn(512, 512), persistent=False)\n"
        "    def forward(self, x):\n"
        "        return self.head(F.relu(self.norm(self.conv(x))).flatten(1) @ self.mix)\n" + TAIL,
        "a new network with the same weights answers otherwise",
    ),
    "a random order": (
        HEAD + "        self.order = torch.randperm(512)\n    def forward(self, x):\n"
        "        return self.head(F.relu(self.norm(self.conv(x))).flatten(1)[:, self.order])\n" + TAIL,
        "a new network with the same weights answers otherwise",
    ),
    "a random number": (
        HEAD.replace("import torch\n", "import random, torch\n", 1) + "        self.scale = random.random()\n"
        "    def forward(self, x):\n        return self.head(self.scale * F.relu(self.conv(x)).flatten(1)) * 9\n"
        + TAIL,
        "a new network with the same weights answers otherwise",
    ),
    "statistics that are not saved": (
        HEAD + "        self.register_buffer('mean', torch.zeros(512), persistent=False)\n"
        "    def forward(self, x):\n        h = F.relu(self.norm(self.conv(x))).flatten(1)\n"
        "        if self.training:\n            self.mean += 0.1 * (h.mean(0).detach() - self.mean)\n"
        "        return self.head(h - self.mean)\n" + TAIL,
        "training changes something that is not saved",
    ),
    "a count of steps": (
        HEAD + "        self.steps = 0\n    def forward(self, x):\n        self.steps += self.training\n"
        "        return self.head(F.relu(self.norm(self.conv(x))).flatten(1)) * min(1, self.steps / 10)\n" + TAIL,
        "training changes something that is not saved",
    ),
    "an average of weights beside them": (
        HEAD + "        self.average = self.head.weight.detach().clone()\n    def forward(self, x):\n"
        "        h = F.relu(self.norm(self.conv(x))).flatten(1)\n        if self.training:\n"
        "            self.average = self.average * 0.9 + 1\n            return self.head(h)\n"
        "        return F.linear(h, self.average)\n" + TAIL,
        "answers otherwise",
    ),
    "statistics of the batch before a layer of zeros": (
        HEAD + "        nn.init.zeros_(self.head.weight)\n        nn.init.zeros_(self.head.bias)\n"
        "    def forward(self, x):\n        h = F.relu(self.norm(self.conv(x))).flatten(1)\n"
        "        return self.head((h - h.mean(0)) / (h.std(0, unbiased=False) + 1e-3))\n" + TAIL,
        "other images of its batch",
    ),
    "no running statistics before a layer of zeros": (
        with_norm("nn.BatchNorm2d(8, track_running_stats=False)\n        nn.init.zeros_(self.head.weight)"),
        "other images of its batch",
    ),
    "dropout that is always on before a layer of zeros": (
        HEAD + "        nn.init.zeros_(self.head.weight)\n    def forward(self, x):\n"
        "        return self.head(F.dropout(F.relu(self.norm(self.conv(x))).flatten(1), 0.5))\n" + TAIL,
        "differ from call to call",
    ),
    "small logits less their mean": (
        forward(BODY, "y = self.head(h) * 1e-4", "return y - y.mean(0)"), "other images of its batch"),
    "weights on the meta device": (
        "import torch\nfrom torch import nn\ndef build(num_classes):\n    with torch.device('meta'):\n"
        "        return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))", "Meta"),
    "TorchScript": (
        "import torch, warnings\nfrom torch import nn\nwarnings.simplefilter('ignore')\ndef build(num_classes):\n"
        "    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes)))", "TorchScript module"),
    "sys.exit in train()": (
        HEAD + "    def train(self, mode=True):\n        raise SystemExit(0)\n    def forward(self, x):\n        "
        + PLAIN + TAIL, "SystemExit"),
    "an exception without text": (
        HEAD + "    def forward(self, x):\n        class E(Exception):\n            def __str__(self):\n"
        "                raise ValueError\n        raise E\n" + TAIL, "E: no message"),
    "a module that contains itself": (
        HEAD + "        self.__dict__['_modules']['me'] = self\n    def forward(self, x):\n        " + PLAIN + TAIL,
        "RecursionError"),
    "build is no function": ("build = 3", "TypeError: 3 is not a callable"),
    "lazy layers": (
        "from torch import nn\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))",
        "has lazy layers",
    ),
    "weights of another shape each time": (
        "import random\nfrom torch import nn\ndef build(num_classes):\n    width = random.randint(2, 10**6 // 4000)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, width), nn.Linear(width, num_classes))",
        "cannot be restored into a new network",
    ),
}  # fmt: skip
