"""The options of `vila-quantize`; importing them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vila_deploy.formats.scheme import QuantScheme

ALGORITHMS = ("awq-gptq", "awq", "rtn")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of a quantization; see `vila-quantize --help`.

    Args:
        evaluate: None: if it costs less than the quantization, that is with calibration data, or
            if `eval` names data.
        device: one of DEVICES; "auto" is the GPU if there is one with room.
    """

    scheme: QuantScheme = field(default_factory=QuantScheme)
    algorithm: str = "awq-gptq"
    calib: Path | None = None
    calib_images: Path | None = None
    seed: int = 0
    prompt_template: str | None = None
    formats: tuple[str, ...] = ("awq",)
    text_only: bool = False
    evaluate: bool | None = None
    eval: Path | None = None
    device: str = "auto"

    @property
    def calibrates(self) -> bool:
        """Whether the algorithm needs calibration data."""
        return self.algorithm != "rtn"

    @property
    def evaluates(self) -> bool:
        """Whether the result is compared with the original."""
        default = self.calibrates or self.eval is not None
        return default if self.evaluate is None else self.evaluate
