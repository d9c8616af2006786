"""A made-up on-disk format: all that a new one takes besides its row in FORMATS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vila_deploy.formats.base import (
    BITS,
    Packing,
    QuantizationConfig,
    QuantizedLinear,
    QuantScheme,
    TensorSpec,
    check_stored,
    stored,
)
from vila_deploy.formats.registry import Format
from vila_deploy.utils.fields import Fields


class MadeUp(Packing):
    """Values in int16, transposed and negated; zero points beside their scales."""

    version = "made-up-v1"
    quant_method = "made-up"
    marker = "codes"
    tensors = ("codes", "steps", "offsets")

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        groups = columns // group_size
        yield TensorSpec("codes", (columns, rows), ("I16",))
        yield TensorSpec("steps", (rows, groups), ("F16",))
        yield TensorSpec("offsets", (rows, groups), ("I16",))

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        tensors = {
            "codes": -linear.q.T.to(torch.int16).contiguous(),
            "steps": linear.scale,
            "offsets": linear.zero.to(torch.int16),
        }
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = 4
    ) -> QuantizedLinear:
        columns, rows = stored(tensors, "codes").shape
        check_stored(tensors, self.tensor_specs(rows, columns, group_size), "write it again")
        return QuantizedLinear(
            q=(-tensors["codes"].T).to(torch.uint8).contiguous(),
            scale=tensors["steps"],
            zero=tensors["offsets"].to(torch.uint8),
            bias=tensors.get("bias"),
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "group": scheme.group_size}

    def read_config(self, fields: Fields) -> QuantizationConfig:
        return QuantizationConfig(
            self.quant_method, BITS, fields.integer("group"), True, self.version
        )

    def warning(self, scheme: QuantScheme) -> str | None:
        return "nobody reads made-up" if scheme.group_size == 64 else None


MADE_UP = MadeUp()
ROW = Format("Made-up", "tests.support.made_up_format:MADE_UP")
