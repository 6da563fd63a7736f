"""The network check before training: the network itself takes a few real images forward and backward, as a trial will.

What would make a trial fail, or its result wrong, is bad input. What a trial does differently because of the network is
returned in words, and recorded.
"""

import contextlib
import copy
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import psutil
import torch
from torch import nn

from harness.config import BadInput, Trial
from harness.data.augmentation import Draws
from harness.data.batches import DeviceSplit, Normalizer
from harness.data.splits import Dataset
from harness.run.system import native_bfloat16
from harness.training.answers import NetworkFails, check_independent, differ, first_line, logits_of
from harness.training.compilation import prepare_network, to_device, usable_format
from harness.training.execution import ExecutionPlan, autocast
from harness.training.network import build_network, load_tensors, own_tensors, reference_network
from harness.training.optimizers import takes_fused
from harness.training.step import ForwardBackward

IMAGES = 4
SECONDS = 60.0  # for one network
COPIES = 4  # of the weights in a training: gradients, state of the optimiser, kept ones
FORGOTTEN = 0.25  # share of a batch norm's first statistics that may be left at the end of a training

SEEDLESS = (
    "starts from the same weights whatever the seed (torch.manual_seed in build()?): seeds differ less than they do"
)

T = TypeVar("T")
Make = Callable[[bool], nn.Module]  # makes the network; the argument: whether weights are restored into it


def check_network(trial: Trial, data: Dataset, model: nn.Module | None = None) -> list[str]:
    """Check the network of a trial, or `model` in its place, on real images; returns what is different about its
    training, in words.

    Raises BadInput where it cannot be trained, or its answers would be wrong or depend on the batch.
    """

    def make(restoring: bool) -> nn.Module:
        if model is not None:
            return copy.deepcopy(model)
        return build_network(trial, len(data.classes), data.input_size, restoring=restoring)

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    _check_size(trial, data)
    with torch.random.fork_rng(devices[1:] and [0]):
        network, notes = _limited(trial, lambda: _of_its_form(trial, make))
        rows = torch.from_numpy(data.train.rows[: max(1, min(trial.batch_size, IMAGES))].copy())
        images = torch.from_numpy(data.train.images[rows.numpy()])
        part = DeviceSplit(images, torch.from_numpy(data.train.labels[rows.numpy()]), torch.arange(len(rows)))
        try:
            return notes + _limited(trial, lambda: list(_checked(trial, network, part, make, data, "cpu")))
        except BadInput:
            if len(devices) == 1:
                raise
        # A network may work, or be fast enough, on a GPU alone.
        return notes + _limited(trial, lambda: list(_checked(trial, make(False), part, make, data, "cuda")))


def _limited(trial: Trial, check: Callable[[], T]) -> T:
    """The result of a part of the check. Raises BadInput where it fails in any way, or takes too long."""
    try:
        with _time_limit():
            return check()
    except BadInput:
        raise
    except _TakesTooLong as error:
        reason = f"{IMAGES} images take the network more than {SECONDS:g} s: it hangs, or is far too large"
        raise _bad(trial, reason, "give another") from error
    except (Exception, SystemExit) as error:
        hint = "; or give trial.memory_format=auto" if trial.memory_format == "channels_last" else ""
        reason = str(error) if isinstance(error, NetworkFails) else f"fails on {IMAGES} images: {first_line(error)}"
        raise _bad(trial, reason, f"fix the network{hint}") from error


def _of_its_form(trial: Trial, make: Make) -> tuple[nn.Module, list[str]]:
    """Check the network as it is built; returns it."""
    torch.manual_seed(0)
    try:
        network = make(False)
    except MemoryError as error:
        raise _bad(trial, "needs more memory than there is", "give a smaller network") from error
    if isinstance(network, torch.jit.ScriptModule):
        raise _bad(trial, "is a TorchScript module", "return the torch.nn.Module that it was made from")
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise _bad(trial, "has lazy layers, whose weights are not there yet", "run an image through it in build()")
    if not any(p.requires_grad for p in network.parameters()):
        raise _bad(trial, "has no weights to train", "let build() return a network with parameters")
    if empty := [name for name, one in network.named_parameters() if not one.numel()]:
        raise _bad(trial, f"{empty[0]} has no elements: a layer has a width of 0", "give it a width")
    seeded = trial.architecture.endswith(".py") and "weights" not in trial.options
    return network, [SEEDLESS] if seeded and _has_same_weights(network, make) else []


def _has_same_weights(network: nn.Module, make: Make) -> bool:
    """Whether a network that is made with another seed has the same weights."""
    torch.manual_seed(1)
    other = dict(make(False).named_parameters())
    weights = dict(network.named_parameters())
    return weights.keys() == other.keys() and all(torch.equal(one, other[name]) for name, one in weights.items())


def _check_size(trial: Trial, data: Dataset) -> None:
    """Raises BadInput where the weights need more memory than there is; they are not allocated for this."""
    own = trial.architecture.endswith(".py") or ":" in trial.architecture
    if own or "weights" in trial.options:  # may keep tensors for later, or reads them twice
        return
    count = 0
    with contextlib.suppress(Exception), warnings.catch_warnings():  # a network may compute with its weights
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            network = build_network(trial, len(data.classes), data.input_size)
        count = sum(p.numel() for p in network.parameters())
    needed, available = COPIES * 4 * count, psutil.virtual_memory().available
    if needed > available:
        raise _bad(
            trial,
            f"{count:,} parameters need {needed / 2**30:.0f} GiB to train, {available / 2**30:.0f} GiB are free",
            "give a smaller network",
        )


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Raises _TakesTooLong in the main thread where the block takes longer than SECONDS."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise _TakesTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _TakesTooLong(BaseException):
    """Not an Exception, so that nothing in between handles it."""


