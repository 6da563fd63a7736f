"""The CPUs and GPUs that each trial gets."""

from collections.abc import Sequence

from harness.config import BadInput, Resources
from harness.run.gpus import usable


class Allocation:
    """The CPUs (number of threads) and GPUs of one trial, and the number of concurrent trials."""

    def __init__(self, cpus: float, gpus: float, at_once: int):
        self.request = {"cpu": cpus, "gpu": gpus}
        self.at_once = at_once  # concurrent trials
        self.threads = max(1, int(cpus))
        self.device = "cuda" if gpus else "cpu"

    @classmethod
    def of(cls, resources: Resources, nodes: Sequence[dict[str, float]], trials: int) -> "Allocation":
        """The configured allocation; by default one GPU each if any node has one, and CPUs shared by concurrent trials.

        `nodes`: resources by Ray's names. Raises BadInput where no node has enough (Ray would wait for ever), and where
        PyTorch sees GPUs here but no node offers one (trials would silently run on the CPU).
        """
        most_gpus = max(node.get("GPU", 0) for node in nodes)
        gpus = resources.gpus_per_trial
        if gpus is None:
            if not most_gpus and (here := usable()):
                raise BadInput(
                    f"resources.address: no node of the cluster offers a GPU, but PyTorch sees {here} here; start Ray "
                    f"with --num-gpus={here}, or give resources.gpus_per_trial=0 to train on CPUs"
                )
            gpus = 1.0 if most_gpus else 0.0
        if gpus > most_gpus:
            raise BadInput(f"resources.gpus_per_trial={gpus:g}: no node has more than {most_gpus:g} GPUs; ask for less")
        fitting = [node for node in nodes if node.get("GPU", 0) >= gpus]
        most_cpus = max(node.get("CPU", 0) for node in fitting)
        at_once = min(trials, resources.concurrency or trials)
        if gpus:
            at_once = min(at_once, max(1, int(sum(node.get("GPU", 0) for node in fitting) / gpus)))
        share = sum(node.get("CPU", 0) for node in fitting) // max(at_once, 1)
        cpus = resources.cpus_per_trial or min(most_cpus, max(1.0, share))
        if cpus > most_cpus:
            raise BadInput(
                f"resources.cpus_per_trial={cpus:g}: no node that fits has more than {most_cpus:g} CPUs; ask for less"
            )
        by_cpu = sum(int(node.get("CPU", 0) / cpus) for node in fitting)
        return cls(cpus, gpus, max(1, min(at_once, by_cpu)))
