"""TinyChat's second weight layout, as llm-awq's `*-v2.pt` files hold it.

Source: `WQLinear.from_linear`, `pack_intweight` and `calculate_zeros_width` in
awq/quantize/qmodule.py of mit-han-lab/llm-awq at d6e797a. With N output and K input channels and
groups of G:

- qweight int16 [N/4, K]: a word holds four levels of one output channel. Nibble t (bits 4t..4t+3)
  of word [a, 64b + 16r + 8h + w] is the level [4a + r, 64b + 32h + 8t + w], with r 0..3, h 0..1,
  w 0..7: tiles of 4 rows and 64 columns.
- scales, scaled_zeros float16 [R, N], where rows K/G..R are 0 (`scale_rows` gives R).
  scaled_zeros = −(scale · zero), rounded to float16, so that w = q · scale + scaled_zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vila_deploy.formats.base import MAX_LEVEL, QuantizedLinear
from vila_deploy.utils.errors import VilaDeployError

TENSORS = ("qweight", "scales", "scaled_zeros")
# Group size → what the number of blocks of 8 groups is a multiple of.
GROUP_SIZES = {128: 1, 64: 2, 32: 4}
GROUPS_PER_BLOCK = 8
ROW_MULTIPLE, ROWS_PER_TILE, COLUMNS_PER_TILE = 8, 4, 64
NIBBLES = 4
# A zero point that float16 rounded lies within 15 · 2⁻¹⁰ of an integer, even if the scale that it
# was multiplied with was rounded apart from it.
ZERO_TOLERANCE = 1 / 32


def scale_rows(in_features: int, group_size: int) -> int:
    """Rows of scales and scaled_zeros, those for padding included."""
    multiple = GROUP_SIZES[group_size]
    blocks = -(-(in_features // group_size) // GROUPS_PER_BLOCK)
    return -(-blocks // multiple) * multiple * GROUPS_PER_BLOCK


def group_size_of(in_features: int, rows: int) -> int | None:
    """The group size with which `in_features` channels need `rows` rows; None if there is none.

    At most one fits: each halving of the group size doubles the rows.
    """
    fitting = (size for size in GROUP_SIZES if in_features % size == 0)
    return next((size for size in fitting if scale_rows(in_features, size) == rows), None)


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of one linear: qweight, scales, scaled_zeros and, if there is one, bias.

    Returns:
        qweight int16 [out/4, in], scales and scaled_zeros float16 [R, out], bias float16 [out].

    Raises:
        VilaDeployError: sizes that don't fill the tiles, a prequant scale, or a scale that is not
            positive or overflows float16 once multiplied with its zero point.
    """
    check_sizes(linear.out_features, linear.in_features, linear.group_size)
    if linear.prequant_scale is not None:
        raise VilaDeployError(
            "TinyChat has no place for a prequant scale",
            fix="fold it into the previous operation or choose another format",
        )
    # As the original: float16 times float32, rounded once.
    scaled_zero = -(linear.scale.float() * linear.zero.float()).to(torch.float16)
    if not bool((linear.scale > 0).all() and scaled_zero.isfinite().all()):
        raise VilaDeployError(
            "TinyChat needs positive scales, with scale · zero within float16",
            where="scales",
            fix="quantize these weights again",
        )
    rows = scale_rows(linear.in_features, linear.group_size)
    tensors = {
        "qweight": _pack_levels(linear.q),
        "scales": _pad_rows(linear.scale.T, rows),
        "scaled_zeros": _pad_rows(scaled_zero.T, rows),
    }
    if linear.bias is not None:
        tensors["bias"] = linear.bias.to(torch.float16)
    return tensors


