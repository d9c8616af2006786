"""compressed-tensors' "pack-quantized" layout: eight 4-bit levels in an int32 along the inputs.

Source: `PackedQuantizationCompressor` and its helpers in compressed-tensors 0.20. Levels and zero
points are stored as what their signed counterparts −8..7 become by adding 8, so as q and zero
themselves. With N output and K input channels and groups of G:

- weight_packed int32 [N, K/8]: nibble i (bits 4i..4i+3) of word [n, k] is the level [n, 8k + i].
- weight_scale float16 [N, K/G].
- weight_zero_point int32 [N/8, K/G]: nibble i of word [n, g] is the zero point [8n + i, g]; there
  is none if the quantization is symmetric.
- weight_shape int64 [2]: N, K.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vila_deploy.formats.base import (
    BITS,
    MAX_LEVEL,
    SYMMETRIC_ZERO,
    QuantizedLinear,
)
from vila_deploy.utils.errors import VilaDeployError

TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
PER_WORD = 32 // BITS


def pack(linear: QuantizedLinear, symmetric: bool) -> dict[str, Tensor]:
    """The tensors of one linear, and its bias if there is one.

    Args:
        symmetric: leave the zero points out, which must all be 8 then.

    Raises:
        VilaDeployError: channels that don't fill whole words, a prequant scale, or a zero point
            other than 8 in a symmetric quantization.
    """
    for size, what in ((linear.out_features, "output"), (linear.in_features, "input")):
        if size % PER_WORD:
            raise VilaDeployError(
                f"{size} {what} channels don't fill words of {PER_WORD}",
                where="weight_packed",
                fix="only linears of such sizes fit compressed-tensors here; choose another format",
            )
    if linear.prequant_scale is not None:
        raise VilaDeployError(
            "compressed-tensors has no place for a prequant scale",
            fix="fold it into the previous operation or choose another format",
        )
    tensors = {
        "weight_packed": _pack_words(linear.q),
        "weight_scale": linear.scale,
        "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _pack_words(linear.zero.T).T.contiguous()
    elif not linear.symmetric:
        raise VilaDeployError(
            f"must all be {SYMMETRIC_ZERO} in a symmetric quantization",
            where="zero points",
            fix="correct zero_point in quantization_config",
        )
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(torch.float16)
    return tensors


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> QuantizedLinear:
    """What `pack` or compressed-tensors wrote, bit for bit; scales may be bfloat16.

    Raises:
        VilaDeployError: a tensor is missing, its dtype, shape or content doesn't fit the others,
            or a bfloat16 scale that float16 can't hold.
    """
    for name in ("weight_packed", "weight_scale", "weight_shape"):
        if name not in tensors:
            raise VilaDeployError("is missing", where=name, fix="download the checkpoint again")
    words = tensors["weight_packed"]
    if words.ndim != 2 or group_size < 1 or words.shape[1] * PER_WORD % group_size:
        raise _unfit("weight_packed", f"{list(words.shape)} does not hold groups of {group_size}")
    rows, columns = words.shape[0], words.shape[1] * PER_WORD
    groups = columns // group_size
    for name, dtypes, shape in (
        ("weight_packed", (torch.int32,), (rows, columns // PER_WORD)),
        ("weight_scale", (torch.float16, torch.bfloat16), (rows, groups)),
        ("weight_zero_point", (torch.int32,), (rows // PER_WORD, groups)),
        ("weight_shape", (torch.int64,), (2,)),
        ("bias", (torch.float16, torch.bfloat16, torch.float32), (rows,)),
    ):
        found = tensors.get(name)
        if found is not None and (found.dtype not in dtypes or tuple(found.shape) != shape):
            raise _unfit(
                name, f"must be {dtypes[0]} {list(shape)}, found {found.dtype} {list(found.shape)}"
            )
    if tensors["weight_shape"].tolist() != [rows, columns]:
        says = tensors["weight_shape"].tolist()
        raise _unfit("weight_shape", f"says {says}, weight_packed holds {[rows, columns]}")
    packed_zero = tensors.get("weight_zero_point")
    if packed_zero is None:
        zero = torch.full((rows, groups), SYMMETRIC_ZERO, dtype=torch.uint8)
    else:
        zero = _unpack_words(packed_zero.T).T.contiguous()
    bias = tensors.get("bias")
    return QuantizedLinear(
        q=_unpack_words(words),
        scale=_exact_float16(tensors["weight_scale"]),
        zero=zero,
        bias=None if bias is None else bias.to(torch.float16),
    )


def _pack_words(levels: Tensor) -> Tensor:
    """uint8 [rows, columns] → int32 [rows, columns/8]."""
    nibbles = levels.contiguous().unflatten(1, (-1, PER_WORD)).to(torch.int32)
    words = nibbles[..., 0].clone()
    for i in range(1, PER_WORD):
        words |= nibbles[..., i] << (BITS * i)
    return words.contiguous()


def _unpack_words(words: Tensor) -> Tensor:
    """int32 [rows, columns/8] → uint8 [rows, columns]."""
    levels = torch.empty((*words.shape, PER_WORD), dtype=torch.uint8)
    for i in range(PER_WORD):
        levels[..., i] = ((words >> (BITS * i)) & MAX_LEVEL).to(torch.uint8)
    return levels.flatten(1)


def _exact_float16(scale: Tensor) -> Tensor:
    half = scale.to(torch.float16)
    if not torch.equal(half.float(), scale.float()):
        raise VilaDeployError(
            "holds bfloat16 scales that float16 can't hold",
            where="weight_scale",
            fix="run vila-quantize on the original checkpoint instead",
        )
    return half


def _unfit(name: str, what: str) -> VilaDeployError:
    return VilaDeployError(
        what, where=name, fix="this is not a pack-quantized checkpoint of that group size"
    )
