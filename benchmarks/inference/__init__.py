"""The inference benchmark of a run's exported models."""
