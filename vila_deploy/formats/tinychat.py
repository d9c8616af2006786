"""TinyChat's second weight format, as llm-awq's `*-v2.pt` files hold it.

Source: `WQLinear.from_linear`, `pack_intweight` and `calculate_zeros_width` in
awq/quantize/qmodule.py of mit-han-lab/llm-awq at d6e797a. With N output and K input channels and
groups of G:

- qweight int16 [N/4, K]: a word holds four values of one output channel. Nibble t (bits 4t..4t+3)
  of word [a, 64b + 16r + 8h + w] is the value [4a + r, 64b + 32h + 8t + w], with r 0..3, h 0..1,
  w 0..7: tiles of 4 rows and 64 columns.
- scales, scaled_zeros float16, or bfloat16 of a model quantized with `--dtype bfloat16`, [R, N],
  where rows K/G..R are 0 (`scale_rows` gives R). scaled_zeros = −(scale · zero), rounded to that
  dtype, so that w = q · scale + scaled_zeros.

Its checkpoints have no quantization_config: the file's name tells them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vila_deploy.formats.base import (
    BITS,
    Packing,
    QuantizationConfig,
    QuantizedLinear,
    QuantScheme,
    TensorSpec,
    check_stored,
    no_prequant_scale,
    only_4_bits,
    stored,
)
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "-v2.pt"  # of the file of weights
# Group size → what the number of blocks of 8 groups is a multiple of.
GROUP_SIZES = {128: 1, 64: 2, 32: 4}
KERNEL_GROUP_SIZE = 128
FLOATS = ("F16", "BF16")
GROUPS_PER_BLOCK = 8
ROW_MULTIPLE, ROWS_PER_TILE, COLUMNS_PER_TILE = 8, 4, 64
NIBBLES = 4
LARGEST = QuantScheme().max_value  # 15
# How far from an integer a zero point may lie that the dtype of the file has rounded: 15 · 2⁻¹⁰ in
# float16, even if the scale that it was multiplied with was rounded apart from it, and 15 · 2⁻⁸ in
# bfloat16.
ZERO_TOLERANCES = {"torch.float16": 1 / 32, "torch.bfloat16": 1 / 8}
FIX = "this is not a TinyChat v2 checkpoint of that group size; download it again"


def scale_rows(in_features: int, group_size: int) -> int:
    """Return the rows of scales and scaled_zeros, those for padding included."""
    multiple = GROUP_SIZES[group_size]
    blocks = -(-(in_features // group_size) // GROUPS_PER_BLOCK)
    return -(-blocks // multiple) * multiple * GROUPS_PER_BLOCK


def group_size_of(in_features: int, rows: int) -> int | None:
    """Return the group size with which `in_features` channels need `rows` rows; None for none.

    At most one fits: each halving of the group size doubles the rows.
    """
    fitting = (size for size in GROUP_SIZES if in_features % size == 0)
    return next((size for size in fitting if scale_rows(in_features, size) == rows), None)


class TinychatV2(Packing):
    """TinyChat, llm-awq's own runtime; VILA's AWQ releases are in it."""

    version = "tinychat-v2"
    quant_method = ""
    marker = "scaled_zeros"
    tensors = ("qweight", "scales", "scaled_zeros")

    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        table = (scale_rows(columns, group_size), rows)
        yield TensorSpec("qweight", (rows * bits // 16, columns), ("I16",))
        yield TensorSpec("scales", table, FLOATS)
        yield TensorSpec("scaled_zeros", table, FLOATS)

    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        """Return the tensors of one linear.

        Raises:
            VilaDeployError: sizes that don't fill the tiles, a prequant scale, or a scale that is
                not positive or overflows float16 once multiplied with its zero point.
        """
        _check_sizes(linear.out_features, linear.in_features, linear.group_size)
        only_4_bits(linear, "TinyChat")
        no_prequant_scale(linear, "TinyChat")
        # As the original: float16 times float32, rounded once.
        scaled_zero = -(linear.scale.float() * linear.zero.float()).half()
        if not bool((linear.scale > 0).all() and scaled_zero.isfinite().all()):
            raise VilaDeployError(
                "TinyChat needs positive scales, with scale · zero within float16",
                where="scales",
                fix="quantize these weights again",
            )
        rows = scale_rows(linear.in_features, linear.group_size)
        tensors = {
            "qweight": _pack_tiles(linear.q),
            "scales": _pad_rows(linear.scale.T, rows),
            "scaled_zeros": _pad_rows(scaled_zero.T, rows),
        }
        if linear.bias is not None:
            tensors["bias"] = linear.bias.half()
        return tensors

    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        """Return what `pack` or llm-awq wrote, bit for bit.

        The zero point is round(−scaled_zeros / scale). TinyChat's kernels add scaled_zeros as
        stored, so their w = q · scale + scaled_zeros differs from (q − zero) · scale by what
        was rounded off the product: at most scale · zero · 2⁻¹¹ in float16, · 2⁻⁸ in bfloat16.
        A bfloat16 scale is a float16 too, unless it is below float16's smallest normal number.

        Raises:
            VilaDeployError: names the tensor that is missing, of another dtype or shape, or whose
                values no zero point in 0..15 gives.
        """
        qweight = stored(tensors, "qweight")
        if qweight.ndim != 2:
            raise _unfit("qweight", f"must have 2 dimensions, found {list(qweight.shape)}")
        out_features, in_features = NIBBLES * qweight.shape[0], qweight.shape[1]
        _check_sizes(out_features, in_features, group_size)
        specs = self.tensor_specs(out_features, in_features, group_size)
        check_stored(tensors, (*specs, TensorSpec("bias", (out_features,), FLOATS)), FIX)
        if tensors["scales"].dtype != tensors["scaled_zeros"].dtype:
            raise _unfit("scaled_zeros", f"must be {tensors['scales'].dtype} like the scales")
        groups = in_features // group_size
        for name in ("scales", "scaled_zeros"):
            if bool(tensors[name][groups:].any()):
                raise _unfit(name, f"must be 0 in the rows after the {groups} groups")
        scale = tensors["scales"][:groups].T.contiguous()
        zero, bias = _zero_points(scale, tensors["scaled_zeros"][:groups].T), tensors.get("bias")
        return QuantizedLinear(
            q=_unpack_tiles(qweight),
            scale=_as_float16(scale),
            zero=zero,
            bias=None if bias is None else bias.half(),
        )

    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        return {}

    def read_config(self, fields: Fields) -> QuantizationConfig:
        raise AssertionError("TinyChat has no quantization_config")

    def check(self, scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
        super().check(scheme, linears)
        for name, (rows, columns) in linears.items():
            try:
                _check_sizes(rows, columns, scheme.group_size)
            except VilaDeployError as error:
                raise VilaDeployError(error.what, where=name, fix=error.fix) from error

    def warning(self, scheme: QuantScheme) -> str | None:
        if scheme.group_size == KERNEL_GROUP_SIZE:
            return None
        return (
            f"TinyChat's kernels compute groups of {KERNEL_GROUP_SIZE} only: it lays out groups of "
            f"{scheme.group_size} like this, but can't run them"
        )


TINYCHAT_V2 = TinychatV2()


def _as_float16(scale: Tensor) -> Tensor:
    halved = scale.half()
    if not bool((halved.isfinite() & (halved > 0)).all()):
        raise _unfit("scales", "must lie within float16")
    return halved


def _zero_points(scale: Tensor, scaled_zeros: Tensor) -> Tensor:
    """Both float16 or bfloat16 [out, in/group] → uint8 of the same shape."""
    if not bool((scale > 0).all()):
        raise _unfit("scales", "must be positive for every group")
    ratio = -scaled_zeros.float() / scale.float()
    zero = ratio.round()
    # Negated, so that NaN is refused too.
    tolerance = ZERO_TOLERANCES[str(scale.dtype)]
    wrong = ~((ratio - zero).abs() <= tolerance) | (zero < 0) | (zero > LARGEST)
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        raise _unfit(
            "scaled_zeros",
            f"must be −scale times an integer in 0..{LARGEST}, found "
            f"{float(ratio[row, group]):.4g} for channel {row}, group {group}",
        )
    return zero.byte().contiguous()


def _check_sizes(out_features: int, in_features: int, group_size: int) -> None:
    """Raise VilaDeployError for a linear that the tiles don't hold."""
    if group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"TinyChat has groups of {', '.join(map(str, GROUP_SIZES))}, found {group_size}",
            fix="choose one of these group sizes or another format",
        )
    for size, multiple, side in (
        (out_features, ROW_MULTIPLE, "output"),
        (in_features, max(COLUMNS_PER_TILE, group_size), "input"),
    ):
        if not size or size % multiple:
            raise VilaDeployError(
                f"{size} {side} channels are not a multiple of {multiple}, as TinyChat's tiles "
                f"with groups of {group_size} need",
                where="qweight",
                fix="only linears of such sizes fit this format",
            )


