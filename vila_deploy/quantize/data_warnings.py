"""Warn of calibration and evaluation data, and of formats, that may disappoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vila_deploy.data.drawn_scenes import SCENES
from vila_deploy.data.examples import Example
from vila_deploy.formats.registry import FORMATS
from vila_deploy.quantize.options import QuantizeOptions


def data_warnings(
    options: QuantizeOptions, calibration: Sequence[Example], held_out: Sequence[Example]
) -> list[str]:
    """Return warnings about the data and the formats; print them on stderr too, a line each."""
    warnings = list[str]()
    user_images = {p.name for e in calibration for p in e.images} - {s.name for s in SCENES}
    if options.text_only and calibration:
        warnings.append(
            "calibrated without images (--text-only): answers about images may suffer most"
        )
    elif options.calib and not user_images:
        warnings.append(
            "no image among the calibration data: the built-in drawings stand in; "
            "give your own with --calib-images"
        )
    seen = {(e.turns, e.text, e.answer) for e in calibration}
    overlap = sum((e.turns, e.text, e.answer) in seen for e in held_out if not e.images or e.answer)
    if overlap:
        warnings.append(
            f"{overlap} of {len(held_out)} evaluation examples were calibrated on: the figures are "
            "better than on new data"
        )
    by_format = (FORMATS[name].packing.warning(options.scheme) for name in options.formats)
    warnings += filter(None, by_format)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return warnings
