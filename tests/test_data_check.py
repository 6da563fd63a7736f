"""The data check: which folder is which part, what was skipped, doubled or missing, and arrays of a wrong form."""

import contextlib
import os
import stat
import subprocess

import numpy as np
import pytest
from image_folders import load, made
from PIL import Image

from harness.config import BadInput, Data
from harness.data.dataset import Decoded, dataset_of
from harness.search.data_check import data_notes, gate_note


@pytest.fixture
def root(tmp_path):
    return made(tmp_path / "data")


def notes(root, **values) -> str:
    return "\n".join(data_notes(load(root, **values), None))


def in_parts(tmp_path, *parts):
    for number, part in enumerate(parts):
        made(tmp_path / "data" / part, seed=number)
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_a_validation_folder_is_the_validation_split(name, tmp_path):
    data = load(in_parts(tmp_path, "train", name))
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 24, 2)
    assert f"{name}/ is the validation split" in "\n".join(data.notes)
    whole = load(in_parts(tmp_path / "other", "training", name, "Test"))
    assert (len(whole.train), len(whole.validation), len(whole.test)) == (24, 24, 24)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (["train", "unseen"], r"unseen/ has class folders and would not be read; name it val or test"),
        (["train", "val", "dev"], r"dev and val could both be validation; rename one"),
        (["val", "test"], r"has val/, but no train/"),
        (["test"], r"has test/, but no train/"),
    ],
)
def test_folders_that_would_not_be_read(parts, said, tmp_path):
    with pytest.raises(BadInput, match=said):
        load(in_parts(tmp_path, *parts))


def test_classes_may_have_the_names_of_parts(tmp_path):
    assert load(made(tmp_path / "data", ("test", "dev"))).classes == ("dev", "test")


def test_what_is_skipped_is_counted(root):
    (root / "cat" / "._00.png").write_text("of macOS")
    (root / "cat" / ".thumbs").mkdir()
    (root / "dog" / "a.heic").touch()
    (root / "dog" / "readme.txt").touch()
    (root / "x.png").write_bytes((root / "cat" / "00.png").read_bytes())
    said = notes(root)
    for part in (
        "hidden files",
        "hidden folders",
        ".heic files, a format that is not read",
        "files that are no images by their names",
        "images in data/, outside of class folders",
    ):
        assert f"skipped {part}: 1" in said


def test_a_sibling_without_classes_is_reported(tmp_path):
    root = in_parts(tmp_path, "train")
    (root / "masks").mkdir()
    assert "skipped masks/ beside train/" in notes(root)


def test_a_folder_too_high_and_images_beside_the_parts_are_told(tmp_path):
    for number, part in enumerate(("train", "test")):
        made(tmp_path / "high" / "train" / part, seed=number)
    assert "the classes are called test and train: data.root may be a folder too high" in notes(tmp_path / "high")
    root = in_parts(tmp_path / "other", "train")
    (root / "loose.png").write_bytes((root / "train" / "cat" / "00.png").read_bytes())
    assert "skipped images in data/, beside its parts: 1" in notes(root)


def test_folders_nested_too_deeply(root):
    place = str(root / "cat")
    try:
        for _ in range(1500):
            place += "/a"
            os.mkdir(place)  # noqa: PTH102
    except OSError:  # the longest path of this system
        pass
    try:
        with contextlib.suppress(BadInput):  # refused, or read, but no other error
            load(root)
    finally:  # pytest's own removal of old folders would recurse too deeply
        subprocess.run(["rm", "-rf", str(root / "cat" / "a")], check=True)


