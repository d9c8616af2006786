"""The options of `vila-quantize`; importing them needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vila_deploy.formats.base import BITS, SYMMETRIC_BITS, QuantScheme
from vila_deploy.formats.registry import FORMATS
from vila_deploy.quantize.layer_range import LayerRange
from vila_deploy.utils.errors import VilaDeployError, check_choice

ALGORITHMS = ("awq-gptq", "awq", "rtn")
DEVICES = ("auto", "cpu", "cuda")
# What --bits-per-weight gives bits to beside the linears of the LLM's layers.
LM_HEAD, VISION = MODULES = ("lm-head", "vision")
# In place of a path to held-out data: this package's own; its name in version 0.1.0 was "shipped".
BUILTIN, OLD_BUILTIN = "builtin", "shipped"


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of a quantization; see `vila-quantize --help`.

    Args:
        evaluate: None: if it costs less than the quantization, that is with calibration data, or
            if `eval` names data.
        device: one of DEVICES; "auto" is the GPU if there is one with room.
        lora: the folder of an adapter to merge into the checkpoint first.
        layers: the only ones to quantize, into the work folder that `--resume` joins; None: all.
        bits_per_weight: mean bits of a quantized value, scales not counted, for mixed precision;
            None: 4 for all.
        keep_fp16: of MODULES, those that `bits_per_weight` leaves in float16.
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
    lora: Path | None = None
    layers: LayerRange | None = None
    bits_per_weight: float | None = None
    keep_fp16: tuple[str, ...] = ()

    @property
    def calibrates(self) -> bool:
        """Whether the algorithm, or the choice of bits, needs calibration data."""
        return self.algorithm != "rtn" or self.bits_per_weight is not None

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that a linear may have: those that every format holds, if there is a choice."""
        if self.bits_per_weight is None:
            return (BITS,)
        held = [set(FORMATS[name].packing.widths) for name in self.formats]
        return tuple(sorted(set.intersection(*held)))

    @property
    def evaluates(self) -> bool:
        """Whether the result is compared with the original."""
        if self.layers is not None:
            return False
        default = self.calibrates or self.eval is not None
        return default if self.evaluate is None else self.evaluate


def quantize_options(
    *,
    algorithm: str,
    group_size: int,
    symmetric: bool,
    calib: str | Path | None,
    calib_images: str | Path | None,
    text_only: bool,
    eval: str | Path | None,
    no_eval: bool,
    formats: tuple[str, ...],
    device: str,
    prompt_template: str | None,
    seed: int,
    lora: str | Path | None,
    layers: str | None = None,
    bits_per_weight: float | None = None,
    keep_fp16: Sequence[str] = (),
) -> QuantizeOptions:
    """Return the options that flags of `vila-quantize`, or keywords of the same names, ask for.

    Raises:
        VilaDeployError: an unknown value, or two options that contradict each other.
    """
    check_choice("--algorithm", algorithm, ALGORITHMS)
    check_choice("--device", device, DEVICES)
    for name in formats:
        check_choice("--format", name, FORMATS)
    _check_bits(bits_per_weight, keep_fp16, formats, divided=layers is not None)
    if algorithm == "rtn" and bits_per_weight is None and (calib or calib_images):
        raise VilaDeployError(
            "--calib and --calib-images are of no use to --algorithm rtn", fix="leave them out"
        )
    if text_only and calib_images:
        raise VilaDeployError(
            "--text-only leaves out the images of --calib-images", fix="give one of the two"
        )
    if no_eval and eval:
        raise VilaDeployError(
            "--no-eval leaves nothing for --eval to do", fix="give one of the two"
        )
    if layers is not None:
        _check_layers(algorithm, compares=no_eval or eval is not None)
    return QuantizeOptions(
        scheme=QuantScheme(group_size, symmetric),
        algorithm=algorithm,
        calib=None if calib is None else Path(calib),
        calib_images=None if calib_images is None else Path(calib_images),
        seed=seed,
        prompt_template=prompt_template,
        formats=formats,
        text_only=text_only,
        evaluate=False if no_eval else True if eval else None,
        eval=None if eval is None or str(eval) in (BUILTIN, OLD_BUILTIN) else Path(eval),
        device=device,
        lora=None if lora is None else Path(lora),
        layers=None if layers is None else LayerRange.parse(layers),
        bits_per_weight=bits_per_weight,
        keep_fp16=tuple(sorted({*keep_fp16})),
    )


def _check_bits(
    bits_per_weight: float | None,
    keep_fp16: Sequence[str],
    formats: tuple[str, ...],
    *,
    divided: bool,
) -> None:
    """Refuse a budget that no choice of bits meets, and formats that hold 4 bits only."""
    for name in keep_fp16:
        check_choice("--keep-fp16", name, MODULES)
    if keep_fp16 and bits_per_weight is None:
        raise VilaDeployError(
            "--keep-fp16 is for --bits-per-weight, without which head and tower stay fp16",
            fix="leave it out",
        )
    if bits_per_weight is None:
        return
    if not BITS <= bits_per_weight <= SYMMETRIC_BITS:
        raise VilaDeployError(
            f"--bits-per-weight must be from {BITS} to {SYMMETRIC_BITS}, found {bits_per_weight:g}",
            fix="it is the mean over the linears of the LLM's layers; scales come on top",
        )
    if divided:
        raise VilaDeployError(
            "--bits-per-weight chooses among all layers, --layers takes some",
            fix="give one of the two",
        )
    for name in formats:
        if FORMATS[name].packing.widths == (BITS,):
            raise VilaDeployError(
                f"--bits-per-weight needs a format with other bits than {BITS}, {name} has none",
                fix="give --format compressed-tensors (4 and 8 bits) or gguf (4, 5 and 8)",
            )


def _check_layers(algorithm: str, *, compares: bool) -> None:
    if algorithm == "awq-gptq":
        raise VilaDeployError(
            "--layers can't divide awq-gptq, which feeds each layer what the quantized ones before "
            "it give",
            fix="give --algorithm awq or rtn, or leave out --layers",
        )
    if compares:
        raise VilaDeployError(
            "--layers writes no checkpoint to compare with the original",
            fix="give --eval and --no-eval to the run with --resume that joins the layers",
        )
