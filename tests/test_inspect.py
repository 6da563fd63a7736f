"""What a network sees, of every architecture; and the command."""

import numpy as np
import pytest
import torch
from conftest import here, records
from PIL import Image

from harness.config import BadInput, Trial, plugins
from harness.reporting import pictures
from harness.reporting.inspection import seen
from harness.training.network import build_network

SMALL = {
    "transfer": {"resize": 32},
    "final": {"widths": [[8, 8]], "hidden": [8]},
    "baseline": {"widths": [8, 16], "hidden": [8]},
}


@pytest.mark.parametrize("name", plugins.names("architectures"))
def test_every_architecture(name):
    network = build_network(Trial(architecture=name, options=SMALL.get(name, {})), 10, 32)
    images = torch.randn(1, 3, 32, 32)
    logits, found = seen(network, images)
    with torch.inference_mode():
        assert torch.equal(logits, network.eval()(images)[0])
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(found) == len(convolutions)
    _, filters, answer = found[0]
    assert torch.equal(filters, convolutions[0].weight)
    assert len(answer) == len(filters)
    assert found[-1][2].shape[1] <= answer.shape[1]
    assert not any(m._forward_hooks for m in network.modules())


def test_filters_fill_their_range():
    weights = np.random.default_rng(0).normal(size=(5, 3, 3, 3)).astype(np.float32)
    picture = pictures.filter_grid(weights, "0")
    shown = [axis.images[0].get_array() for axis in picture.axes if axis.images]
    assert len(shown) == 5
    assert all(one.min() == 0 and one.max() == pytest.approx(1) for one in shown)


def test_no_convolution():
    with pytest.raises(BadInput, match="no convolution"):
        seen(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2)), torch.zeros(1, 3, 2, 2))


def test_the_command(small_run, tmp_path):
    run, _ = small_run
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(tmp_path / "cat.png")
    trial = records(run)[0].id
    arguments = ["harness.inspect", f"run={run}", f"image={tmp_path / 'cat.png'}"]
    done = here(*arguments, f"trial={trial}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.rsplit("/", 1)[1] for line in lines[:3]] == ["filters.png", "first.png", "last.png"]
    for line in lines[:3]:
        with Image.open(line) as picture:
            assert picture.width > 500
    assert f"inspect/{trial}/cat.png" in lines[0]
    for wrong, told in ((["trial=nothing"], "choose one of"), (["image=/nowhere.png"], "is no file")):
        done = here(*arguments[:2], *([arguments[2]] if "image" not in wrong[0] else []), *wrong, cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert told in done.stderr
