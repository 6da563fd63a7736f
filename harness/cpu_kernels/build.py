"""Compiles the kernels' C++ sources for this processor, once per node, and loads and calls them.

The loops are in kernels.cpp, winograd.cpp and direct.cpp beside this file; the matrices of Winograd's minimal
filtering (Lavin and Gray, arXiv 1509.09308) are computed here.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.run import system
from harness.run.cache import compiled_folder

SOURCES = [Path(__file__).with_name(name) for name in ("kernels.cpp", "winograd.cpp", "direct.cpp")]
FLAGS = ("-std=c++17", "-O3", "-march=native", "-Wno-psabi", "-fPIC", "-shared")
# Kernel size -> (outputs per tile side, points at which the polynomials are evaluated, besides infinity).
WINOGRAD = {3: (4, "0 1 -1 2 -2"), 5: (4, "0 1 -1 2 -2 1/2 -1/2")}
Matrix = list[list[Fraction]]


def cook_toom(m: int, r: int, points: Sequence[Fraction]) -> tuple[Matrix, Matrix, Matrix]:
    """Matrices (A', G, B') of F(m, r): m outputs of a correlation with r weights w are A' [(G w) * (B' x)].

    x has n = m + r - 1 inputs; there are n - 1 `points` and infinity. A' is m x n, G n x r, B' n x n.
    """
    one, zero = Fraction(1), Fraction(0)

    def product(of: Sequence[Fraction]) -> list[Fraction]:
        """Coefficients of the polynomial with these roots, the constant term first."""
        found = [one]
        for root in of:
            found = [a - root * b for a, b in zip([zero, *found], [*found, zero], strict=True)]
        return found

    others = [[p for p in points if p != point] for point in points]
    a = [[point**i for point in points] + [one if i == m - 1 else zero] for i in range(m)]
    g = [
        [p**k / math.prod((p - q for q in rest), start=one) for k in range(r)]
        for p, rest in zip(points, others, strict=True)
    ]
    b = [[*product(rest), zero] for rest in others]
    return a, [*g, [zero] * (r - 1) + [one]], [*b, product(points)]


@cache
def _source() -> str:
    """The sources, preceded by the `Transform<R>` definitions that they need."""

    def table(name: str, matrix: Matrix) -> str:
        rows = ", ".join("{" + ", ".join(f"{float(v)!r}f" for v in row) + "}" for row in matrix)
        return f"static constexpr float {name}[{len(matrix)}][{len(matrix[0])}] = {{{rows}}};"

    def turned(matrix: Matrix) -> Matrix:
        return [list(column) for column in zip(*matrix, strict=True)]

    text = "template <int R> struct Transform;\n"
    for r, (m, points) in WINOGRAD.items():
        a, g, b = cook_toom(m, r, [Fraction(p) for p in points.split()])
        named = {"A": a, "At": turned(a), "G": g, "Gt": turned(g), "B": b}
        tables = " ".join(table(name, matrix) for name, matrix in named.items())
        text += f"template <> struct Transform<{r}> {{ static constexpr int M = {m}, N = {m + r - 1}; {tables} }};\n"
    return text + "".join(source.read_text() for source in SOURCES)


def library_file() -> Path:
    """Path of the library compiled for this processor, which may not exist yet."""
    known = "\0".join([_source(), system.compiler("cpu") or "", _instructions(), *FLAGS])
    return compiled_folder() / f"kernels-{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"


def _instructions() -> str:
    """Instruction-set flags of this processor; processors with the same name may differ in them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return system.environment().cpu


@cache
def library() -> ctypes.CDLL:
    """The library for this processor, from the cache or compiled now by one process of a node while the others wait.

    Raises RuntimeError where there is no C++ compiler or compilation fails.
    """
    from filelock import FileLock

    file = library_file()
    with FileLock(file.with_suffix(".lock")):
        with contextlib.suppress(OSError):  # missing or corrupt
            return ctypes.CDLL(str(file))
        compiler = system.compiler("cpu")
        if compiler is None:
            raise RuntimeError("no C++ compiler on this machine; install g++ or set trial.compile=off")
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            # Some compilers lack OpenMP; on macOS a second OpenMP runtime beside PyTorch's aborts the process.
            for openmp in (["-fopenmp"], []) if sys.platform == "linux" else ([],):
                command = [compiler, *FLAGS, *openmp, "-x", "c++", "-", "-o", str(made)]
                try:
                    subprocess.run(command, input=_source(), capture_output=True, text=True, check=True)
                    loaded = ctypes.CDLL(str(made))
                    break
                except (OSError, subprocess.CalledProcessError) as error:
                    reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
            else:
                raise RuntimeError(f"{compiler} failed: {reason}")
            os.replace(made, file)
    return loaded


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Call function `name` of the library on dense CPU tensors and int64 numbers, with this process's threads."""
    assert all(t.device.type == "cpu" for t in arguments if isinstance(t, torch.Tensor))
    given: list[Any] = [
        ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_void_p(a if a is None else a.data_ptr())
        for a in (*arguments, torch.get_num_threads())
    ]
    getattr(library(), name)(*given)
