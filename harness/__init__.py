"""A benchmarking harness for image classifiers: distributed trials, honest comparison, checked and measured export."""

__version__ = "0.1.0"
