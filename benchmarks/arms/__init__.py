"""What `python -m benchmarks.training` compares: each arm is a program that trains the trials of one Request."""
