"""The training loop in process: reproducible, honest about failure, independent of what ran before."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from harness import checkpoint, results
from harness.config import Data, Trial
from harness.trial import Job, oldest_is_lowest, read_test, restore, train, training

NARROW = {"widths": [8, 16], "hidden": [16], "kernel_size": 3}


def config(**changes) -> Trial:
    values = {
        "architecture": "baseline",
        "options": NARROW,
        "epochs": 2,
        "batch_size": 16,
        "optimizer": {"name": "adam", "lr": 5e-3},
    }
    return Trial.model_validate(values | changes)


def run(digits: Data, folder=None, seed=0, **changes):
    rows = []
    job = Job(config(**changes), digits, seed=seed, folder=folder, labels={"id": "x"}, read_test=True)
    return train(job, rows.append), rows


def equal_part(record):
    """All but what depends on time or place."""
    return {key: value for key, value in record.items() if key not in ("timing", "environment")}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_bits(digits, tmp_path, precision):
    dropout = {"options": NARROW | {"dropout": 0.2}, "augmentation": {"flip": True, "crop_padding": 2}}
    one, _ = run(digits, tmp_path / "1", precision=precision, **dropout)
    other, _ = run(digits, tmp_path / "2", seed=1, precision=precision, **dropout)
    same, _ = run(digits, tmp_path / "3", precision=precision, **dropout)  # after another trial in this process
    assert equal_part(one) == equal_part(same)
    assert one["weights_sha256"] != other["weights_sha256"]
    assert checkpoint.sha256(tmp_path / "1" / results.WEIGHTS) == one["weights_sha256"]


def test_files_agree(digits, tmp_path):
    record, rows = run(digits, tmp_path)
    assert json.loads((tmp_path / "trial.json").read_text()) == record
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history.columns) == list(results.HISTORY_COLUMNS)
    assert len(history) == 4  # two epochs, two validations each
    assert len(rows) == 3  # the last is the record
    assert history["epoch"].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert record["metrics"]["val_accuracy"] == history["val_accuracy"].max()
    assert record["status"] == "finished"
    assert 0 < record["timing"]["train_seconds"] <= record["timing"]["wall_seconds"]


def test_it_learns(digits):
    record, _ = run(Data(name="digits"), epochs=3)
    assert record["metrics"]["val_accuracy"] > 0.8
    assert record["metrics"]["test_accuracy"] > 0.8


def test_kept_weights_are_those_of_the_best_validation(digits, tmp_path):
    record, _ = run(digits, tmp_path / "best", epochs=4, optimizer={"name": "adam", "lr": 3e-2})
    last, _ = run(digits, tmp_path / "last", epochs=4, optimizer={"name": "adam", "lr": 3e-2}, keep="last")
    history = pd.read_csv(tmp_path / "best" / "history.csv")
    best = history.loc[history["val_accuracy"].idxmax()]
    assert record["kept_epoch"] == best["epoch"]
    assert record["metrics"]["val_loss"] == best["val_loss"]
    assert last["metrics"]["val_loss"] == history["val_loss"].iloc[-1]
    assert last["kept_epoch"] == 4


def test_early_stop_is_the_reports():
    def stops(*losses):
        return oldest_is_lowest([{"val_loss": loss} for loss in losses], 4)

    assert not stops(1.0, 2.0, 3.0)
    assert stops(1.0, 2.0, 3.0, 4.0)
    assert stops(9.0, 1.0, 2.0, 1.5, 1.2)
    assert not stops(1.0, 2.0, 3.0, 0.9)


def test_early_stop_ends_the_trial_as_finished(digits):
    frozen = {"name": "sgd", "lr": 1e-12}
    record, _ = run(digits, epochs=10, early_stop=4, optimizer=frozen, precision="float32")
    assert record["status"] == "finished"
    assert record["metrics"]["epochs"] == 2.0


def test_test_set_is_not_read_unless_asked(digits, tmp_path):
    record = train(Job(config(), digits, folder=tmp_path))
    assert not any(name.startswith("test") for name in record["metrics"])
    later = read_test(tmp_path, record, digits)
    asked, _ = run(digits)
    assert later["metrics"]["test_accuracy"] == asked["metrics"]["test_accuracy"]
    assert json.loads((tmp_path / "trial.json").read_text()) == later


def test_divergence_is_a_status(digits, tmp_path):
    record, rows = run(digits, tmp_path, optimizer={"name": "sgd", "lr": 1e20}, epochs=5)
    assert record["status"] == "diverged"
    assert "loss" in record["error"]
    assert len(rows) <= 1
    assert not (tmp_path / results.WEIGHTS).exists()


def test_failure_keeps_its_traceback(digits, tmp_path):
    (tmp_path / "net.py").write_text("def build(num_classes):\n    raise KeyError('no such layer')\n")
    record, _ = run(digits, tmp_path / "trial", architecture=str(tmp_path / "net.py"), options={})
    assert record["status"] == "failed"
    assert "no such layer" in record["error"]
    assert "Traceback" in (tmp_path / "trial" / "error.txt").read_text()


def test_out_of_memory_is_a_status(digits, tmp_path):
    (tmp_path / "net.py").write_text("def build(num_classes):\n    raise MemoryError('too large')\n")
    record, _ = run(digits, tmp_path / "trial", architecture=str(tmp_path / "net.py"), options={})
    assert record["status"] == "oom"


def test_closing_the_loop_records_nothing(digits, tmp_path):
    loop = training(Job(config(), digits, folder=tmp_path))
    next(loop)
    loop.close()
    assert not (tmp_path / "trial.json").exists()
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


def test_torn_weights_are_refused(digits, tmp_path):
    record, _ = run(digits, tmp_path)
    assert not restore(tmp_path, record, 10, 32).training
    content = (tmp_path / results.WEIGHTS).read_bytes()
    for torn in (content[:-100], content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]):
        (tmp_path / results.WEIGHTS).write_bytes(torn)
        with pytest.raises(ValueError, match="torn or replaced"):
            restore(tmp_path, record, 10, 32)


def test_job_survives_json(digits, tmp_path):
    job = Job(config(), digits, seed=3, folder=tmp_path, labels={"id": "x"})
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "final"])
def test_compiled_learns_like_eager(digits, name):
    changes = {"architecture": name, "options": {} if name == "final" else NARROW, "precision": "float32", "epochs": 1}
    eager, _ = run(digits, compile="off", **changes)
    compiled, _ = run(digits, compile="default", **changes)
    assert compiled["status"] == "finished"
    assert compiled["environment"]["compile"] == "default"
    assert compiled["metrics"]["train_loss"] == pytest.approx(eager["metrics"]["train_loss"], rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["off", "default"])
def test_on_a_gpu(digits, tmp_path, precision, mode):
    record, _ = run(digits, tmp_path, precision=precision, compile=mode, epochs=3)
    assert record["status"] == "finished"
    assert record["environment"]["device"] == "cuda"
    assert record["environment"]["compile"] == mode
    assert record["metrics"]["train_loss"] < 2.3
    assert all(t.isfinite().all() for t in load_file(tmp_path / results.WEIGHTS).values())
