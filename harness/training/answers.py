"""What a network answers: logits of the right form, which depend on nothing but the image."""

import copy

import torch
from torch import nn

INDEPENDENT = 1e-3  # largest difference of a logit, relative to the largest one, that another batch may make


class NetworkFails(ValueError):
    """The network cannot be trained."""


def logits_of(network: nn.Module, inputs: torch.Tensor, classes: int, when: str) -> torch.Tensor:
    """The network's logits. Raises NetworkFails where it fails, or answers something else."""
    shape = list(inputs.shape)
    try:
        logits = network(inputs.clone())  # it may change them in place
    except (Exception, SystemExit) as error:
        raise NetworkFails(f"fails {when} on images {shape}: {first_line(error)}") from error
    if not isinstance(logits, torch.Tensor):
        raise NetworkFails(
            f"{when} it returns a {type(logits).__name__}, not logits {[len(inputs), classes]} as a tensor"
        )
    if list(logits.shape) != [len(inputs), classes]:
        raise NetworkFails(
            f"{when} it returns {list(logits.shape)}, not logits {[len(inputs), classes]} for {classes} classes"
        )
    if not logits.is_floating_point():
        raise NetworkFails(f"{when} it returns {logits.dtype}, not real numbers")
    if not logits.isfinite().all():
        raise NetworkFails(f"{when} untrained, it returns logits that are not finite")
    return logits


def check_independent(network: nn.Module, inputs: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises NetworkFails where an image's answer depends on the other images of its batch, or on chance. Weights other
    than those of a new network are looked at, as training makes them: a last layer of zeros would hide it."""
    later = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for one in later.parameters():
        one.add_(0.05 * torch.randn(one.shape, generator=generator).to(one.device, one.dtype))
    try:
        answers = logits_of(later, inputs, logits.shape[1], "in evaluation")
    except NetworkFails:  # not every network takes any weights
        later, answers = network, logits
    if differ(logits_of(later, inputs, logits.shape[1], "in evaluation"), answers):
        raise NetworkFails("answers differ from call to call in evaluation: a dropout or noise that is always on")
    alone = torch.cat([logits_of(later, one[None], logits.shape[1], "in evaluation") for one in inputs[:2]])
    if differ(alone, answers[:2]):
        raise NetworkFails(
            "an image's answer depends on the other images of its batch in evaluation: a batch norm without running "
            "statistics, or statistics over the batch"
        )


def differ(found: torch.Tensor, logits: torch.Tensor) -> bool:
    return float((found - logits).abs().max()) > INDEPENDENT * max(1e-6, float(logits.abs().max()))


def first_line(error: BaseException) -> str:
    try:
        lines = str(error).strip().splitlines() or [""]
    except Exception:  # an exception of the user's
        lines = ["no message"]
    return f"{type(error).__name__}: {lines[0]}"[:120]
