"""Triton kernels of the native backend, each beside a reference of the same signature."""
