"""A GPU that executes compiled kernels on the CPU, behind Triton's own compiler and launcher.

`python -m pytest -p tests.support.emulator.plugin tests/gpu` runs tests written for a GPU on it.
"""
