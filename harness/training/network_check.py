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

import psutil
import torch
from torch import nn

from harness.config import BadInput, Trial
from harness.data.augmentation import Draws
from harness.data.batches import DeviceSplit, Normalizer
from harness.data.splits import Dataset
from harness.run.system import native_bfloat16
from harness.training.compilation import to_device, usable_format
from harness.training.execution import ExecutionPlan, autocast
from harness.training.network import build_network, load_tensors, own_tensors, reference_network
from harness.training.optimizers import takes_fused
from harness.training.step import make_step

IMAGES = 4
SECONDS = 60.0  # for one network
COPIES = 4  # of the weights in a training: gradients, state of the optimiser, kept ones
INDEPENDENT = 1e-3  # largest difference of a logit, relative to the largest one, that another batch may make
FORGOTTEN = 0.25  # share of a batch norm's first statistics that may be left at the end of a training

SEEDLESS = (
    "starts from the same weights whatever the seed (torch.manual_seed in build()?): seeds differ less than they do"
)

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

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _check(trial, data, make, seeded=model is None and "weights" not in trial.options)


def _check(trial: Trial, data: Dataset, make: Make, seeded: bool) -> list[str]:
    _check_size(trial, data)
    try:
        network = make(False)
    except MemoryError as error:
        raise _bad(trial, "needs more memory than there is", "give a smaller network") from error
    if any(nn.parameter.is_lazy(p) for p in network.parameters()):
        raise _bad(trial, "has lazy layers, whose weights are not there yet", "run an image through it in build()")
    if not any(p.requires_grad for p in network.parameters()):
        raise _bad(trial, "has no weights to train", "let build() return a network with parameters")
    if empty := [name for name, one in network.named_parameters() if not one.numel()]:
        raise _bad(trial, f"{empty[0]} has no elements: a layer has a width of 0", "give it a width")
    notes = [SEEDLESS] if seeded and _has_same_weights(network, make) else []
    rows = torch.from_numpy(data.train.rows[: max(1, min(trial.batch_size, IMAGES))].copy())
    images = torch.from_numpy(data.train.images[rows.numpy()])
    part = DeviceSplit(images, torch.from_numpy(data.train.labels[rows.numpy()]), torch.arange(len(rows)))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        try:
            with _time_limit():
                return notes + list(_checked(trial, part, make, data, torch.device(device)))
        except (_Fails, _TakesTooLong, MemoryError, RuntimeError) as error:  # memory also outside of the network
            if device != devices[-1]:  # a network may work, or be fast enough, on a GPU alone
                continue
            if isinstance(error, _TakesTooLong):
                reason = f"{IMAGES} images take the network more than {SECONDS:g} s: it hangs, or is far too large"
                raise _bad(trial, reason, "give another") from error
            hint = "; or give trial.memory_format=auto" if trial.memory_format == "channels_last" else ""
            reason = str(error) if isinstance(error, _Fails) else f"fails on {IMAGES} images: {_first_line(error)}"
            raise _bad(trial, reason, f"fix the network{hint}") from error
    raise AssertionError


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


class _Fails(ValueError):
    """The network cannot be trained."""


def _bad(trial: Trial, reason: str, way_out: str) -> BadInput:
    return BadInput(f"trial.architecture={trial.architecture}: {reason}; {way_out}")


