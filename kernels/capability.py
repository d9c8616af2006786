"""Compute capabilities, the generation of a GPU by which kernels and tiles are chosen."""

from __future__ import annotations

from typing import NamedTuple


class ComputeCapability(NamedTuple):
    """CUDA's compute capability of a GPU, e.g. (9, 0); compares by generation."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """Return the capability that `text` names, e.g. "9.0"."""
        major, minor = text.split(".")
        return cls(int(major), int(minor))

    @property
    def sm(self) -> int:
        """Number that compilers name it by, e.g. 90."""
        return 10 * self.major + self.minor

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


# Stands for Triton's interpreter, which runs kernels on a CPU.
INTERPRETER = ComputeCapability(0, 0)
