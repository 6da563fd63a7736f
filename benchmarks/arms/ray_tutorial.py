"""The plain trial inside Ray Tune, as in PyTorch's tutorial on hyperparameter tuning.

A function trainable that loads its own data, with eight loader workers and two CPUs per trial (and a GPU if the machine
has one); after each epoch it reports a pickled checkpoint with the metrics.
"""

import json
import pickle
import sys
import tempfile
from pathlib import Path

import ray
import torch
from ray import tune

from benchmarks.arms.measure import ArmRequest
from benchmarks.arms.plain_loop import train_plainly

LOADER_WORKERS = 8
CPUS = 2


def trainable(config: dict) -> None:
    request = ArmRequest.model_validate_json(config["request"])
    rows = []

    def report(row: dict, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        if row["epoch"] == int(row["epoch"]):
            with tempfile.TemporaryDirectory() as folder:
                with (Path(folder) / "data.pkl").open("wb") as file:
                    pickle.dump((row["epoch"], network.state_dict(), optimizer.state_dict()), file)
                tune.report({**row, "done_trial": {}}, checkpoint=tune.Checkpoint.from_directory(folder))

    done = train_plainly(request, config["seed"], LOADER_WORKERS, report)
    tune.report({"val_accuracy": done["val_accuracy"], "epoch": rows[-1]["epoch"], "done_trial": done})


def main(request: ArmRequest) -> None:
    ray.init(logging_level="error")
    gpus = 1 if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory() as folder:
        found = tune.Tuner(
            tune.with_resources(trainable, {"cpu": min(CPUS, ray.available_resources()["CPU"]), "gpu": gpus}),
            param_space={"seed": tune.grid_search(list(request.seeds)), "request": request.model_dump_json()},
            tune_config=tune.TuneConfig(metric="val_accuracy", mode="max"),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        ).fit()
    for result in found:
        assert result.metrics is not None, result.error
        print(json.dumps({"trial": result.metrics["done_trial"]}), flush=True)


if __name__ == "__main__":
    main(ArmRequest.model_validate_json(sys.argv[1]))
