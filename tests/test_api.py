"""`from harness import ...`: what docs/python.md shows, and that importing it is light."""

import re
import shutil
import sys

import numpy as np
import pytest
from conftest import TOP, command

from harness.run.directory import RunDirectory

PAGE = (TOP / "docs" / "python.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_importing_harness_imports_nothing_heavy():
    code = "import sys, time; started = time.perf_counter(); import harness; print(time.perf_counter() - started)"
    code += "; print([name for name in ('torch', 'ray', 'pandas', 'numpy', 'pydantic') if name in sys.modules])"
    seconds, imported = command("-c", code, cwd=TOP).stdout.split("\n")[:2]
    assert imported == "[]"
    assert float(seconds) < 0.1


def test_onnxruntime_reports_to_nobody():
    """From 1.29 on it sends events to its vendor, unless this is set before it is imported."""
    code = "import os, harness; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert command("-c", code, cwd=TOP).stdout == "1\n"
    assert command("-c", code, cwd=TOP, ORT_DISABLE_TELEMETRY="0").stdout == "0\n"


def test_every_name_is_there():
    import harness

    assert all(getattr(harness, name) is not None for name in harness.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        harness.nothing  # noqa: B018


@pytest.mark.parametrize("number", range(2))
def test_examples_that_need_no_ray(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    shown: dict = {}
    exec(EXAMPLES[number], shown)
    assert shown["record"].status == "finished"
    assert "ray" not in set(sys.modules) - before


@pytest.mark.slow
def test_examples_of_a_run(tmp_path):
    (tmp_path / "example.py").write_text("\n".join(EXAMPLES[2:]))
    done = command("example.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "label smoothing helps: " in done.stdout
    assert "model.onnx" in done.stdout
    assert RunDirectory(tmp_path / "ablation").recorded().commands[0].startswith("harness.tune from Python: space=")


def test_a_network_of_ones_own_is_trained_and_continued(tmp_path):
    """It ends with the kept weights; given again with its folder, the finished weights are the same."""
    import torch

    from harness import Trial, train

    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    labels = (images.mean((1, 2, 3)) > 127.5).astype(int)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    first = net[1].weight.detach().clone()
    rows = []
    record = train(
        Trial(epochs=2, batch_size=10), (images, labels), model=net, folder=tmp_path, callbacks=[rows.append]
    )
    assert record.status == "finished", record.error
    assert [row["epoch"] for row in rows] == [0.5, 1.0, 1.5, 2.0]
    assert {row["lr"] for row in rows} == {Trial().optimizer.lr}
    assert not torch.equal(net[1].weight, first)
    assert not net.training
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "model.safetensors")["1.weight"], net[1].weight.cpu())


def test_another_network_does_not_continue_from_the_checkpoints_of_the_first(tmp_path):
    """A network continues where it started from the same weights; one that starts from others is trained from them."""
    import torch

    from harness import Trial, train

    class Interrupted(BaseException):
        pass

    def interrupt(row):
        if row["epoch"] == 2:
            raise Interrupted

    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), dtype=np.uint8)
    data = images, (images.mean((1, 2, 3)) > 127.5).astype(int)
    trial = Trial(epochs=3, batch_size=10, checkpoint_seconds=0)

    def network(weight):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        torch.nn.init.constant_(net[1].weight, weight)
        torch.nn.init.zeros_(net[1].bias)
        return net

    with pytest.raises(Interrupted):
        train(trial, data, model=network(0.0), folder=tmp_path / "run", callbacks=[interrupt])
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert [one.epoch for one in train(trial, data, model=network(0.0), folder=tmp_path / "run").continued] == [1]
    assert train(trial, data, model=network(5.0), folder=tmp_path / "other").continued == []


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8, 3)), [0, 1, 0, 1], "images float64"),
        (np.zeros((4, 8, 8), np.uint8), [0, 1, 0, 1], r"\(4, 8, 8\)"),
        (np.zeros((4, 8, 8, 3), np.uint8), [0.5, 1, 0, 1], "labels float64"),
        (np.zeros((4, 8, 8, 3), np.uint8), [0, 1], "4 train images, 2 labels"),
    ],
)
def test_arrays_that_cannot_be_trained_on(images, labels, message):
    from harness import BadInput, Trial, train

    with pytest.raises(BadInput, match=message):
        train(Trial(epochs=1), (images, labels))


LABELS = np.arange(40) % 2
IMAGES = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda h: h.train(h.Trial(), (IMAGES, LABELS, IMAGES, LABELS)),
            r"data: 4 arrays: give a pair .* a Decoded for",
        ),
        (lambda h: h.train(h.Trial(), IMAGES), "data: a ndarray: give a pair"),
        (lambda h: h.train(h.Trial(), "folder"), r"data: a str: give a pair .* or Data\(name='images', root=DIR\)"),
        (lambda h: h.train(h.Trial(), (IMAGES, LABELS + 1)), "data: no image has the label 0"),
        (
            lambda h: h.train(h.Trial(), (IMAGES, LABELS), model=len),
            "model: a builtin_function_or_method: give a torch",
        ),
        (lambda h: h.train(h.Trial(), (IMAGES, LABELS), folder=__file__), "folder=.*is not a folder"),
        (lambda h: h.train(h.Trial(), (IMAGES, LABELS), folder=TOP), "holds something else than a trial"),
        (lambda h: h.tune("quick", stage=["search"]), "stage: unknown; did you mean stages"),
        (lambda h: h.tune("quick", trial=3), "trial: give a mapping of its keys"),
        (lambda h: h.open_run("nowhere"), "no run directory"),
    ],
)
def test_calls_that_cannot_be(call, message):
    import harness

    with pytest.raises(harness.BadInput, match=message):
        call(harness)


def test_a_folder_is_used_again(tmp_path):
    from harness import Data, Trial, train

    trial = Trial(architecture="baseline", options={"widths": [4], "hidden": [4]}, epochs=1, batch_size=16)
    for _ in range(2):
        record = train(trial, Data(name="digits", limit=20), folder=tmp_path / "trial", read_test=True)
        assert record.status == "finished"
    assert (tmp_path / "trial" / "test_correct.npy").is_file()
