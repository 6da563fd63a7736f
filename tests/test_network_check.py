"""Networks as people write them: before training each is refused with the reason, or trained in a way that is told."""

import pytest
import torch
from refused_networks import BODY, HEAD, PLAIN, REFUSED, TAIL, forward, with_norm

from harness.config import BadInput, Data, Trial
from harness.data.dataset import load_dataset
from harness.run import checkpoints
from harness.training.job import TrainingJob
from harness.training.loop import train_job
from harness.training.network import build_network, load_tensors, own_tensors, restore_network, summarize_network
from harness.training.network_check import check_network


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
