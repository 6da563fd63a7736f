"""One step's parts against plain formulas and PyTorch's own."""

import pytest
import torch
from torch import nn

from harness.config import Augmentation, Normalization, Optimizer, Schedule, Trial
from harness.data.augmentation import Draws, augment
from harness.data.batches import DeviceSplit, Normalizer
from harness.training.execution import ExecutionPlan
from harness.training.schedules import learning_rate_factor
from harness.training.step import make_step

CPU = torch.device("cpu")


@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_normalizer(memory_format):
    images = torch.randint(0, 256, (4, 5, 6, 3), dtype=torch.uint8)
    normalization = Normalization(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
    found = Normalizer(normalization, CPU, memory_format)(images)
    mean, std = (torch.tensor(v)[:, None, None] for v in (normalization.mean, normalization.std))
    expected = (images.permute(0, 3, 1, 2).double() / 255 - mean) / std
    assert torch.allclose(found.double(), expected, atol=1e-5)
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
    assert found.is_contiguous(memory_format=formats[memory_format])


def test_augment_flips_and_crops_each_image_on_its_own():
    trial = Trial(augmentation=Augmentation(flip=True, crop_padding=2))
    images = torch.randint(1, 256, (40, 8, 8, 3), dtype=torch.uint8)
    draws = Draws.of(torch.arange(40), trial, seed=3)
    found = augment(images, draws, 2)
    assert 0 < draws.flips.sum() < 40
    assert draws.shifts.min() == 0
    assert draws.shifts.max() == 4
    for i in range(40):
        image = images[i].flip(1) if draws.flips[i] else images[i]
        padded = nn.functional.pad(image, (0, 0, 2, 2, 2, 2))
        top, left = draws.shifts[i].tolist()
        assert torch.equal(found[i], padded[top : top + 8, left : left + 8])


def test_draws_cover_each_row_once_and_follow_the_seed():
    trial = Trial()
    rows = torch.arange(100, 150)
    one, same, other = (Draws.of(rows, trial, seed) for seed in (1, 1, 2))
    assert sorted(one.rows.tolist()) == rows.tolist()
    assert torch.equal(one.rows, same.rows)
    assert not torch.equal(one.rows, other.rows)
    assert one.flips is None
    assert one.shifts is None


@pytest.mark.parametrize("total", [10, 33, 1000])
def test_one_cycle_is_that_of_pytorch(total):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total)
    for step in range(total):
        factor = learning_rate_factor(Schedule(name="one_cycle"), step, total, 10)
        assert 0.1 * factor == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        if step + 1 < total:
            reference.step()


def test_other_schedules():
    def rates(name, warmup=0.0):
        return [learning_rate_factor(Schedule(name=name, warmup_epochs=warmup), s, 100, 10) for s in range(100)]

    assert rates("constant") == [1.0] * 100
    linear = rates("linear")
    assert linear[0] == 1.0
    assert linear[50] == pytest.approx(0.5)
    assert linear[99] == pytest.approx(0.01)
    assert rates("cosine")[50] == pytest.approx(0.5)
    warm = rates("constant", 1.0)
    assert warm[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert warm[10:] == [1.0] * 90


@pytest.mark.parametrize(
    "optimizer",
    [
        Optimizer(name="sgd", lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        Optimizer(name="adam", lr=0.1, weight_decay=0.01),
        Optimizer(name="adamw", lr=0.1, weight_decay=0.01),
    ],
    ids=lambda o: o.name,
)
def test_step_is_plain_pytorch(optimizer):
    trial = Trial(
        optimizer=optimizer, precision="float32", compile="off", batch_size=8, label_smoothing=0.1, gradient_clip=0.5
    )
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    twin = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    twin.load_state_dict(network.state_dict())
    step = make_step(network, trial, ExecutionPlan.of(trial, CPU), CPU)
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimizer.name]
    options = {"momentum": 0.9, "nesterov": True} if optimizer.name == "sgd" else {}
    reference = kind(twin.parameters(), lr=0.1, weight_decay=0.01, **options)
    for number in range(5):
        images = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8)
        labels = torch.randint(0, 3, (8,))
        rate = 0.1 / (number + 1)
        rows = torch.arange(8)
        sums = step(DeviceSplit(images, labels, rows), Draws(rows, None, None), rate)
        inputs = (images.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        logits = twin(inputs)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        reference.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        reference.param_groups[0]["lr"] = rate
        reference.step()
        assert sums[0].item() == pytest.approx(8 * loss.item(), rel=1e-5)
        assert sums[1].item() == (logits.argmax(1) == labels).sum()
    for own, other in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(own, other, atol=1e-6)
