"""Packed weights written out as float16: exactly what PyTorch makes of them."""

from __future__ import annotations

import pytest
import torch

from tests.support.kernel_cases import generator, random_packed, unwritten
from vila_deploy.kernels.dequantize import dequantize, dequantize_reference


@pytest.mark.parametrize(
    ("rows", "columns", "group", "bits"),
    [(40, 192, 64, 4), (16, 80, 16, 4), (33, 320, 32, 4), (20, 768, 256, 4), (17, 300, 128, 8)],
)
def test_equals_pytorch_bit_for_bit(rows: int, columns: int, group: int, bits: int) -> None:
    weight = random_packed(rows, columns, bits, generator(rows), group)
    y = unwritten(rows, columns)
    dequantize(weight, y)()
    assert torch.equal(y, dequantize_reference(weight))