def _pack_tiles(q: Tensor) -> Tensor:
    """uint8 [out, in] → int16 [out/4, in]."""
    tiles = q.reshape(-1, ROWS_PER_TILE, q.shape[1] // COLUMNS_PER_TILE, 2, NIBBLES, 8)
    nibbles = tiles.permute(0, 2, 1, 3, 5, 4).short()  # a, b, r, h, w, t
    words = nibbles[..., 0].clone()
    for t in range(1, NIBBLES):
        words |= nibbles[..., t] << (BITS * t)
    return words.reshape(q.shape[0] // ROWS_PER_TILE, q.shape[1])


def _unpack_tiles(qweight: Tensor) -> Tensor:
    """int16 [out/4, in] → uint8 [out, in]."""
    import torch

    rows, columns = qweight.shape
    tiles = columns // COLUMNS_PER_TILE
    words = qweight.reshape(rows, tiles, ROWS_PER_TILE, 2, 8)
    values = torch.empty(rows, ROWS_PER_TILE, tiles, 2, NIBBLES, 8, dtype=torch.uint8)
    for t in range(NIBBLES):
        values[..., t, :] = ((words >> (BITS * t)) & LARGEST).transpose(1, 2).byte()
    return values.reshape(ROWS_PER_TILE * rows, columns)


def _pad_rows(table: Tensor, rows: int) -> Tensor:
    padded = table.new_zeros(rows, table.shape[1])
    padded[: table.shape[0]] = table
    return padded


def _unfit(name: str, what: str) -> VilaDeployError:
    return VilaDeployError(what, where=name, fix=FIX)