def _checked(trial: Trial, part: DeviceSplit, make: Make, data: Dataset, device: torch.device) -> Iterator[str]:
    part = DeviceSplit(part.images.to(device), part.labels.to(device), part.rows.to(device))
    classes, images, side = len(data.classes), len(data.train), data.input_size
    network = make(False).to(device)
    memory_format: str = trial.memory_format
    if memory_format == "auto":
        memory_format = usable_format(network, side)
        if memory_format == "contiguous":
            yield "fails on images in channels_last memory format: it is trained and evaluated in contiguous"
    normalize = Normalizer(trial.normalization, device, memory_format)
    inputs = normalize(part.images)
    with torch.no_grad():
        logits = _logits(network.eval(), inputs, classes, "in evaluation")
        _check_independent(network, inputs, logits)
        if float(logits.min()) >= 0 and float((logits.sum(1) - 1).abs().max()) < 1e-3:
            yield "answers with probabilities, not logits: the loss wants logits, so leave out the softmax at its end"
        other = to_device(_restored(network, make), device, memory_format)
        if _differ(_logits(other.eval(), inputs, classes, "in evaluation"), logits):
            raise _Fails(
                "a new network with the same weights answers otherwise: random numbers or tensors that are not saved "
                "(register_buffer without persistent=False saves them)"
            )
    try:
        with torch.no_grad():
            reference_network(other.cpu())(inputs[:1].cpu().contiguous().double())
    except Exception as error:
        yield f"cannot compute in float64 ({_first_line(error)}): exports are compared with its float32 logits"
    network.to(device)
    precision: str = trial.precision
    if precision == "auto":
        precision = "bfloat16" if native_bfloat16(device) else "float32"
    plan = ExecutionPlan(device.type, precision, "off", memory_format, torch.get_num_threads())
    if not takes_fused(network):
        yield "has parameters that fused optimisers refuse: its optimiser is not fused"
    yield from _trained(network, trial, part, plan, classes, make)
    yield from _batch_norms(network, trial.epochs * (images // trial.batch_size))


def _logits(network: nn.Module, inputs: torch.Tensor, classes: int, when: str) -> torch.Tensor:
    """The network's logits. Raises _Fails where it fails, or answers something else."""
    shape = list(inputs.shape)
    try:
        logits = network(inputs.clone())  # it may change them in place
    except (Exception, SystemExit) as error:
        raise _Fails(f"fails {when} on images {shape}: {_first_line(error)}") from error
    if not isinstance(logits, torch.Tensor):
        raise _Fails(f"{when} it returns a {type(logits).__name__}, not logits {[len(inputs), classes]} as a tensor")
    if list(logits.shape) != [len(inputs), classes]:
        raise _Fails(
            f"{when} it returns {list(logits.shape)}, not logits {[len(inputs), classes]} for {classes} classes"
        )
    if not logits.is_floating_point():
        raise _Fails(f"{when} it returns {logits.dtype}, not real numbers")
    if not logits.isfinite().all():
        raise _Fails(f"{when} untrained, it returns logits that are not finite")
    return logits


def _check_independent(network: nn.Module, inputs: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises _Fails where an image's answer depends on the other images of its batch, or on chance."""
    if _differ(_logits(network, inputs, logits.shape[1], "in evaluation"), logits):
        raise _Fails("answers differ from call to call in evaluation: a dropout or noise that is always on")
    alone = torch.cat([_logits(network, one[None], logits.shape[1], "in evaluation") for one in inputs])
    if _differ(alone, logits):
        raise _Fails(
            "an image's answer depends on the other images of its batch in evaluation: a batch norm without running "
            "statistics, or statistics over the batch"
        )


def _differ(found: torch.Tensor, logits: torch.Tensor) -> bool:
    return float((found - logits).abs().max()) > INDEPENDENT * max(1.0, float(logits.abs().max()))


def _restored(network: nn.Module, make: Make) -> nn.Module:
    """A new network with the same weights. Raises _Fails where it does not take them."""
    torch.manual_seed(1)
    try:
        other = make(True)
        load_tensors(other, {name: tensor.detach().cpu().clone() for name, tensor in own_tensors(network).items()})
    except Exception as error:
        raise _Fails(f"its weights cannot be restored into a new network: {_first_line(error)}") from error
    return other


def _trained(
    network: nn.Module, trial: Trial, part: DeviceSplit, plan: ExecutionPlan, classes: int, make: Make
) -> Iterator[str]:
    """One step, as a trial makes it."""
    device = torch.device(plan.device)
    step = make_step(network.train(), trial, plan, device)
    draws = Draws.of(part.rows, trial, 0)
    images, _ = part.batch(draws.rows)
    with torch.no_grad(), autocast(plan.precision, device):
        _logits(step.network, step.normalize(images), classes, "in training")
    try:
        loss = float(step(part, draws, 0.0)[0])
    except Exception as error:
        raise _Fails(f"fails in a training step: {_first_line(error)}") from error
    if not abs(loss) < float("inf"):
        raise _Fails("the loss of the first training step is not finite")
    parameters = dict(step.network.named_parameters())
    without = [name for name, one in parameters.items() if one.requires_grad and one.grad is None]
    if len(without) == sum(one.requires_grad for one in parameters.values()):
        raise _Fails("no weight gets a gradient from the loss")
    if without:
        yield f"{len(without)} parameters get no gradient, such as {without[0]}"
    inputs = step.normalize(part.images)
    with torch.no_grad():
        logits = _logits(step.network.eval(), inputs, classes, "after a training step")
        other = to_device(_restored(step.network, make), device, plan.memory_format).eval()
        if _differ(_logits(other, inputs, classes, "after a training step"), logits):
            raise _Fails(
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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:120]
