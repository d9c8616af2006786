"""A quantized linear in memory, and the contract of every on-disk format that stores one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields

if TYPE_CHECKING:
    from torch import Tensor

BITS = 4  # of a quantized linear, unless it says otherwise
SYMMETRIC_ZERO = 2 ** (BITS - 1)  # 8, in 4 bits
# At this width zero points gain nothing, and GGUF's Q8_0 has none.
SYMMETRIC_BITS = 8
# The output head, among the names of quantized linears.
HEAD_LINEAR = "lm_head"
# What the engines' 4-bit kernels take as a group of input channels.
GROUP_SIZES = (16, 32, 64, 128, 256)
# Dtypes of unquantized tensors, as safetensors spells them.
FLOATS = ("F16", "BF16", "F32")


def symmetric_zero(bits: int) -> int:
    """Return the zero point of all values of a symmetric quantization to `bits`."""
    return 2 ** (bits - 1)


class TensorSpec(NamedTuple):
    """One tensor that must be there: torch shape, dtypes as safetensors spells them."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True)
class QuantScheme:
    """Quantized weights: one scale and zero point for `group_size` neighbouring input channels.

    Symmetric means that every zero point is 2^(bits−1), so that w = scale · (q − 8) in 4 bits.

    Args:
        linear_bits: of the linears that have other than `bits`, by full name (mixed precision); an
            output head, `lm_head`, is quantized only where it is among them.
    """

    group_size: int = 128
    symmetric: bool = False
    bits: int = BITS
    linear_bits: Mapping[str, int] = field(default_factory=dict, hash=False)

    def of(self, linear: str) -> QuantScheme:
        """Return the scheme of one linear, by its full name; 8 bits are always symmetric."""
        bits = self.linear_bits.get(linear, self.bits)
        return QuantScheme(self.group_size, self.symmetric or bits == SYMMETRIC_BITS, bits)

    @property
    def widths(self) -> set[int]:
        """Every number of bits that some linear has."""
        return {self.bits, *self.linear_bits.values()}

    @property
    def max_value(self) -> int:
        """The largest quantized value."""
        return 2**self.bits - 1

    @property
    def symmetric_zero(self) -> int:
        """The zero point of a symmetric quantization."""
        return symmetric_zero(self.bits)

    @property
    def bits_per_weight(self) -> float:
        """Storage of a weight with its share of the float16 scale and the zero point."""
        return self.bits + (16 + self.bits) / self.group_size


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization that a checkpoint's config names; engine files store these keys.

    Args:
        quant_method: value of that key in `quantization_config`.
        version: the `Packing.version` of the tensors.
        linear_bits: as in `QuantScheme`.
    """

    quant_method: str
    bits: int
    group_size: int
    zero_point: bool
    version: str
    linear_bits: Mapping[str, int] = field(default_factory=dict, hash=False)

    @property
    def layer_bits(self) -> set[int]:
        """Every number of bits that some linear of the layers has."""
        others = {bits for name, bits in self.linear_bits.items() if name != HEAD_LINEAR}
        return {self.bits, *others}

    @property
    def scheme(self) -> QuantScheme:
        return QuantScheme(self.group_size, not self.zero_point, self.bits, self.linear_bits)


@dataclass(frozen=True)
class QuantizedLinear:
    """W ≈ (q − zero) · scale per group of input channels; y = (x · prequant_scale) Wᵀ + bias.

    Args:
        q: uint8 [out, in], values 0..2^bits − 1.
        scale: float16 [out, in/group].
        zero: zero points, uint8 [out, in/group], values like `q`; 2^(bits−1) everywhere means
            symmetric.
        bias: float16 [out] or None.
        prequant_scale: float16 [in] or None.
        bits: of a quantized value.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None = None
    prequant_scale: Tensor | None = None
    bits: int = BITS

    def __post_init__(self) -> None:
        import torch

        assert self.q.dtype == self.zero.dtype == torch.uint8
        assert self.scale.dtype == torch.float16
        assert self.scale.shape == self.zero.shape
        assert self.q.shape[1] % self.scale.shape[1] == 0

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    @property
    def group_size(self) -> int:
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def symmetric(self) -> bool:
        return bool((self.zero == symmetric_zero(self.bits)).all())

    def cpu(self) -> QuantizedLinear:
        """Return the same in host memory."""
        bias, prequant = (
            None if tensor is None else tensor.cpu() for tensor in (self.bias, self.prequant_scale)
        )
        return replace(
            self,
            q=self.q.cpu(),
            scale=self.scale.cpu(),
            zero=self.zero.cpu(),
            bias=bias,
            prequant_scale=prequant,
        )

    def dequantize(self) -> Tensor:
        """Return the effective weight, float32 [out, in].

        Exact: 9 bits (8 and the sign) times 11 bits fit into 24.
        """
        groups = (
            self.q.unflatten(1, (-1, self.group_size)).float() - self.zero.unsqueeze(-1).float()
        )
        weight = (groups * self.scale.unsqueeze(-1).float()).flatten(1)
        return weight if self.prequant_scale is None else weight * self.prequant_scale.float()


