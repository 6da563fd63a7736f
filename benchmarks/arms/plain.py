"""Trains an ArmRequest in plain PyTorch, one trial after another; prints each validation and trial as a JSON line."""

import json
import sys

from benchmarks.arms.measure import ArmRequest
from benchmarks.arms.plain_loop import train_plainly


def main(request: ArmRequest) -> None:
    for seed in request.seeds:
        done = train_plainly(request, seed, request.loader_workers, lambda row, *_: print(json.dumps(row), flush=True))
        print(json.dumps({"trial": done}), flush=True)


if __name__ == "__main__":
    main(ArmRequest.model_validate_json(sys.argv[1]))
