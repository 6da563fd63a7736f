"""Networks: building from a trial's configuration, restoring from trained weights, counting layers and MACs."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from harness.config import BadInput, Trial
from harness.config.plugins import load
from harness.run import checkpoints
from harness.run.records import TRIAL_FILE, WEIGHTS_FILE


@dataclass(frozen=True)
class LayerSummary:
    """One leaf module in the order of computation; `macs` are multiply-adds of convolutions and matrix products."""

    name: str
    kind: str
    output_shape: tuple[int, ...]
    parameters: int
    macs: int


@dataclass(frozen=True)
class NetworkSummary:
    layers: tuple[LayerSummary, ...]
    parameters: int
    trainable_parameters: int
    macs: int


def summarize_network(network: nn.Module, input_size: int) -> NetworkSummary:
    """Run one image [3, input_size, input_size] through the network in eval mode; count parameters and multiply-adds.

    Multiply-adds are half of the floating-point operations counted by PyTorch's FlopCounterMode: convolutions and
    matrix products for one image, without element-wise operations and biases.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    leaves = {name: module for name, module in network.named_modules() if not list(module.children())}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple | list) and output else output  # of an LSTM: its sequence
            if isinstance(first, torch.Tensor):
                shapes[name] = tuple(first.shape)

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in leaves.items()]
    was_training = network.training
    device = next(network.parameters()).device
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network.eval()(torch.zeros(1, 3, input_size, input_size, device=device))
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()

    counts = counter.get_flop_counts()
    root = type(network).__name__
    layers = tuple(
        LayerSummary(
            name=name,
            kind=type(leaves[name]).__name__,
            output_shape=shape,
            parameters=sum(p.numel() for p in leaves[name].parameters()),
            macs=sum(counts.get(f"{root}.{name}", {}).values()) // 2,
        )
        for name, shape in shapes.items()
    )
    return NetworkSummary(
        layers=layers,
        parameters=sum(p.numel() for p in network.parameters()),
        trainable_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        macs=counter.get_total_flops() // 2,
    )


def network_options(architecture: str) -> dict[str, inspect.Parameter]:
    """The options of an architecture's `build`, by name, without the number of classes and the input size."""
    parameters = inspect.signature(load("architectures", architecture, "build")).parameters
    return {name: p for name, p in list(parameters.items())[1:] if name != "input_size"}


def build_network(trial: Trial, num_classes: int, input_size: int, *, restoring: bool = False) -> nn.Module:
    """The network of a trial with initial weights drawn from torch's global generator.

    `restoring`: weights will be loaded into it, so an option `weights` (pretrained weights) is set to none.
    Raises BadInput for an unknown option or a value that the architecture rejects.
    """
    build = load("architectures", trial.architecture, "build")
    known = network_options(trial.architecture)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    options = dict(trial.options)
    for name, value in options.items():
        if name not in known and not takes_any:
            raise BadInput(
                f"trial.options.{name}={value}: {trial.architecture} has no such option; "
                f"choose from {', '.join(known) or 'none'}"
            )
    if restoring and "weights" in options:
        options["weights"] = "none"
    if "input_size" in inspect.signature(build).parameters:
        options["input_size"] = input_size
    try:
        network: nn.Module = build(num_classes, **options)
    except MemoryError:
        raise
    except (Exception, SystemExit) as error:
        given = " ".join(f"trial.options.{name}={value}" for name, value in trial.options.items())
        subject = f"trial.architecture={trial.architecture} {given}".strip()
        reason = error if isinstance(error, ValueError | TypeError | RuntimeError | OSError) else repr(error)
        own = "fix build(), or its options" if trial.architecture.endswith(".py") else ""
        raise BadInput(
            f"{subject}: {reason}; {own or '`python -m architectures` lists networks and options'}"
        ) from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise BadInput(f"trial.architecture={trial.architecture}: build() returns a {kind}; return a torch.nn.Module")
    return network


def own_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network's state by name, tied ones (which are the same memory) once; not copied."""
    found: dict[tuple[object, ...], str] = {}
    state: dict[str, torch.Tensor] = network.state_dict()
    for name, tensor in state.items():
        found.setdefault(_memory(tensor) or (name,), name)
    return {name: state[name] for name in found.values()}


def load_tensors(network: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Load the result of `own_tensors` of a network of the same architecture. Raises RuntimeError where they differ."""
    first: dict[tuple[object, ...], str] = {}
    tied = {name: first.setdefault(_memory(tensor) or (name,), name) for name, tensor in network.state_dict().items()}
    for name, other in tied.items():
        if name != other and name in tensors and other in tensors and not torch.equal(tensors[name], tensors[other]):
            raise RuntimeError(f"{name} and {other} are the same tensor in a new network, and differ after training")
    state = {name: tensors[other] for name, other in tied.items() if name not in tensors and other in tensors}
    network.load_state_dict({**tensors, **state})


def _memory(tensor: torch.Tensor) -> tuple[object, ...] | None:
    """What identifies the memory of a tensor; None for one without elements."""
    if not tensor.numel():
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def reference_network(network: nn.Module) -> nn.Module:
    """A copy that computes in float64: its logits are what exported files are compared with."""
    return copy.deepcopy(network).double()


def restore_network(folder: Path, trial: Trial, sha256: str | None, num_classes: int, input_size: int) -> nn.Module:
    """The network with the trained weights in `folder`, on the CPU in eval mode.

    Raises ValueError where the weights are missing or corrupt (their SHA-256 is not `sha256`), BadInput where they do
    not fit the network.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: the weights are missing; remove {folder / TRIAL_FILE} and run "
            "the command again to train the trial again"
        )
    network = build_network(trial, num_classes, input_size, restoring=True)
    try:
        load_tensors(network, checkpoints.load_weights(folder / WEIGHTS_FILE, sha256))
    except RuntimeError as error:
        *_, reason = str(error).strip().splitlines()[:2]
        raise BadInput(
            f"trial.architecture={trial.architecture}: the weights in {folder.name} do not fit it "
            f"({reason.strip()[:120]}): it, or a file that it reads, has changed since it was trained; restore it, or "
            "train again with run=NEW"
        ) from error
    return network.eval()