def _bad(trial: Trial, reason: str, way_out: str) -> BadInput:
    return BadInput(f"trial.architecture={trial.architecture}: {reason}; {way_out}")


def _checked(
    trial: Trial, network: nn.Module, part: DeviceSplit, make: Make, data: Dataset, device_name: str
) -> Iterator[str]:
    device = torch.device(device_name)
    part = DeviceSplit(part.images.to(device), part.labels.to(device), part.rows.to(device))
    classes, images, side = len(data.classes), len(data.train), data.input_size
    network = network.to(device)
    memory_format: str = trial.memory_format
    if memory_format == "auto":
        memory_format = usable_format(network, side)
        if memory_format == "contiguous":
            yield "fails on images in channels_last memory format: it is trained and evaluated in contiguous"
    normalize = Normalizer(trial.normalization, device, memory_format)
    inputs = normalize(part.images)
    with torch.no_grad():
        logits = logits_of(network.eval(), inputs, classes, "in evaluation")
        check_independent(network, inputs, logits)
        if float(logits.min()) >= 0 and float((logits.sum(1) - 1).abs().max()) < 1e-3:
            yield "answers with probabilities, not logits: the loss wants logits, so leave out the softmax at its end"
        torch.manual_seed(1)
        other = to_device(make(True), device, memory_format).eval()
        _restore(network, other)
        if differ(logits_of(other, inputs, classes, "in evaluation"), logits):
            raise NetworkFails(
                "a new network with the same weights answers otherwise: random numbers or tensors that are not saved "
                "(register_buffer without persistent=False saves them)"
            )
    try:
        with torch.no_grad():
            reference_network(other).cpu()(inputs[:1].cpu().contiguous().double())
    except Exception as error:
        yield f"cannot compute in float64 ({first_line(error)}): exports are compared with its float32 logits"
    precision: str = trial.precision
    if precision == "auto":
        precision = "bfloat16" if native_bfloat16(device) else "float32"
    plan = ExecutionPlan(device.type, precision, "off", memory_format, torch.get_num_threads())
    if not takes_fused(network):
        yield "has parameters that fused optimisers refuse: its optimiser is not fused"
    yield from _trained(network, other, trial, part, plan, classes)
    yield from _batch_norms(network, trial.epochs * (images // trial.batch_size))


def _restore(network: nn.Module, other: nn.Module) -> None:
    """Load the weights into another network. Raises NetworkFails where it does not take them."""
    try:
        load_tensors(other, {name: tensor.detach().cpu().clone() for name, tensor in own_tensors(network).items()})
    except Exception as error:
        raise NetworkFails(f"its weights cannot be restored into a new network: {first_line(error)}") from error


def _trained(
    network: nn.Module, other: nn.Module, trial: Trial, part: DeviceSplit, plan: ExecutionPlan, classes: int
) -> Iterator[str]:
    """A step as a trial makes it, but for its last part, the optimiser's; `other`: a network that was not trained."""
    device = torch.device(plan.device)
    normalize = Normalizer(trial.normalization, device, plan.memory_format)
    step = ForwardBackward(*prepare_network(network.train(), plan, device), normalize, trial, plan, device)
    draws = Draws.of(part.rows, trial, 0)
    images, _ = part.batch(draws.rows)
    with torch.no_grad(), autocast(plan.precision, device):
        logits_of(step.network, step.normalize(images), classes, "in training")
    try:
        loss = float(step.backward(*part.batch(draws.rows), draws)[0])
    except Exception as error:
        raise NetworkFails(f"fails in a training step: {first_line(error)}") from error
    if not abs(loss) < float("inf"):
        raise NetworkFails("the loss of the first training step is not finite")
    parameters = dict(step.network.named_parameters())
    without = [name for name, one in parameters.items() if one.requires_grad and one.grad is None]
    if len(without) == sum(one.requires_grad for one in parameters.values()):
        raise NetworkFails("no weight gets a gradient from the loss")
    if sparse := [name for name, one in parameters.items() if one.grad is not None and one.grad.is_sparse]:
        raise NetworkFails(f"{sparse[0]} gets a sparse gradient, which the optimisers refuse")
    if without:
        yield f"{len(without)} parameters get no gradient, such as {without[0]}"
    inputs = step.normalize(part.images)
    with torch.no_grad():
        logits = logits_of(step.network.eval(), inputs, classes, "after a training step")
        _restore(step.network, other)
        if differ(logits_of(other, inputs, classes, "after a training step"), logits):
            raise NetworkFails(
                "training changes something that is not saved: a new network with its weights then answers otherwise "
                "(keep it in a buffer, by register_buffer without persistent=False)"
            )


def _batch_norms(network: nn.Module, steps: int) -> Iterator[str]:
    momenta = [
        layer.momentum
        for layer in network.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats and layer.momentum
    ]
    if momenta and steps and (left := (1 - min(momenta)) ** steps) > FORGOTTEN:
        yield (
            f"has a batch norm of momentum {min(momenta):g} that keeps {100 * left:.0f} % of its first statistics "
            f"after the {steps} steps of this training: evaluation may stay at chance level; train longer or raise the "
            "momentum"
        )
