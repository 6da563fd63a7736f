"""The trials of a run, and how Ray Tune runs them."""
