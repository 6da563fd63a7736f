"""python -m harness.inspect run=DIR image=FILE: what a trained network sees in an image.

Writes run/inspect/<trial>/<image>/: filters.png, the filters of the first convolution; first.png and last.png, what the
first and the last convolution answer to the image. Prints the predicted classes. Works with every architecture that has
a convolution; the trial is the winner unless another is named. Images of another size are resized.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from harness import cli
from harness.config import StageConfig
from harness.errors import BadInput

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.results import RunDirectory


class Inspect(StageConfig):
    image: Path = Field(description="the image")
    trial: str | None = Field(None, description="id of a finished trial; default: the winner's best")
    channels: int = Field(32, ge=1, description="shown at most, of filters and activations")


def main(config: Inspect) -> int:
    from harness.results import RunDirectory

    run = RunDirectory.existing(config.run)
    if not config.image.is_file():
        raise BadInput(f"image={config.image}: no such file; give the path of an image")
    recorded = run.configuration()
    assert recorded is not None
    record = chosen(run, config.trial, recorded["config"]["search"]["metric"])

    import numpy as np
    import torch
    from PIL.Image import Resampling

    from harness import checkpoint, figures, pictures
    from harness.batches import Normalizer
    from harness.config import Trial
    from harness.datasets.images import read_rgb
    from harness.evaluation import restore

    data = recorded["data"]
    side = data["input_size"]
    network = restore(run.trial_folder(record["id"]), record, len(data["classes"]), side)
    pixels = np.array(read_rgb(config.image, "image").resize((side, side), Resampling.BILINEAR))
    normalize = Normalizer(Trial.model_validate(record["config"]).normalization, torch.device("cpu"), "contiguous")
    logits, found = seen(network, normalize(torch.from_numpy(pixels)[None]))
    folder = run.path / "inspect" / record["id"] / config.image.name
    (first_name, filters, first), (last_name, _, last) = found[0], found[-1]
    shown = {
        "filters": pictures.filters(filters[: config.channels].numpy(), first_name),
        "first": pictures.activations(pixels, first[: config.channels].numpy(), first_name),
        "last": pictures.activations(pixels, last[: config.channels].numpy(), last_name),
    }
    for name, figure in shown.items():
        checkpoint.write_atomically(folder / f"{name}.png", figures.png(figure))
        print(folder / f"{name}.png")
    for value, place in zip(*logits.softmax(0).topk(min(3, len(logits))), strict=True):
        print(f"{data['classes'][int(place)]} {float(value):.4f}")
    return 0


def chosen(run: "RunDirectory", trial: str | None, metric: str) -> dict[str, Any]:
    """The record of the trial, by default the one that is exported; BadInput where there is none with weights."""
    from harness import results, stats

    finished = {r["id"]: r for r in run.trials() if r["status"] == "finished"}
    if trial is None:
        ranked = stats.ranking(list(finished.values()), metric)
        if not ranked:
            raise BadInput(f"run={run.path}: no trial has finished; train one first")
        trial = str(stats.winning_trial(ranked[0], metric)["id"])
    if trial not in finished:
        raise BadInput(f"trial={trial}: no finished trial of this run; choose one of {', '.join(finished)}")
    if not (run.trial_folder(trial) / results.WEIGHTS).is_file():
        raise BadInput(f"trial={trial}: its weights are not in the run directory; choose a trial that has some")
    return finished[trial]


def seen(
    network: "nn.Module", images: "torch.Tensor"
) -> "tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]]]":
    """(logits [classes], of each convolution in the order in which they answer: name, filters [K, C, R, R], answer to
    the first image [K, H, W]). BadInput where the network has no convolution."""
    import torch
    from torch import nn

    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(name: str):
        return lambda module, _, output: found.append((name, module.weight.detach(), output[0].detach()))

    handles = [m.register_forward_hook(keep(n)) for n, m in network.named_modules() if isinstance(m, nn.Conv2d)]
    if not handles:
        raise BadInput("trial: its network has no convolution to look at; choose another trial")
    try:
        with torch.inference_mode():
            logits = network.eval()(images)[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, found


if __name__ == "__main__":
    sys.exit(cli.run(Inspect, main, __doc__ or ""))
