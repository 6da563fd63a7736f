"""What a trial is given of a machine or a cluster."""

import pytest

from harness.config import Resources
from harness.errors import BadInput
from harness.share import Share


def share(nodes, trials, **resources):
    found = Share.of(Resources(**resources), nodes, trials)
    return found.request["cpu"], found.request["gpu"], found.threads


@pytest.mark.parametrize(
    ("nodes", "trials", "resources", "expected"),
    [
        ([{"CPU": 2}], 8, {}, (1, 0, 1)),
        ([{"CPU": 2}], 1, {}, (2, 0, 2)),
        ([{"CPU": 16}], 4, {}, (4, 0, 4)),
        ([{"CPU": 1}, {"CPU": 1}], 1, {}, (1, 0, 1)),  # no node has two
        ([{"CPU": 16, "GPU": 4}], 8, {}, (4, 1, 4)),
        ([{"CPU": 16, "GPU": 1}], 8, {"gpus_per_trial": 0.25}, (4, 0.25, 4)),
        ([{"CPU": 16, "GPU": 1}], 8, {"gpus_per_trial": 0}, (2, 0, 2)),
        ([{"CPU": 64}, {"CPU": 4, "GPU": 1}], 1, {}, (4, 1, 4)),  # the head has CPUs, the other one the GPU
        ([{"CPU": 8}], 8, {"concurrency": 2}, (4, 0, 4)),
        ([{"CPU": 8}], 8, {"cpus_per_trial": 3}, (3, 0, 3)),
    ],
)
def test_share(nodes, trials, resources, expected):
    assert share(nodes, trials, **resources) == expected


@pytest.mark.parametrize(
    "resources", [{"cpus_per_trial": 9}, {"gpus_per_trial": 2}, {"gpus_per_trial": 1, "cpus_per_trial": 5}]
)
def test_more_than_any_node_has(resources):
    with pytest.raises(BadInput, match="ask for less"):
        share([{"CPU": 8}, {"CPU": 4, "GPU": 1}], 2, **resources)
