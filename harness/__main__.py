"""classifier-harness VERB [key=value ...]: every command of this project under one name, with the same keys.

    tune         trials -> confirm -> export -> benchmark -> report       python -m harness.tune
    export       export the winner of a run                              python -m export
    benchmark    measure a run's exported models                         python -m benchmarks
    report       figures and report/index.html                           python -m harness.report
    inspect      filters and activations of a trained network            python -m harness.inspect
    predict      classify images with an exported model                  python -m export.predict
    models       networks with their layers and multiply-adds            python -m architectures

`classifier-harness VERB --help` lists the keys of each. This command never looks into the current folder for code;
`python -m` does, and refuses to start where a folder there hides one of this project's packages.
"""

import difflib
import importlib
import sys

from harness import __version__

VERBS = {
    "tune": "harness.tune",
    "export": "export.__main__",
    "benchmark": "benchmarks.__main__",
    "report": "harness.report",
    "inspect": "harness.inspect",
    "predict": "export.predict",
    "models": "architectures.__main__",
}


def main() -> int:
    verb, *arguments = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h"):
        print((__doc__ or "").strip())
        return 0
    if verb == "--version":
        print(f"harness {__version__}")
        return 0
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        print(f"error: {verb}: unknown; {hint}choose one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    sys.argv = [f"classifier-harness {verb}", *arguments]
    return int(importlib.import_module(VERBS[verb]).main())


if __name__ == "__main__":
    sys.exit(main())
