"""AutoAWQ's GEMM layout: eight 4-bit levels in an int32 along the output channels, interleaved."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vila_deploy.formats.base import BITS, QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError

TENSORS = ("qweight", "qzeros", "scales")
PER_WORD = 32 // BITS  # 8
# Nibble i (bits 4i..4i+3) of a word holds output channel 8·word + NIBBLE_ORDER[i].
NIBBLE_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear: qweight, qzeros, scales and, if there is one, bias.

    Returns:
        qweight int32 [in, out/8], qzeros int32 [in/group, out/8], scales float16 [in/group, out],
        bias float16 [out].

    Raises:
        VilaDeployError: `out` is no multiple of 8, or the linear has a prequant scale.
    """
    if linear.out_features % PER_WORD:
        raise VilaDeployError(
            f"AWQ GEMM packs {PER_WORD} output channels into a word, found "
            f"{linear.out_features} channels",
            fix=f"only linears whose out_features is a multiple of {PER_WORD} fit this format",
        )
    if linear.prequant_scale is not None:
        raise VilaDeployError(
            "AWQ GEMM has no place for a prequant scale",
            fix="fold it into the previous operation or choose another format",
        )
    tensors = {
        "qweight": _pack_words(linear.q.T),
        "qzeros": _pack_words(linear.zero.T),
        "scales": linear.scale.T.contiguous(),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(torch.float16)
    return tensors


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> QuantizedLinear:
    """What `pack` wrote, bit for bit.

    Raises:
        VilaDeployError: a tensor is missing, or its dtype or shape doesn't fit the others.
    """
    for name in TENSORS:
        if name not in tensors:
            raise VilaDeployError("is missing", where=name, fix="download the checkpoint again")
    qweight = tensors["qweight"]
    if qweight.ndim != 2 or group_size < 1 or qweight.shape[0] % group_size:
        raise VilaDeployError(
            f"shape {list(qweight.shape)} does not split into groups of {group_size} rows",
            where="qweight",
            fix="correct group_size in quantization_config",
        )
    groups, words = qweight.shape[0] // group_size, qweight.shape[1]
    for name, dtype, shape in (
        ("qweight", torch.int32, (qweight.shape[0], words)),
        ("qzeros", torch.int32, (groups, words)),
        ("scales", torch.float16, (groups, words * PER_WORD)),
        ("bias", torch.float16, (words * PER_WORD,)),
    ):
        found = tensors.get(name)
        if found is not None and (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise VilaDeployError(
                f"must be {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}",
                where=name,
                fix="this is not an AWQ GEMM checkpoint of that group size",
            )
    return QuantizedLinear(
        q=_unpack_words(qweight).T.contiguous(),
        scale=tensors["scales"].T.contiguous(),
        zero=_unpack_words(tensors["qzeros"]).T.contiguous(),
        bias=tensors.get("bias"),
    )


def _pack_words(levels: Tensor) -> Tensor:
    """uint8 [rows, out] → int32 [rows, out/8]."""
    nibbles = levels.contiguous().unflatten(1, (-1, PER_WORD))[..., NIBBLE_ORDER].to(torch.int32)
    words = nibbles[..., 0].clone()
    for i in range(1, PER_WORD):
        words |= nibbles[..., i] << (BITS * i)
    return words.contiguous()


def _unpack_words(words: Tensor) -> Tensor:
    """int32 [rows, out/8] → uint8 [rows, out]."""
    levels = torch.empty((*words.shape, PER_WORD), dtype=torch.uint8)
    for i, channel in enumerate(NIBBLE_ORDER):
        levels[..., channel] = ((words >> (BITS * i)) & 15).to(torch.uint8)
    return levels.flatten(1)
