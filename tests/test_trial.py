"""The training loop in process: reproducible, honest about failure, independent of what ran before."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from harness.config import Data, Trial
from harness.run import checkpoints, storage
from harness.run.records import HISTORY_COLUMNS, TRIAL_FILE, WEIGHTS_FILE, Resumption, read_correct, read_trial
from harness.training.evaluation import read_test
from harness.training.job import TrainingJob
from harness.training.loop import oldest_is_lowest, train_job, training_loop
from harness.training.network import restore_network

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
    job = TrainingJob(config(**changes), digits, seed=seed, folder=folder, labels={"id": "x"}, read_test=True)
    return train_job(job, rows.append), rows


def equal_part(record):
    """All but what depends on time or place."""
    return record.model_dump(exclude={"timing", "environment", "history_sha256"})  # the history has seconds


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_same_seed_same_bits(digits, tmp_path, precision):
    dropout = {"options": NARROW | {"dropout": 0.2}, "augmentation": {"flip": True, "crop_padding": 2}}
    one, _ = run(digits, tmp_path / "1", precision=precision, **dropout)
    other, _ = run(digits, tmp_path / "2", seed=1, precision=precision, **dropout)
    same, _ = run(digits, tmp_path / "3", precision=precision, **dropout)  # after another trial in this process
    assert equal_part(one) == equal_part(same)
    assert one.weights_sha256 != other.weights_sha256
    assert storage.sha256(tmp_path / "1" / WEIGHTS_FILE) == one.weights_sha256


SGD = {"name": "sgd", "lr": 5e-2, "momentum": 0.9}


def interrupted(digits, folder, rows, **changes):
    """A trial of three epochs whose process goes away after so many validations."""
    loop = training_loop(TrainingJob(config(epochs=3, checkpoint_seconds=0, **changes), digits, folder=folder))
    for _ in range(rows):
        next(loop)
    loop.close()
    assert not (folder / TRIAL_FILE).exists()


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (1, {}),  # before the first epoch's end
        (2, {"optimizer": SGD, "options": NARROW | {"dropout": 0.2}, "schedule": {"name": "linear"}}),
        (3, {"augmentation": {"flip": True, "crop_padding": 2}, "keep": "last", "compile": "kernels"}),
        (5, {"architecture": "final", "options": {"widths": [[8, 8]], "hidden": [8]}, "precision": "bfloat16"}),
    ],
)
def test_continued_equals_uninterrupted(digits, tmp_path, rows, changes):
    whole, told = run(digits, tmp_path / "whole", epochs=3, checkpoint_seconds=0, **changes)
    interrupted(digits, tmp_path / "cut", rows, **changes)
    again, told_again = run(digits, tmp_path / "cut", epochs=3, checkpoint_seconds=0, **changes)
    continued, again.continued = again.continued, []
    assert [c.epoch for c in continued] == ([rows // 2] if rows > 1 else [])
    assert equal_part(again) == equal_part(whole)
    histories = [pd.read_csv(tmp_path / name / "history.csv").drop(columns="seconds") for name in ("whole", "cut")]
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    assert [row["step"] for row in told_again] == [row["step"] for row in told]
    assert pd.read_csv(tmp_path / "cut" / "history.csv")["seconds"].is_monotonic_increasing
    assert not checkpoints.checkpoint_files(tmp_path / "cut")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["captured", "captured-eager"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_continued_with_a_captured_step(digits, tmp_path, precision, mode):
    """The graph is captured anew, and the optimiser's state is the checkpoint's."""
    changes = {"compile": mode, "precision": precision}
    whole, _ = run(digits, tmp_path / "whole", epochs=3, checkpoint_seconds=0, **changes)
    interrupted(digits, tmp_path / "cut", 5, **changes)
    again, _ = run(digits, tmp_path / "cut", epochs=3, checkpoint_seconds=0, **changes)
    assert again.continued == [Resumption(epoch=2, torn=[])]
    assert again.metrics.train_loss == pytest.approx(whole.metrics.train_loss, rel=1e-2)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("tear", [cut_short, flip_a_bit])
@pytest.mark.parametrize("torn", [1, 2])
def test_a_torn_checkpoint_gives_way_to_the_one_before(digits, tmp_path, tear, torn):
    whole, _ = run(digits, tmp_path / "whole", epochs=3, checkpoint_seconds=0)
    interrupted(digits, tmp_path / "cut", 5)
    there = checkpoints.checkpoint_files(tmp_path / "cut")
    assert [path.name[:19] for path in there] == ["checkpoint-00000002", "checkpoint-00000001"]
    for path in there[:torn]:
        tear(path)
    again, _ = run(digits, tmp_path / "cut", epochs=3, checkpoint_seconds=0)
    continued, again.continued = again.continued, []
    assert continued == [Resumption(epoch=2 - torn, torn=[path.name for path in there[:torn]])]
    assert equal_part(again) == equal_part(whole)


def test_a_checkpoint_of_something_else_is_not_continued(digits, tmp_path):
    """Another seed in the same folder; and without checkpoints there are none."""
    interrupted(digits, tmp_path / "cut", 3)
    other, _ = run(digits, tmp_path / "cut", seed=1, epochs=3, checkpoint_seconds=0)
    assert "continued" not in other
    loop = training_loop(TrainingJob(config(checkpoint_seconds=None), digits, folder=tmp_path / "none"))
    assert len(list(loop)) == 3
    assert not any(tmp_path.glob("none/checkpoint-*"))


def test_files_agree(digits, tmp_path):
    record, rows = run(digits, tmp_path)
    assert read_trial(tmp_path) == record
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history.columns) == list(HISTORY_COLUMNS)
    assert len(history) == 4  # two epochs, two validations each
    assert len(rows) == 3  # the last is the record
    assert history["epoch"].tolist() == [0.5, 1.0, 1.5, 2.0]
    assert record.metrics.val_accuracy == history["val_accuracy"].max()
    assert record.status == "finished"
    assert 0 < record.timing.train_seconds <= record.timing.wall_seconds


def test_it_learns(digits):
    record, _ = run(Data(name="digits"), epochs=3)
    assert record.metrics.val_accuracy > 0.8
    assert record.metrics.test_accuracy > 0.8


def test_kept_weights_are_those_of_the_best_validation(digits, tmp_path):
    record, _ = run(digits, tmp_path / "best", epochs=4, optimizer={"name": "adam", "lr": 3e-2})
    last, _ = run(digits, tmp_path / "last", epochs=4, optimizer={"name": "adam", "lr": 3e-2}, keep="last")
    history = pd.read_csv(tmp_path / "best" / "history.csv")
    best = history.loc[history["val_accuracy"].idxmax()]
    assert record.kept_epoch == best["epoch"]
    assert record.metrics.val_loss == best["val_loss"]
    assert last.metrics.val_loss == history["val_loss"].iloc[-1]
    assert last.kept_epoch == 4


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
    assert record.status == "finished"
    assert record.metrics.epochs == 2.0


def test_test_set_is_not_read_unless_asked(digits, tmp_path):
    record = train_job(TrainingJob(config(), digits, folder=tmp_path))
    assert record.metrics.test_accuracy is None
    later = read_test(tmp_path, record, digits)
    asked, _ = run(digits)
    assert later.metrics.test_accuracy == asked.metrics.test_accuracy
    assert read_correct(tmp_path, later, 20).mean() == pytest.approx(later.metrics.test_accuracy)
    assert read_trial(tmp_path) == later


def test_divergence_is_a_status(digits, tmp_path):
    record, rows = run(digits, tmp_path, optimizer={"name": "sgd", "lr": 1e20}, epochs=5)
    assert record.status == "diverged"
    assert "loss" in record.error
    assert len(rows) <= 1
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_failure_keeps_its_traceback(digits, tmp_path):
    (tmp_path / "net.py").write_text("def build(num_classes):\n    raise KeyError('no such layer')\n")
    record, _ = run(digits, tmp_path / "trial", architecture=str(tmp_path / "net.py"), options={})
    assert record.status == "failed"
    assert "no such layer" in record.error
    assert "Traceback" in (tmp_path / "trial" / "error.txt").read_text()


def test_out_of_memory_is_a_status(digits, tmp_path):
    (tmp_path / "net.py").write_text("def build(num_classes):\n    raise MemoryError('too large')\n")
    record, _ = run(digits, tmp_path / "trial", architecture=str(tmp_path / "net.py"), options={})
    assert record.status == "oom"


def test_closing_the_loop_records_nothing(digits, tmp_path):
    loop = training_loop(TrainingJob(config(), digits, folder=tmp_path))
    next(loop)
    loop.close()
    assert not (tmp_path / "trial.json").exists()
    assert len(pd.read_csv(tmp_path / "history.csv")) == 1


def test_torn_weights_are_refused(digits, tmp_path):
    record, _ = run(digits, tmp_path)
    assert not restore_network(tmp_path, record.trial, record.weights_sha256, 10, 32).training
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    for torn in (content[:-100], content[:2000] + bytes([content[2000] ^ 1]) + content[2001:]):
        (tmp_path / WEIGHTS_FILE).write_bytes(torn)
        with pytest.raises(ValueError, match="corrupt or replaced"):
            restore_network(tmp_path, record.trial, record.weights_sha256, 10, 32)


def test_job_survives_json(digits, tmp_path):
    job = TrainingJob(config(), digits, seed=3, folder=tmp_path, labels={"id": "x"})
    assert TrainingJob.from_json(json.loads(json.dumps(job.to_json()))) == job


def test_atomic_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    storage.write_atomically(path, "old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"no space left on device, .* bytes free"):
        storage.write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "final"])
def test_compiled_learns_like_eager(digits, name):
    changes = {"architecture": name, "options": {} if name == "final" else NARROW, "precision": "float32", "epochs": 1}
    eager, _ = run(digits, compile="off", **changes)
    compiled, _ = run(digits, compile="default", **changes)
    assert compiled.status == "finished"
    assert compiled.environment.compile == "default"
    assert compiled.metrics.train_loss == pytest.approx(eager.metrics.train_loss, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", ["off", "captured-eager", "default"])
def test_on_a_gpu(digits, tmp_path, precision, mode):
    record, _ = run(digits, tmp_path, precision=precision, compile=mode, epochs=3)
    assert record.status == "finished"
    assert record.environment.device == "cuda"
    assert record.environment.compile == mode
    assert record.metrics.train_loss < 2.3
    described = record.environment.gpu
    assert described["name"] == torch.cuda.get_device_name()
    assert described.get("driver") or described.get("nvml")
    peak = record.environment.peak_allocated_bytes
    assert 1e6 < peak <= record.environment.peak_reserved_bytes < described["memory_bytes"]
    assert all(t.isfinite().all() for t in load_file(tmp_path / WEIGHTS_FILE).values())
