"""Quantize VILA checkpoints to 4 bits, build engines for them and measure their speed."""

__version__ = "0.1.0"
