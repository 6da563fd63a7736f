"""Training one trial: the loop, its step, evaluation, checkpoints, and how steps are executed."""
