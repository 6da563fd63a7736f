"""Decoding, splitting, caching; and what is wrong with a user's folder is said in one line."""

import numpy as np
import pytest
from conftest import TOP, command
from PIL import Image

from harness.config import BadInput, Data, plugins
from harness.data.dataset import load_dataset
from harness.data.splits import Dataset


@pytest.fixture
def folder(tmp_path):
    """Two classes of 12 images of 8x8, without a test part."""
    tmp_path = tmp_path / "data"
    tmp_path.mkdir()
    generator = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(12):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            pixels[..., c] = 255
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.png")
    return tmp_path


def images(root, **values) -> Dataset:
    return load_dataset(Data(name="images", root=root, **values))


@pytest.mark.parametrize("name", plugins.names("harness.data.datasets"))
def test_every_data_set_has_the_form(name):
    for function in ("identity", "decode"):
        assert callable(plugins.load("harness.data.datasets", name, function))


def test_digits():
    data = load_dataset(Data(name="digits"))
    assert data.train.images.shape[1:] == (32, 32, 3)
    assert data.train.images.dtype == np.uint8
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert data.classes == tuple("0123456789")
    rows = [set(part.rows.tolist()) for part in (data.train, data.validation, data.test)]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_validation_is_a_tenth_of_each_class(folder):
    data = images(folder)
    assert np.bincount(data.validation.labels[data.validation.rows]).tolist() == [1, 1]
    assert (len(data.train), len(data.test)) == (20, 2)


def test_split_follows_its_seed(folder):
    one, same, other = images(folder), images(folder), images(folder, split_seed=1)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.validation.rows.tolist() == same.validation.rows.tolist()


def test_limit_takes_the_first_of_each_class(folder):
    data = images(folder, limit=5)
    kept = np.concatenate([data.train.rows, data.validation.rows, data.test.rows])
    assert sorted(kept.tolist()) == [0, 1, 2, 3, 4, 12, 13, 14, 15, 16]
    assert data.fingerprint != images(folder).fingerprint


def test_fingerprint_is_of_the_content(folder, tmp_path):
    import shutil

    copy = tmp_path / "copied"
    for name in ("cat", "dog"):
        shutil.copytree(folder / name, copy / name)
    assert images(copy).fingerprint == images(folder).fingerprint
    Image.new("RGB", (8, 8), "red").save(copy / "cat" / "00.png")
    assert images(copy).fingerprint != images(folder).fingerprint


def test_every_kind_of_image_becomes_rgb(folder):
    place = folder / "cat"
    for path in place.iterdir():
        path.unlink()
    Image.new("L", (8, 8), 100).save(place / "0.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE).save(place / "1.png")
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(place / "2.png")
    Image.new("RGBA", (8, 8), (200, 100, 50, 255)).save(place / "3.png")
    Image.new("RGB", (8, 8), (0, 0, 255)).save(place / "4.JPG", quality=95)
    Image.new("1", (8, 8), 1).save(place / "5.png")
    found = images(folder, validation=0.2).train.images[:6, 4, 4].astype(int)
    assert found[[0, 1, 2, 3, 5]].tolist() == [[100] * 3, [10, 20, 30], [0] * 3, [200, 100, 50], [255] * 3]
    assert np.abs(found[4] - [0, 0, 255]).max() < 10  # JPEG


def test_resize_on_request(folder):
    Image.new("RGB", (20, 10)).save(folder / "cat" / "odd.png")
    with pytest.raises(BadInput, match=r"odd\.png is 20x10.*give data\.size=N"):
        images(folder)
    assert images(folder, size=16).input_size == 16


def test_test_folder_is_used(folder):
    for part in ("train", "test"):
        (folder / part).mkdir()
    for name in ("cat", "dog"):
        (folder / name).rename(folder / "train" / name)
        (folder / "test" / name).mkdir()
        Image.new("RGB", (8, 8)).save(folder / "test" / name / "x.png")
    data = images(folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 2)
    Image.new("RGB", (8, 8)).save(folder / "test" / "cat" / "y.png")
    (folder / "test" / "bird").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "test" / "bird" / "x.png")
    with pytest.raises(BadInput, match=r"that train has not \(bird\)"):
        images(folder)


