"""python -m architectures [NAME|FILE.py [key=value ...]]: layers, output shapes, parameters and multiply-adds.

Without a name it lists every network of the folder with its totals, at 10 classes and 32x32. Options of a network are
written key=value: `python -m architectures final kernel_size=5 input_size=64 num_classes=100`.
"""

import sys
from typing import Any

from pydantic import Field

from harness.config import BadInput, Strict, Trial, command_line, plugins
from harness.config.keys import keys


class Architectures(Strict):
    name: str | None = Field(None, description="network; also as the first word, without name=")
    num_classes: int = Field(10, ge=2, le=1_000_000, description="width of the output")
    input_size: int = Field(32, ge=1, le=4096, description="side of the images in pixels")
    options: dict[str, Any] = Field(default_factory=dict, description="any other key: an option of the network")


def show_networks(config: Architectures) -> int:
    from rich.console import Console
    from rich.table import Table

    from harness.training.network import build_network, network_options, summarize_network

    console = Console(highlight=False)
    if config.name is None:
        table = Table("network", "parameters", "multiply-adds", "what it is", box=None)
        for name in plugins.names("architectures"):
            network = build_network(Trial(architecture=name), config.num_classes, config.input_size)
            summary = summarize_network(network, config.input_size)
            doc = (plugins.load("architectures", name, "__doc__") or "").strip().split("\n\n")[0]
            table.add_row(name, f"{summary.parameters:,}", f"{summary.macs:,}", " ".join(doc.split()))
        console.print(table)
        return 0
    trial = Trial(architecture=config.name, options=config.options)
    network = build_network(trial, config.num_classes, config.input_size)
    try:
        summary = summarize_network(network, config.input_size)
    except (Exception, SystemExit) as error:
        reason = f"fails on an image of {config.input_size} pixels ({type(error).__name__}: {error})"
        raise BadInput(f"name={config.name}: {reason}; fix it, or give another input_size") from error
    table = Table("layer", "kind", "output", "parameters", "multiply-adds", box=None)
    for layer in summary.layers:
        shape = " x ".join(str(n) for n in layer.output_shape[1:])
        table.add_row(layer.name, layer.kind, shape, f"{layer.parameters:,}", f"{layer.macs:,}")
    console.print(table)
    trained = summary.trainable_parameters
    frozen = f" ({trained:,} of them trained)" if trained != summary.parameters else ""
    console.print(f"{summary.parameters:,} parameters{frozen}, {summary.macs:,} multiply-adds an image")
    known = ", ".join(f"{n}={p.default}" for n, p in network_options(config.name).items())
    console.print(f"options: {known}", soft_wrap=True)
    return 0


def arguments(words: list[str]) -> list[str]:
    """Expand `final kernel_size=5` to `name=final options.kernel_size=5`. Raises BadInput for a second name."""
    own = {key.name for key in keys(Architectures)} - {"options"}
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words = [f"name={words[0]}", *words[1:]]
    for word in words:
        if "=" not in word and not word.startswith("-"):
            raise BadInput(f"{word}: one network at a time; options are written key=value")
    return [
        word if word.startswith("-") or word.split("=")[0] in own or word.startswith("options.") else f"options.{word}"
        for word in words
    ]


def main() -> int:
    return command_line.run_command(Architectures, show_networks, __doc__ or "", prepare=arguments)


if __name__ == "__main__":
    sys.exit(main())
