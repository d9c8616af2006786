"""Checks and times the GPU kernels: `python -m benchmarks.gpu` on the device, see README.md."""
