"""Training on what a frozen part answers is the same training, and costs the rest alone."""

import os

import pytest
import torch

from harness.config import Augmentation, Data, Trial
from harness.data.batches import DeviceSplit
from harness.training import features
from harness.training.evaluation import evaluate_test
from harness.training.execution import ExecutionPlan
from harness.training.features import are_cached, cached_features
from harness.training.job import TrainingJob
from harness.training.loop import train_job
from harness.training.network import build_network

FROZEN = ("conv1", "bn1", "layer1", "layer2", "layer3")


def trial(**changes) -> Trial:
    values = {
        "architecture": "transfer",
        "options": {"resize": 64},
        "epochs": 2,
        "batch_size": 16,
        "optimizer": {"name": "adam", "lr": 1e-3},
    }
    return Trial.model_validate(values | changes)


@pytest.fixture
def own_features(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def result(config: Trial, digits: Data, folder=None):
    record = train_job(TrainingJob(config, digits, folder=folder, read_test=True))
    assert record.status == "finished", record.error
    return record.metrics, record.weights_sha256


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile_mode", ["off", "kernels"])
def test_the_same_training(digits, own_features, tmp_path, precision, compile_mode):
    changes = {"precision": precision, "compile": compile_mode}
    plain = result(trial(cache_features=False, **changes), digits, tmp_path / "plain")
    assert not own_features.exists()
    first = result(trial(**changes), digits, tmp_path / "first")
    files = {file: file.stat().st_ino for file in own_features.glob("*.pt")}
    assert len(files) == 3  # training, validation, test
    later = result(trial(**changes), digits, tmp_path / "later")
    assert {file: file.stat().st_ino for file in own_features.glob("*.pt")} == files
    assert plain == first == later


def test_other_frozen_weights_have_other_features(digits, own_features):
    """From another seed the frozen part is another one."""
    config = trial(options={"resize": 0}, epochs=1)
    for seed in (0, 1):
        train_job(TrainingJob(config, digits, seed=seed))
    assert len(list(own_features.glob("*.pt"))) == 4
    train_job(
        TrainingJob(config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"lr": 1e-2})}), digits)
    )
    assert len(list(own_features.glob("*.pt"))) == 4


def test_what_is_trained_does_not_change_the_features(digits, own_features):
    """Test images' too, which are read with the trained weights."""
    for rate in (1e-3, 1e-2):
        train_job(
            TrainingJob(
                trial(options={"resize": 0}, epochs=1, optimizer={"name": "adam", "lr": rate}), digits, read_test=True
            )
        )
    assert len(list(own_features.glob("*.pt"))) == 3


@pytest.mark.parametrize(
    ("frozen", "prefix"),
    [
        (FROZEN, ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")),
        (("layer2", "layer3"), ()),  # what comes before is trained
        (("conv1", "layer1"), ("conv1",)),
        ((), ()),
    ],
)
def test_the_frozen_prefix(frozen, prefix):
    network = build_network(trial(options={"resize": 0, "frozen": list(frozen)}), 10, 32)
    assert network.frozen_prefix == tuple(f"network.{name}" for name in prefix)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        network.eval()
        assert torch.equal(network(images), network.network(images))


def test_where_nothing_is_cached():
    network = build_network(trial(options={"resize": 0}), 10, 32)

    def cached(network, **changes):
        config = trial(**{"compile": "off"} | changes)
        return are_cached(network, config, ExecutionPlan.of(config, torch.device("cpu")))

    assert cached(network)
    assert not cached(network, cache_features=False)
    assert not cached(network, augmentation=Augmentation(flip=True))
    assert not cached(network, compile="default")  # rounds elsewhere
    assert not cached(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("fault", ["cut short", "of another network", "no tensor"])
def test_features_that_are_wrong_are_computed_anew(tmp_path, fault):
    images = torch.randint(0, 256, (10, 4, 4, 3), dtype=torch.uint8)
    part = DeviceSplit(images, torch.zeros(10), torch.arange(10))
    file = tmp_path / "features.pt"

    def answer(batch):
        return batch.float() * 2

    right = cached_features(file, part, 4, answer).clone()
    assert torch.equal(right, images.float() * 2)
    if fault == "cut short":
        file.write_bytes(file.read_bytes()[:500])
    elif fault == "of another network":
        torch.save(right + 1, file)
    else:
        file.write_text("text")
    assert torch.equal(cached_features(file, part, 4, answer), right)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["features.lock", "features.pt"]


def test_a_disk_that_takes_none_costs_no_result(tmp_path, monkeypatch):
    """The test set is read after the last checkpoint."""
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)
    part = DeviceSplit(images, torch.arange(6), torch.arange(6))
    network = build_network(trial(options={"resize": 0}), 10, 32)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    found = [
        evaluate_test(network, trial(options={"resize": 0}, cache_features=cached), torch.device("cpu"), part, "images")
        for cached in (False, True)
    ]
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_there_is_room_for_so_many(tmp_path, monkeypatch):
    part = DeviceSplit(torch.zeros(8, 4, 4, 3, dtype=torch.uint8), torch.zeros(8), torch.arange(8))
    monkeypatch.setattr(features, "KEPT_BYTES", 10_000)  # each takes some 3 KB
    for number in range(5):
        file = tmp_path / f"{number}.pt"
        cached_features(file, part, 4, lambda batch: batch.float())
        os.utime(file, (number, number))
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["2.pt", "3.pt", "4.pt"]


@pytest.mark.slow
def test_later_trials_are_faster(own_features):
    """Where the head alone is trained, hardly more than its own work is left of steps and validations."""
    options = {"resize": 112, "frozen": [*FROZEN, "layer4"]}
    data, config = Data(name="digits", limit=40), trial(options=options, batch_size=32, compile="off")
    seconds = {}
    for name, changes in (("first", {}), ("later", {}), ("plain", {"cache_features": False})):
        timing = train_job(TrainingJob(config.model_copy(update=changes), data)).timing
        seconds[name] = timing.train_seconds + timing.validate_seconds
    assert seconds["later"] < seconds["plain"] / 3
