"""Networks as people write them: before training each is refused with the reason, or trained in a way that is told."""

import textwrap

import pytest
import torch

from harness.config import BadInput, Data, Trial
from harness.data.dataset import load_dataset
from harness.run import checkpoints
from harness.training.job import TrainingJob
from harness.training.loop import train_job
from harness.training.network import build_network, load_tensors, own_tensors, restore_network, summarize_network
from harness.training.network_check import check_network

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


@pytest.fixture(scope="module")
def data():
    return load_dataset(Data(name="digits", limit=20))


def trial(tmp_path, text, **values) -> Trial:
    (tmp_path / "net.py").write_text(text)
    return Trial(architecture=str(tmp_path / "net.py"), epochs=1, batch_size=16, **values)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_trained_is_refused(kind, tmp_path, data):
    text, said = REFUSED[kind]
    with pytest.raises(BadInput) as refused:
        check_network(trial(tmp_path, text), data)
    message = str(refused.value)
    assert said in message
    assert "trial.architecture=" in message
    assert "\n" not in message


TIED = (
    HEAD
    + """
        self.a = nn.Linear(512, 512)
        self.b = nn.Linear(512, 512)
        self.b.weight = self.a.weight
    def forward(self, x):
        h = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.head(self.b(F.relu(self.a(h))))
"""
    + TAIL
)
COMPLEX = (
    HEAD
    + """
        self.rotation = nn.Parameter(torch.randn(512, dtype=torch.complex64))
    def forward(self, x):
        h = F.relu(self.norm(self.conv(x))).flatten(1)
        return self.head((h * self.rotation).real)
"""
    + TAIL
)
LSTM = (
    HEAD
    + """
        self.rows = nn.LSTM(96, 64, batch_first=True)
        self.last = nn.Linear(64, classes)
    def forward(self, x):
        found, _ = self.rows(x.permute(0, 2, 3, 1).flatten(2))
        return self.last(found[:, -1])
"""
    + TAIL
)
MANY = ["h = F.relu(self.norm(self.conv(x)))"]
TRAINED = {
    "plain": (forward(PLAIN), ""),
    "view of a batch": (forward(*MANY, "return self.head(h.view(h.size(0), -1))"), "channels_last memory format"),
    "view of 512": (forward(*MANY, "return self.head(h.view(h.size(0), 512))"), "channels_last memory format"),
    "view_as_complex": (
        forward(*MANY, "h = torch.view_as_complex(h.view(h.size(0), 8, 8, 4, 2)).real", "return self.head("
                "F.pad(h.flatten(1), (0, 256)))"),
        "channels_last memory format",
    ),
    "tied weights": (TIED, ""),
    "complex parameters": (COMPLEX, "its optimiser is not fused"),
    "LSTM over rows": (LSTM, "parameters get no gradient, such as conv.weight"),
    "softmax in float32": (forward(BODY, "return F.softmax(self.head(h), 1, dtype=torch.float32)"),
                           "answers with probabilities, not logits"),
    "softmax layer": (HEAD + "        self.soft = nn.Softmax(1)\n    def forward(self, x):\n        "
                      + PLAIN.replace("return ", "return self.soft(") + ")" + TAIL, "leave out the softmax"),
    "a seed of its own": (HEAD.replace("super().__init__()", "super().__init__()\n        torch.manual_seed(3)")
                          + "    def forward(self, x):\n        " + PLAIN + TAIL, "same weights whatever the seed"),
    "log softmax": (forward(BODY, "return F.log_softmax(self.head(h), 1)"), ""),
    "float inside": (forward("x = x.float()", *MANY, "return self.head(h.flatten(1))"), "cannot compute in float64"),
    "float32 constant inside": (
        forward(BODY, "return self.head(h) @ torch.eye(self.head.out_features)"), "cannot compute in float64"
    ),
    "slow batch norm": (with_norm("nn.BatchNorm2d(8, momentum=0.01)"), "keeps 8"),
    "changes its input": (forward("x.mul_(2).sub_(1)", PLAIN), ""),
    "weight norm": (HEAD + "        self.head = nn.utils.parametrizations.weight_norm(self.head)\n"
                    "    def forward(self, x):\n"
                    f"        {PLAIN}\n" + TAIL, ""),
    "tensors kept by build": ("import functools, torch\n@functools.cache\ndef kept():\n    return torch.ones(512)\n"
                              + forward(BODY, "return self.head(h * kept())"), ""),
    "a layer without use": (HEAD + f"        self.unused = nn.Linear(2, 2)\n    def forward(self, x):\n        {PLAIN}"
                            + TAIL, "2 parameters get no gradient, such as unused.weight"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_different_is_told_and_trains_to_the_end(kind, tmp_path, data):
    """With checkpoints, a read of the test split, and weights that a new network takes."""
    text, said = TRAINED[kind]
    config = trial(tmp_path, text, checkpoint_seconds=0).model_copy(update={"epochs": 2})
    notes = "\n".join(check_network(config, data))
    assert (said in notes) if said else not notes
    job = TrainingJob(config, Data(name="digits", limit=20), folder=tmp_path / "trial", read_test=True)
    record = train_job(job)
    assert record.status == "finished", record.error
    assert record.environment.memory_format == ("contiguous" if "channels_last" in said else "channels_last")
    network = restore_network(tmp_path / "trial", config, record.weights_sha256, 10, 32)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_tied_weights_are_saved_once(tmp_path):
    config = trial(tmp_path, TIED)
    network = build_network(config, 10, 32)
    own = own_tensors(network)
    assert "a.weight" in own
    assert "b.weight" not in own
    sha256 = checkpoints.save_weights(tmp_path / "model.safetensors", own)
    other = build_network(config, 10, 32)
    load_tensors(other, checkpoints.load_weights(tmp_path / "model.safetensors", sha256))
    assert torch.equal(other.b.weight, network.a.weight)
    assert other.b.weight is other.a.weight


def test_statistics_of_a_network_never_fail(tmp_path):
    found = summarize_network(build_network(trial(tmp_path, LSTM), 10, 32), 32)
    assert {layer.kind for layer in found.layers} >= {"LSTM", "Linear"}


@pytest.mark.parametrize("architecture", ["googlenet", "inception_v3"])
def test_auxiliary_outputs_are_refused(architecture, tmp_path, data):
    text = f"""
import torchvision
def build(num_classes):
    return torchvision.models.{architecture}(weights=None, num_classes=num_classes, init_weights=False)
"""
    with pytest.raises(BadInput, match=r"returns a (GoogLeNet|Inception)Outputs|fails in evaluation"):
        check_network(trial(tmp_path, text), data)


@pytest.mark.parametrize("when", ["self.training", "not self.training", "True"])
def test_a_network_that_hangs_is_refused(when, tmp_path, data, monkeypatch):
    from harness.training import network_check

    monkeypatch.setattr(network_check, "SECONDS", 0.5)
    text = forward("import time", f"time.sleep(100 if {when} else 0)", PLAIN)
    with pytest.raises(BadInput, match=r"take the network more than 0\.5 s: it hangs"):
        check_network(trial(tmp_path, text), data)
