"""Applies a trained network to an image: draws filters and activations, prints the predicted classes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from harness.config import BadInput, StageConfig, errors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.run.directory import RunDirectory
    from harness.run.records import TrialRecord


class Inspect(StageConfig):
    image: Path = Field(description="path of the image file")
    trial: str | None = Field(None, description="id of a finished trial; default: the one that is exported")
    channels: int = Field(32, ge=1, description="maximum number of filters and activations shown")


def inspect_trial(config: Inspect) -> int:
    """Write the figures and print the predicted classes. Raises BadInput where the image or trial is missing."""
    from harness.run.trust import check_network_code, trusted_run

    run = trusted_run(config.run, config.trust)
    if not config.image.is_file():
        raise BadInput(f"image={config.image}: is no file; give the path of an image")
    recorded = run.recorded()
    record = chosen(run, config.trial, recorded.metric)
    check_network_code(run, record)

    import torch

    from harness.data.batches import Normalizer
    from harness.data.decoding import read_images
    from harness.reporting import figures, pictures
    from harness.run import storage
    from harness.training.network import restore_network

    data = recorded.data
    side = data.input_size
    network = restore_network(run.trial_folder(record.id), record.trial, record.weights_sha256, len(data.classes), side)
    (pixels,) = read_images([config.image], side, "image")
    normalize = Normalizer(record.trial.normalization, torch.device("cpu"), "contiguous")
    logits, found = seen(network, normalize(torch.from_numpy(pixels)[None]))
    folder = run.path / "inspect" / record.id / config.image.name
    (first_name, filters, first), (last_name, _, last) = found[0], found[-1]
    shown = {
        "filters": pictures.filter_grid(filters[: config.channels].numpy(), first_name),
        "first": pictures.activation_grid(pixels, first[: config.channels].numpy(), first_name),
        "last": pictures.activation_grid(pixels, last[: config.channels].numpy(), last_name),
    }
    for name, figure in shown.items():
        storage.write_atomically(folder / f"{name}.png", figures.png(figure))
        print(errors.shown(folder / f"{name}.png"))
    for value, place in zip(*logits.softmax(0).topk(min(3, len(logits))), strict=True):
        print(f"{errors.shown(data.classes[int(place)], errors.LONGEST)} {float(value):.4f}")
    return 0


def chosen(run: "RunDirectory", trial: str | None, metric: str) -> "TrialRecord":
    """The trial's record, by default the exported one's. Raises BadInput where none has finished or has weights."""
    from harness.run.records import WEIGHTS_FILE
    from harness.stats.ranking import rank, winning_trial

    finished = {r.id: r for r in run.trials() if r.status == "finished"}
    if trial is None:
        ranked = rank(list(finished.values()), metric)
        if not ranked:
            raise BadInput(f"run={run.path}: no trial has finished; train one first")
        trial = winning_trial(ranked[0], metric).id
    if trial not in finished:
        raise BadInput(f"trial={trial}: no finished trial of this run; choose one of {', '.join(finished)}")
    if not (run.trial_folder(trial) / WEIGHTS_FILE).is_file():
        raise BadInput(f"trial={trial}: its weights are not in the run directory; choose a trial that has some")
    return finished[trial]


def seen(
    network: "nn.Module", images: "torch.Tensor"
) -> "tuple[torch.Tensor, list[tuple[str, torch.Tensor, torch.Tensor]]]":
    """(logits [classes] of the first image, and for each convolution in execution order: name, filters [K, C, R, R] and
    output for the first image [K, H, W]). Raises BadInput where the network has no convolution."""
    import torch
    from torch import nn

    found: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
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
