"""Inference speed of the exported winner in every runtime, and checks that this project itself does not get slower."""
