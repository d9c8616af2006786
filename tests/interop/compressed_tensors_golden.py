"""Makes tests/golden/compressed_tensors.json with compressed-tensors; numbers only.

pip install torch compressed-tensors==0.20.0
python tests/interop/compressed_tensors_golden.py tests/golden/compressed_tensors.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def case(symmetric: bool) -> dict[str, object]:
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(0, 16, (8, 32), generator=generator)
    zero = torch.randint(0, 16, (8, 2), generator=generator)
    zero = torch.full_like(zero, 8) if symmetric else zero
    scale = (torch.randint(1, 9, (8, 2), generator=generator) / 64).half()
    weight = ((q.unflatten(1, (2, 16)) - zero[..., None]) * scale[..., None].float()).flatten(1)
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=16)
    made = BaseCompressor.get_value_from_registry("pack-quantized").compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8) - 8},
        QuantizationScheme(targets=["Linear"], weights=args),
    )
    tensors = {name: [str(t.dtype), t.tolist()] for name, t in made.items()}
    return {"symmetric": symmetric, "q": q.tolist(), "zero": zero.tolist(),
            "scale": scale.tolist(), "tensors": tensors}  # fmt: skip


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([case(False), case(True)]) + "\n", "utf-8")
