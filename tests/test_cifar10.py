"""CIFAR-10's archive: where it comes from, and that nothing in it is unpickled before its digest is right."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from harness.config import BadInput, Data
from harness.data.dataset import dataset_identity, load_dataset
from harness.data.datasets import cifar10
from harness.data.datasets.cifar10 import ARCHIVE


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A CIFAR-10 archive of the real form, with 20 images a batch, that passes for the real one."""
    import hashlib

    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    listed = {}

    def add(tar, name, content):
        info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
        listed[name] = hashlib.md5(content).hexdigest()

    path = tmp_path / ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            pixels = generator.integers(0, 255, (20, 3072), dtype=np.uint8)
            add(tar, name, pickle.dumps({"data": pixels, "labels": [i % 10 for i in range(20)]}))
        add(tar, "batches.meta", pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", listed[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", listed["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": listed["batches.meta"]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar10, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_cifar10_from_its_archive(archive):
    data = load_dataset(Data(name="cifar10", root=archive.parent))
    assert (len(data.train), len(data.validation), len(data.test)) == (90, 10, 20)
    assert data.train.images.shape == (100, 32, 32, 3)
    assert data.classes[3] == "class 3"
    assert list(archive.parent.glob("*10*")) == [archive]  # nothing is unpacked there


def test_nothing_is_downloaded_into_a_folder_that_was_named(tmp_path, monkeypatch):
    """Somebody else's run.json may have named it."""
    monkeypatch.setattr(cifar10, "SHA256", "0" * 64)
    with pytest.raises(BadInput, match=r"new: has no cifar-10-python\.tar\.gz; put it there, or leave data\.root out"):
        dataset_identity(Data(name="cifar10", root=tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_cifar10_is_not_unpickled_before_its_digest_is_right(archive, monkeypatch):
    archive.write_bytes(archive.read_bytes()[:-10] + b"0123456789")
    monkeypatch.setattr(pickle, "load", lambda *arguments, **options: pytest.fail("unpickled"))
    with pytest.raises(BadInput, match="has SHA-256"):
        load_dataset(Data(name="cifar10", root=archive.parent))


def test_cifar10_without_network_names_the_ways_out(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(cifar10, "SHA256", "0" * 64)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    with pytest.raises(BadInput, match=r"put it into data\.root=DIR, or use data\.name=digits .* data\.name=images"):
        dataset_identity(Data(name="cifar10"))