def unpack(tensors: Mapping[str, Tensor], group_size: int) -> QuantizedLinear:
    """What `pack` or llm-awq wrote, bit for bit.

    The zero point is round(−scaled_zeros / scale). TinyChat's kernels add scaled_zeros as stored,
    so their w = q · scale + scaled_zeros differs from (q − zero) · scale by what float16 rounded
    off the product: at most scale · zero · 2⁻¹¹.

    Raises:
        VilaDeployError: names the tensor that is missing, of another dtype or shape, or whose
            values no zero point in 0..15 gives.
    """
    for name in TENSORS:
        if name not in tensors:
            raise VilaDeployError("is missing", where=name, fix="download the checkpoint again")
    qweight = tensors["qweight"]
    if qweight.ndim != 2:
        raise _unfit("qweight", f"must have 2 dimensions, found {list(qweight.shape)}")
    out_features, in_features = NIBBLES * qweight.shape[0], qweight.shape[1]
    check_sizes(out_features, in_features, group_size)
    table = (scale_rows(in_features, group_size), out_features)
    for name, dtype, shape in (
        ("qweight", torch.int16, tuple(qweight.shape)),
        ("scales", torch.float16, table),
        ("scaled_zeros", torch.float16, table),
        ("bias", torch.float16, (out_features,)),
    ):
        found = tensors.get(name)
        if found is not None and (found.dtype, tuple(found.shape)) != (dtype, shape):
            raise _unfit(
                name, f"must be {dtype} {list(shape)}, found {found.dtype} {list(found.shape)}"
            )
    groups = in_features // group_size
    for name in ("scales", "scaled_zeros"):
        if bool(tensors[name][groups:].any()):
            raise _unfit(name, f"must be 0 in the rows after the {groups} groups")
    scale = tensors["scales"][:groups].T.contiguous()
    return QuantizedLinear(
        q=_unpack_levels(qweight),
        scale=scale,
        zero=_zero_points(scale, tensors["scaled_zeros"][:groups].T),
        bias=tensors.get("bias"),
    )


def _zero_points(scale: Tensor, scaled_zeros: Tensor) -> Tensor:
    """Both float16 [out, in/group] → uint8 of the same shape."""
    if not bool((scale > 0).all()):
        raise _unfit("scales", "must be positive for every group")
    ratio = -scaled_zeros.float() / scale.float()
    zero = ratio.round()
    # Negated, so that NaN is refused too.
    wrong = ~((ratio - zero).abs() <= ZERO_TOLERANCE) | (zero < 0) | (zero > MAX_LEVEL)
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        raise _unfit(
            "scaled_zeros",
            f"must be −scale times an integer in 0..{MAX_LEVEL}, found "
            f"{float(ratio[row, group]):.4g} for channel {row}, group {group}",
        )
    return zero.to(torch.uint8).contiguous()


def check_sizes(out_features: int, in_features: int, group_size: int) -> None:
    """Raises VilaDeployError for a linear that the tiles don't hold."""
    if group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"TinyChat has groups of {', '.join(map(str, GROUP_SIZES))}, found {group_size}",
            fix="choose one of these group sizes or another format",
        )
    for size, multiple, what in (
        (out_features, ROW_MULTIPLE, "output"),
        (in_features, max(COLUMNS_PER_TILE, group_size), "input"),
    ):
        if not size or size % multiple:
            raise VilaDeployError(
                f"{size} {what} channels are not a multiple of {multiple}, as TinyChat's layout "
                f"with groups of {group_size} needs",
                where="qweight",
                fix="only linears of such sizes fit this format",
            )


def _pack_levels(q: Tensor) -> Tensor:
    """uint8 [out, in] → int16 [out/4, in]."""
    tiles = q.reshape(-1, ROWS_PER_TILE, q.shape[1] // COLUMNS_PER_TILE, 2, NIBBLES, 8)
    nibbles = tiles.permute(0, 2, 1, 3, 5, 4).to(torch.int16)  # a, b, r, h, w, t
    words = nibbles[..., 0].clone()
    for t in range(1, NIBBLES):
        words |= nibbles[..., t] << (4 * t)
    return words.reshape(q.shape[0] // ROWS_PER_TILE, q.shape[1])


def _unpack_levels(qweight: Tensor) -> Tensor:
    """int16 [out/4, in] → uint8 [out, in]."""
    rows, columns = qweight.shape
    tiles = columns // COLUMNS_PER_TILE
    words = qweight.reshape(rows, tiles, ROWS_PER_TILE, 2, 8)
    levels = torch.empty(rows, ROWS_PER_TILE, tiles, 2, NIBBLES, 8, dtype=torch.uint8)
    for t in range(NIBBLES):
        levels[..., t, :] = ((words >> (4 * t)) & MAX_LEVEL).transpose(1, 2).to(torch.uint8)
    return levels.reshape(ROWS_PER_TILE * rows, columns)


def _pad_rows(table: Tensor, rows: int) -> Tensor:
    padded = table.new_zeros(rows, table.shape[1])
    padded[: table.shape[0]] = table
    return padded


def _unfit(name: str, what: str) -> VilaDeployError:
    fix = "this is not a TinyChat v2 checkpoint of that group size; download it again"
    return VilaDeployError(what, where=name, fix=fix)
