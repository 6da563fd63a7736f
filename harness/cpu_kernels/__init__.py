"""Convolutions, activations and poolings of our own, for CPUs."""