def test_many_images_are_decoded_in_parallel(folder, monkeypatch):
    alone = images(folder)
    monkeypatch.setattr("harness.data.datasets.images.IN_ONE_PROCESS", 1)
    monkeypatch.setattr("harness.data.datasets.images.CHUNK", 5)
    (folder / "cat" / "00.png").touch()  # another identity, so decoded again
    seen = []
    parallel = load_dataset(Data(name="images", root=folder), lambda done, total: seen.append((done, total)))
    assert parallel.fingerprint == alone.fingerprint
    assert seen[-1] == (24, 24)


def test_decoded_once(folder, monkeypatch):
    images(folder)
    monkeypatch.setattr("harness.data.datasets.images.decode", lambda *arguments: pytest.fail("decoded again"))
    images(folder)


def test_an_edited_decode_decodes_again(tmp_path):
    """Also where `identity` says the same; a comment changes nothing."""
    (tmp_path / "scaling.py").write_text("FACTOR = 2\n")
    (tmp_path / "own.py").write_text(OWN)
    data = Data(name=str(tmp_path / "own.py"))
    assert load_dataset(data).train.images.max() == 78
    (tmp_path / "own.py").write_text(OWN + "# says nothing\n")
    assert load_dataset(data).train.images.max() == 78
    (tmp_path / "own.py").write_text(OWN.replace("* FACTOR", "* FACTOR + 1"))
    assert load_dataset(data).train.images.max() == 79
    (tmp_path / "scaling.py").write_text("FACTOR = 3\n")
    code = "import sys; from harness import Data; from harness.data.dataset import load_dataset; "
    code += "print(load_dataset(Data(name=sys.argv[1])).train.images.max())"
    assert command("-c", code, str(tmp_path / "own.py"), cwd=TOP).stdout == "118\n"


OWN = """
import numpy as np
from scaling import FACTOR
from harness.data.dataset import Decoded
def identity(data):
    return "v1"
def decode(data, progress):
    images = np.zeros((40, 8, 8, 3), np.uint8) + (np.arange(40, dtype=np.uint8) * FACTOR)[:, None, None, None]
    return Decoded(("a", "b"), (images, np.arange(40) % 2), None)
"""


def test_killed_decode_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="no space"):
        images(folder)
    monkeypatch.undo()
    assert len(images(folder).train) == 20


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "cat" / "00.png").write_text("<html>"), r"cannot be read: cat/00\.png \(no PNG"),
        (
            lambda f: (f / "cat" / "00.png").write_bytes((f / "cat" / "01.png").read_bytes()[:60]),
            r"cannot be read: cat/00\.png \(",
        ),
        (lambda f: (f / "empty").mkdir(), r"no images in .*empty"),
        (lambda f: [p.unlink() for p in sorted((f / "cat").iterdir())[2:]], "class cat has"),
    ],
)
def test_what_is_wrong_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(BadInput, match=message):
        images(folder)


def test_one_class_is_no_data_set(folder):
    for path in (folder / "dog").iterdir():
        path.unlink()
    (folder / "dog").rmdir()
    with pytest.raises(BadInput, match="one class only"):
        images(folder)


def test_missing_folder(tmp_path):
    for root, message in (
        (tmp_path / "none", "no such folder"),
        (None, "needs data.root"),
        (tmp_path, "no class folders"),
    ):
        with pytest.raises(BadInput, match=message):
            images(root)


def test_larger_than_the_disk_is_refused(folder, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match=r"data\.size: 24 images of 9x9 need .* GiB are free"):
        images(folder, size=9)