class Packing(ABC):
    """How a quantized linear is stored in one on-disk format; reading a config needs no torch.

    Attributes:
        version: `QuantizationConfig.version` of checkpoints in this format.
        quant_method: value of that key in their `quantization_config`; empty where there is none.
        marker: the tensor, of those after a linear's name, that tells this format.
        tensors: all of them but the bias.
        widths: bits of a value that it can hold.
    """

    widths: ClassVar[tuple[int, ...]] = (BITS,)
    version: ClassVar[str]
    quant_method: ClassVar[str]
    marker: ClassVar[str]
    tensors: ClassVar[tuple[str, ...]]

    @abstractmethod
    def tensor_specs(
        self, rows: int, columns: int, group_size: int, bits: int = BITS, zero_point: bool = True
    ) -> Iterator[TensorSpec]:
        """Yield the tensors of a linear of `rows` output and `columns` input channels."""

    @abstractmethod
    def pack(self, linear: QuantizedLinear, zero_point: bool = True) -> dict[str, Tensor]:
        """Return the tensors of `linear`, by what follows its name; `bias` if there is one.

        Args:
            zero_point: False leaves zero points out where the format can.

        Raises:
            VilaDeployError: the format can't hold this linear.
        """

    @abstractmethod
    def unpack(
        self, tensors: Mapping[str, Tensor], group_size: int, bits: int = BITS
    ) -> QuantizedLinear:
        """Return what `pack` wrote, bit for bit.

        Raises:
            VilaDeployError: a tensor is missing, or its dtype or shape doesn't fit the others.
        """

    @abstractmethod
    def quantization_config(self, scheme: QuantScheme) -> dict[str, Any]:
        """Return `quantization_config` of a checkpoint in this format; empty for none."""

    @abstractmethod
    def read_config(self, fields: Fields) -> QuantizationConfig:
        """Return what `quantization_config` says.

        Raises:
            VilaDeployError: names the key whose value can't be read.
        """

    def check(self, scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
        """Raise VilaDeployError, before any work, for a scheme or sizes that don't fit.

        Args:
            linears: name → (out_features, in_features).
        """
        for bits in sorted(scheme.widths):
            if bits not in self.widths:
                raise _other_bits(self.version, bits, self.widths)

    def warning(self, scheme: QuantScheme) -> str | None:
        """Return, in a line, what the format's own reader can't do with such a quantization."""
        return None


def check_scheme(scheme: QuantScheme, linears: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a group size or a linear's shape that no format can hold, before any work.

    Args:
        linears: name → (out_features, in_features).

    Raises:
        VilaDeployError: names the first linear that doesn't fit and the group sizes that would.
    """
    widths = {in_features for _, in_features in linears.values()}
    fitting = [size for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
    choose = (
        f"choose --group-size {' or '.join(map(str, fitting))}"
        if fitting
        else (f"none of {', '.join(map(str, GROUP_SIZES))} divides the widths of this model")
    )
    if scheme.group_size not in GROUP_SIZES:
        raise VilaDeployError(
            f"group size {scheme.group_size} is not one of {', '.join(map(str, GROUP_SIZES))}",
            fix=choose,
        )
    for name, (out_features, in_features) in linears.items():
        if in_features % scheme.group_size:
            raise VilaDeployError(
                f"group size {scheme.group_size} does not divide its {in_features} input channels",
                where=name,
                fix=choose,
            )
        if out_features % 8:
            raise VilaDeployError(
                f"{out_features} output channels are not a multiple of 8",
                where=name,
                fix="AWQ GEMM packs 8 channels into a word; this model doesn't fit the format",
            )


def check_stored(tensors: Mapping[str, Tensor], specs: Iterable[TensorSpec], fix: str) -> None:
    """Compare the tensors of one linear with what its format asks for.

    Args:
        tensors: of one linear, by what follows its name.
        fix: what to do where one has another dtype or shape.

    Raises:
        VilaDeployError: names the first tensor that is missing or wrong.
    """
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    dtypes |= {
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
    }
    for name, shape, labels in specs:
        tensor = tensors.get(name)
        if tensor is None and name == "bias":
            continue
        tensor = stored(tensors, name)
        allowed = [dtypes[label] for label in labels]
        if tensor.dtype not in allowed or tuple(tensor.shape) != shape:
            raise VilaDeployError(
                f"must be {allowed[0]} {list(shape)}, found {tensor.dtype} {list(tensor.shape)}",
                where=name,
                fix=fix,
            )


def stored(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the tensor `name` of a linear; raise VilaDeployError where it is missing."""
    if name not in tensors:
        raise VilaDeployError("is missing", where=name, fix="download the checkpoint again")
    return tensors[name]


def no_prequant_scale(linear: QuantizedLinear, title: str) -> None:
    """Raise VilaDeployError if `linear` has a prequant scale, which the format `title` lacks."""
    if linear.prequant_scale is not None:
        raise VilaDeployError(
            f"{title} stores no prequant scale",
            fix="fold it into the previous operation or choose another format",
        )


def only_4_bits(linear: QuantizedLinear, title: str) -> None:
    """Raise VilaDeployError if `linear` is not in 4 bits, all that the format `title` holds."""
    if linear.bits != BITS:
        raise _other_bits(title, linear.bits)


def check_bits(linear: QuantizedLinear, title: str, widths: tuple[int, ...]) -> None:
    """Raise VilaDeployError if the format `title` has no values of as many bits as `linear`."""
    if linear.bits not in widths:
        raise _other_bits(title, linear.bits, widths)


def _other_bits(title: str, bits: int, widths: tuple[int, ...] = (BITS,)) -> VilaDeployError:
    held = " and ".join(f"{width}-bit" for width in widths)
    return VilaDeployError(
        f"{title} holds {held} values, found {bits} bits",
        fix="choose format compressed-tensors (4 and 8 bits) or gguf (4, 5 and 8)",
    )


def to_float16(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor` as float16, the dtype of every unquantized tensor in a quantized checkpoint.

    Raises:
        VilaDeployError: a value is too large for it.
    """
    half = tensor.half()
    if not bool(half.isfinite().all()):
        raise VilaDeployError(
            f"a value of {float(tensor.abs().max()):.3g} is too large for float16",
            where=name,
            fix="check that this checkpoint is not damaged",
        )
    return half


def pack_words(values: Tensor, order: Iterable[int] = range(8), bits: int = BITS) -> Tensor:
    """Return uint8 [rows, columns] as int32 [rows, columns · bits/32], along the columns.

    Args:
        order: part i (bits 4i..4i+3 for 4 bits) of a word holds the value of its column order[i].
        bits: a divisor of 32.
    """
    parts = values.contiguous().unflatten(1, (-1, 32 // bits))[..., list(order)[: 32 // bits]].int()
    words = parts[..., 0].clone()
    for i in range(1, 32 // bits):
        words |= parts[..., i] << (bits * i)
    return words.contiguous()


def unpack_words(words: Tensor, order: Iterable[int] = range(8), bits: int = BITS) -> Tensor:
    """Return what `pack_words` packed, uint8 [rows, columns]."""
    import torch

    values = torch.empty((*words.shape, 32 // bits), dtype=torch.uint8)
    for i, column in enumerate(list(order)[: 32 // bits]):
        values[..., column] = ((words >> (bits * i)) & (2**bits - 1)).byte()
    return values.flatten(1)
