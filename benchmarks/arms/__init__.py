"""Arms of `python -m benchmarks.training`: each is a program that trains the trials of one ArmRequest."""