@pytest.mark.cifar10
@pytest.mark.slow
def test_real_cifar10_images(cifar10_folder):
    data = images(cifar10_folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    assert data.classes[0] == "airplane"
    assert np.bincount(data.validation.labels[data.validation.rows]).tolist() == [500] * 10


def test_chosen_classes():
    """Only they are there, in the order that was asked for, and it is another data set."""
    whole, some = load_dataset(Data(name="digits")), load_dataset(Data(name="digits", classes=["7", "3"]))
    assert some.classes == ("7", "3")
    for name in ("train", "validation", "test"):
        part, all_of_it = getattr(some, name), getattr(whole, name)
        assert set(part.labels[part.rows]) == {0, 1}
        original = all_of_it.labels[part.rows]  # rows are the same images
        assert set(original[part.labels[part.rows] == 0]) == {7}
        assert set(original[part.labels[part.rows] == 1]) == {3}
        assert len(part) == np.isin(all_of_it.labels[all_of_it.rows], (3, 7)).sum()
    assert some.fingerprint != whole.fingerprint
    assert some.fingerprint != load_dataset(Data(name="digits", classes=["3", "7"])).fingerprint
    limited = load_dataset(Data(name="digits", classes=["7", "3"], limit=20))
    assert len(limited.train) + len(limited.validation) + len(limited.test) <= 3 * 2 * 20


@pytest.mark.parametrize(("classes", "told"), [(["7", "x"], "no such class"), (["7", "7"], "given twice")])
def test_classes_that_cannot_be(classes, told):
    with pytest.raises(BadInput, match=told):
        load_dataset(Data(name="digits", classes=classes))


@pytest.mark.slow
def test_a_script_without_a_main_guard_decodes_many_images(folder, tmp_path):
    """Processes that run the script again would wait for the lock of their parent, which waits for them."""
    script = f"""
import harness.data.datasets.images as images
from harness import Data, Trial, train
images.IN_ONE_PROCESS, images.CHUNK = 1, 5
options = {{"widths": [4], "hidden": [4], "kernel_size": 3}}
trial = Trial(architecture="baseline", options=options, epochs=1, batch_size=4)
print(train(trial, Data(name="images", root="{folder}")).status)
"""
    (tmp_path / "script.py").write_text(script)
    cache = {"HARNESS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(TOP)}
    done = command("script.py", cwd=tmp_path, timeout=60, **cache)
    assert done.stdout == "finished\n", done.stderr


@pytest.mark.slow
def test_decoding_takes_little_memory(folder, tmp_path):
    """The pixels are more than any of the processes may take."""
    for name in ("cat", "dog"):
        for number in range(200):
            Image.new("RGB", (8, 8), (number, 0, ord(name[0]))).save(tmp_path / "data" / name / f"{number}.png")
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef build(num_classes):\n    return nn.Sequential(nn.Conv2d(3, 8, 16, stride=16), "
        "nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    code = "import resource, runpy; resource.setrlimit(resource.RLIMIT_DATA, (1_200_000_000, 1_200_000_000)); "
    code += "runpy.run_module('harness.tune', run_name='__main__')"
    words = ["space=quick", "trial.architecture=net.py", "data.name=images", f"data.root={tmp_path}/data"]
    words += ["data.size=1024", "trial.batch_size=2", "dry_run=true"]
    done = command("-c", code, *words, cwd=tmp_path, HARNESS_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy")) > 1.25e9


@pytest.mark.slow
def test_the_c_locale(tmp_path):
    """Names of classes and files that are not ASCII, where no language is set."""
    for name in ("é", "ü-日本"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, len(name), 0)).save(tmp_path / "data" / name / f"ö{number}.png")
    words = ["space=quick", "data.name=images", "data.root=data", "run=ré", "stages=[search,report]"]
    words += ["search.samples=1", "trial.epochs=1", "trial.batch_size=8"]
    locale = {"LC_ALL": "C", "LANG": "", "PYTHONIOENCODING": ""}
    done = command("-m", "harness.tune", *words, cwd=tmp_path, **locale)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ü-日本" in (tmp_path / "ré" / "report" / "index.html").read_text(encoding="utf-8")
