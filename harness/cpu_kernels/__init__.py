"""The project's own convolution, activation and pooling kernels for CPUs."""
