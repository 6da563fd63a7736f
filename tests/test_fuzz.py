"""Random configurations and files: whatever they hold, a reader answers with the contract's error or reads them.

A few hundred of each by default, 10,000 under `slow`. What was found is in the tables of the other tests.
"""

import contextlib
import io
import json
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.config import BadInput, Tune, plugins
from harness.config.command_line import split_arguments
from harness.config.keys import keys, read_values
from harness.data.decoding import Decoder
from harness.reporting.results import Results
from harness.run import checkpoints, storage, trust
from harness.run.directory import RunDirectory
from harness.run.manifest import Manifest
from harness.run.recommendation import Recommendation
from harness.run.records import RunRecord, TrialRecord
from harness.search.resolution import resolve

COUNTS = [pytest.param(200, id="few"), pytest.param(10_000, id="many", marks=pytest.mark.slow)]
TEXTS = ["", " ", "none", "true", "-1", "0", "1e400", "nan", "inf", "-inf", "1e-400", "[]", "[1,2]", "[[1]]", "{}"]
TEXTS += ['{"a":1}', "\x00", "\x1b[2J", "é", "\udcff", "../..", "/etc/passwd", "'", '"', "=", "a=b", "[", "]", "auto"]
TEXTS += ["~", "$HOME", "trial", "1.5", "0x10", "1_000", "None", "[none]", "[nan]", "\n", "\\", "%s", "{x}", "1,2"]
TEXTS += ["a" * 5000, "9" * 400]


def draws(seed):
    return random.Random(seed)


@pytest.mark.parametrize("count", COUNTS)
def test_command_lines(count):
    draw = draws(0)
    names = [key.name for key in keys(Tune)] + ["trial.options.x", "trial.options", "trial", "x", ""]
    for _ in range(count):
        arguments = [f"space={draw.choice([*plugins.names('tune_spaces'), *TEXTS])}"]
        arguments += [f"{draw.choice(names)}={draw.choice(TEXTS)}" for _ in range(draw.randint(0, 4))]
        with contextlib.suppress(BadInput, storage.Corrupt):
            resolve(read_values(split_arguments(arguments), Tune))


VALUES = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "a" * 3000,
    [],
    [[]],
    {},
    {"a": {}},
    [1, "a", None],
]


def mutated(value, draw):
    """A copy in which one place is something else, gone or new."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        action = draw.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != name}
        if action < 0.2:
            return {**value, draw.choice(["x", "", "id", "config", "\x1b"]): draw.choice(VALUES)}
        return {**value, name: mutated(value[name], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
    return draw.choice(VALUES)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["trial.json", "run.json", "manifest.json", "verdict.json"])
def test_sealed_json_of_other_content(kind, count, run, tmp_path):
    """Read, then used as the headline, the ranking and the check of code use it."""
    models = {
        "trial.json": TrialRecord,
        "run.json": RunRecord,
        "manifest.json": Manifest,
        "verdict.json": Recommendation,
    }
    (manifest,) = run.path.glob("exported/*/manifest.json")
    trial = run.trial_folder(manifest.parent.name) / "trial.json"
    path = {"trial.json": trial, "manifest.json": manifest}.get(kind, run.path / kind)
    original, draw = storage.read_json(path), draws(kind)
    (run.path / "run.copy.json").unlink()
    for number in range(count):
        value = original
        for _ in range(draw.randint(1, 3)):
            value = mutated(value, draw)
        if not isinstance(value, dict):
            continue
        storage.write_json(path, value)
        with contextlib.suppress(BadInput, storage.Corrupt):
            models.get(kind, Recommendation).read(path)
            if number % (count // 100) == 0:  # a hundred of them as commands use them
                trust.check_run(RunDirectory(run.path), False)
                Results.of(RunDirectory(run.path)).headline.lines  # noqa: B018


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["trial.json", "winner.json"])
def test_bytes_of_json(kind, count, run, tmp_path):
    """Flipped, cut, doubled."""
    path = run.winner_file if kind == "winner.json" else next(run.path.glob("trials/*/trial.json"))
    content, draw = path.read_bytes(), draws(kind)
    for _ in range(count):
        path.write_bytes(bytes(noise(content, draw)))
        with contextlib.suppress(BadInput, storage.Corrupt):
            storage.read_json(path)
            if kind == "winner.json":
                resolve({"space": str(path)})


def noise(content: bytes, draw) -> bytearray:
    found = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, len(found)))
        action = draw.random()
        if action < 0.6 and found:
            found[place] = draw.randrange(256)
        elif action < 0.8:
            del found[place:]
        else:
            found[place:place] = draw.randbytes(draw.randint(1, 30))
    return found


@pytest.mark.parametrize("count", COUNTS)
def test_tables(count, run):
    path = next(run.path.glob("trials/*/history.csv"))
    content, draw, name = path.read_bytes(), draws("csv"), path.parent.name
    for _ in range(count):
        path.write_bytes(bytes(noise(content, draw)))
        with contextlib.suppress(BadInput, storage.Corrupt):
            run.history(name)


@pytest.mark.parametrize("count", COUNTS)
def test_weights(count, run):
    path = next(run.path.glob("trials/*/model.safetensors"))
    content, draw = path.read_bytes(), draws("weights")
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    for number in range(count):
        changed = bytes(noise(content[:2000], draw)) + content[2000:3000]
        if number % 2:
            text = json.dumps(mutated(header, draw)).encode()
            changed = struct.pack("<Q", len(text)) + text + content[-3000:]
        path.write_bytes(changed)
        with contextlib.suppress(ValueError):
            checkpoints.load_weights(path)


@pytest.mark.parametrize("count", COUNTS)
def test_arrays(count, tmp_path):
    path, draw = tmp_path / "a.npy", draws("npy")
    storage.write_array(path, np.arange(6.0).reshape(2, 3))
    content = path.read_bytes()
    for _ in range(count):
        path.write_bytes(bytes(noise(content, draw)))
        with contextlib.suppress(storage.Corrupt):
            assert storage.read_array(path, (2, 3), "float64").shape == (2, 3)


@pytest.mark.parametrize("count", COUNTS)
def test_images(count, tmp_path):
    """In one process of the decoder: it neither ends nor writes outside of its file."""
    draw, formats = draws("images"), ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
    originals = {}
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    for name in formats:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, name)
        originals[name] = file.getvalue()
    paths = []
    for number in range(count):
        name = draw.choice(formats)
        path = tmp_path / f"{number}.{name.lower()}"
        path.write_bytes(bytes(noise(originals[name], draw)))
        paths.append(str(path))
    to = tmp_path / "pixels"
    to.write_bytes(bytes(count * 192))
    decoder = Decoder()
    try:
        found = decoder.read(paths, 8, True, to, 0)
    finally:
        decoder.close()
    assert to.stat().st_size == count * 192
    assert set(found.failed) <= set(paths)
    assert 0 < len(found.failed) < count


def test_the_fixture_is_a_copy(run, small_run):
    assert run.path != small_run[0]
    assert Path(run.path).is_dir()
    shutil.rmtree(run.path)
    assert small_run[0].is_dir()