def test_a_class_folder_that_is_not_utf8(root):
    (root / os.fsdecode(b"b\xffrd")).mkdir()
    with pytest.raises(BadInput, match="is not printable UTF-8; rename it"):
        load(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_class_folder_that_cannot_be_read(root):
    (root / "cat").chmod(0)
    with pytest.raises(BadInput, match=r"cat cannot be read \(Permission denied\)"):
        load(root)
    (root / "cat").chmod(stat.S_IRWXU)


def copied(root, *names, to):
    for name in names:
        content = Image.open(root / name)
        content.save(root / to.format(name=name.replace("/", "-")), compress_level=1)  # other bytes, equal pixels


def test_copies_stay_in_one_split(tmp_path):
    """Each image five times, in two formats: no validation or test image is trained on."""
    root = made(tmp_path / "data", count=30)
    for name in ("cat", "dog"):
        for path in sorted((root / name).glob("*.png")):
            for number in range(4):
                Image.open(path).save(root / name / f"{path.stem}-{number}.{'bmp' if number % 2 else 'png'}")
    data = load(root)
    digests = data.parts["train"][0]
    splits = [set(digests[split.rows].tolist()) for split in (data.train, data.validation, data.test)]
    assert [len(one) for one in splits] == [50, 6, 4]
    assert not splits[0] & (splits[1] | splits[2])
    assert not splits[1] & splits[2]
    assert "240 of 300 train images repeat another one" in "\n".join(data_notes(data, None))


def test_an_image_with_many_copies_does_not_fill_a_split(tmp_path):
    """A placeholder, say: 60 of 160 images."""
    root = made(tmp_path / "data", count=50)
    for number in range(60):
        Image.new("RGB", (8, 8), "grey").save(root / "cat" / f"none{number}.png")
    data = load(root)
    assert (len(data.validation), len(data.test)) == (16, 14)
    digests = data.parts["train"][0]
    for split in (data.validation, data.test):
        assert len(set(digests[split.rows].tolist())) == len(split)


def test_training_images_that_are_test_images_are_left_out(tmp_path):
    root = in_parts(tmp_path, "train", "test")
    for number in range(3):
        copied(root, f"test/cat/{number:02}.png", to="train/cat/copy-{name}")
    data = load(root)
    assert len(data.train) + len(data.validation) == 24
    assert "3 train images are also test images: they are left out of train" in notes(root)


def test_identical_train_and_test_parts_are_refused(tmp_path):
    root = tmp_path / "data"
    for part in ("train", "test"):
        made(root / part, seed=1)
    with pytest.raises(BadInput, match="class cat has no training image that is not also a validation or test image"):
        load(root)


def test_identical_validation_and_test_parts_are_refused(tmp_path):
    root = in_parts(tmp_path, "train")
    for part in ("val", "test"):
        made(root / part, seed=1)
    with pytest.raises(BadInput, match="all validation images are also in another part"):
        load(root)


def test_a_copy_in_another_class_is_a_conflict(root):
    copied(root, "cat/00.png", "cat/01.png", to="dog/{name}")
    data = load(root)
    assert "2 images have more than one class, such as cat and dog" in "\n".join(data_notes(data, None))
    digests = data.parts["train"][0]
    for split in (data.validation, data.test):  # not even under another label
        assert not set(digests[split.rows].tolist()) & set(digests[data.train.rows].tolist())


def test_imbalance_absent_classes_and_few_images(tmp_path):
    root = made(tmp_path / "data" / "train", ("cat",), count=100).parent
    made(root / "train2", ("dog", "fox"), count=5, seed=2)
    for name in ("dog", "fox"):
        (root / "train2" / name).rename(root / "train" / name)
    (root / "train2").rmdir()
    made(root / "test", ("cat", "dog"), count=8, seed=3)
    said = notes(root)
    assert "no test images of fox: test says nothing about them" in said
    assert "unbalanced: 90 training images of cat, 4 of dog; always answering cat is right for 50.0 %" in said
    assert "only 16 test images: an accuracy of theirs is uncertain by up to ±24 points" in said


def test_too_few_images_for_the_gate():
    assert gate_note(765, 0.005) is None
    assert "could, or a larger export.max_accuracy_drop" in (gate_note(764, 0.005) or "")
    assert "765 could" in (gate_note(25, 0.005) or "")
    assert "smaller than" in (gate_note(25, 0.0) or "")


GOOD = np.zeros((40, 8, 8, 3), np.uint8)
GOOD[:, 0, 0, 0] = np.arange(40)
LABELS = np.arange(40) % 2


@pytest.mark.parametrize(
    ("train", "test", "classes", "said"),
    [
        ((GOOD.astype(np.float32), LABELS), None, ("a", "b"), r"train images float32 \(40, 8, 8, 3\): give uint8"),
        ((GOOD[..., 0], LABELS), None, ("a", "b"), r"train images uint8 \(40, 8, 8\): give uint8 \[N, H, W, 3\]"),
        ((GOOD[:, :4], LABELS), None, ("a", "b"), "with H equal to W"),
        ((GOOD.tolist(), LABELS), None, ("a", "b"), "train images list"),
        ((GOOD, LABELS[:-1]), None, ("a", "b"), "40 train images, 39 labels"),
        ((GOOD, LABELS.astype(float)), None, ("a", "b"), "labels: give integers from 0 on"),
        ((GOOD, LABELS + 1), None, ("a", "b"), "train has the label 2; give labels from 0 to 1"),
        ((GOOD, LABELS - 1), None, ("a", "b"), "train has the label -1"),
        ((GOOD, LABELS), (GOOD[:2], LABELS[:2] + 5), ("a", "b"), "test has the label 5"),
        ((GOOD, LABELS), (np.zeros((2, 9, 9, 3), np.uint8), LABELS[:2]), ("a", "b"), "sides of 8 and 9 pixels"),
        ((GOOD[:0], LABELS[:0]), None, ("a", "b"), "0 train images, 0 labels"),
        ((GOOD, LABELS), None, ("a", "a"), "give different names"),
        ((GOOD, LABELS), None, (0, 1), "give different names"),
    ],
)
def test_an_own_data_set_of_a_wrong_form(train, test, classes, said):
    with pytest.raises(BadInput, match=said):
        dataset_of(Decoded(classes, train, test), Data(name="digits"))
