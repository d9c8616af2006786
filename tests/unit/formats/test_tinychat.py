"""TinyChat's v2 layout against llm-awq's own packing, and against its description, word by word.

golden/tinychat.json holds what llm-awq gave and the recipe for its inputs.
"""

import hashlib
import json

import numpy as np
import pytest
import torch

from tests.support.paths import GOLDEN
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.tinychat import TINYCHAT_V2, group_size_of, scale_rows
from vila_deploy.utils.errors import VilaDeployError

GOLDEN = json.loads((GOLDEN / "tinychat.json").read_text())
DTYPES = {"qweight": "<i2", "scales": "<f2", "scaled_zeros": "<f2"}


def sizes_of(case):
    sizes, group = case.split("g")
    rows, columns = sizes.split("x")
    return int(rows), int(columns), int(group)


def recipe(case):
    """The inputs of `packed` and `digests`, as the golden file describes them."""
    rows, columns, group = sizes_of(case)
    n = torch.arange(rows)[:, None]
    k, g = torch.arange(columns)[None], torch.arange(columns // group)[None]
    return QuantizedLinear(
        q=((n * n * 31 + k * 17 + n * k // 7) % 16).to(torch.uint8),
        scale=((1 + (n * 389 + g * 1013) % 1021) / 8192).half(),
        zero=((n * 3 + g * 7) % 16).to(torch.uint8),
    )


def golden_tensors(kind, case):
    rows, columns, group = sizes_of(case)
    table = (scale_rows(columns, group), rows)
    tensors = {}
    for name, text in GOLDEN[kind][case].items():
        array = np.frombuffer(bytes.fromhex(text), DTYPES[name]).copy()
        shape = (rows // 4, columns) if name == "qweight" else table
        tensors[name] = torch.from_numpy(array).reshape(shape)
    return tensors


def stored_bytes(tensors):
    """Bit for bit: unlike equality this tells 0 from -0."""
    return {name: tensors[name].numpy().astype(kind).tobytes() for name, kind in DTYPES.items()}


def random_linear(rows, columns, group, seed=0, bias=False):
    rng = torch.Generator().manual_seed(seed)
    groups = columns // group
    return QuantizedLinear(
        q=torch.randint(0, 16, (rows, columns), generator=rng, dtype=torch.uint8),
        scale=torch.rand((rows, groups), generator=rng).half() + 0.01,
        zero=torch.randint(0, 16, (rows, groups), generator=rng, dtype=torch.uint8),
        bias=torch.randn(rows, generator=rng).half() if bias else None,
    )


def same(one, other):
    return all(torch.equal(getattr(one, n), getattr(other, n)) for n in ("q", "scale", "zero"))


@pytest.mark.parametrize("case", GOLDEN["packed"])
def test_packs_and_unpacks_as_llm_awq(case):
    linear, tensors = recipe(case), golden_tensors("packed", case)
    packed = TINYCHAT_V2.pack(linear)
    assert all(tensor.is_contiguous() for tensor in packed.values())
    assert stored_bytes(packed) == stored_bytes(tensors)
    assert same(TINYCHAT_V2.unpack(tensors, sizes_of(case)[2]), linear)


@pytest.mark.parametrize("case", GOLDEN["digests"])
def test_packs_larger_linears_as_llm_awq(case):
    packed = stored_bytes(TINYCHAT_V2.pack(recipe(case)))
    digest = hashlib.sha256(b"".join(packed[name] for name in DTYPES)).hexdigest()
    assert digest == GOLDEN["digests"][case]


@pytest.mark.parametrize("case", GOLDEN["quantized"])
def test_what_llm_awq_quantized(case):
    """Unpacked, it is the weight to half a step; packed again, it is the same bytes."""
    rows, columns, group = sizes_of(case)
    n, k = torch.arange(rows)[:, None], torch.arange(columns)[None]
    weight = (((n * 7919 + k * 104729 + n * k * 31) % 2003 - 1001) / 20000).half().float()
    tensors = golden_tensors("quantized", case)
    linear = TINYCHAT_V2.unpack(tensors, group)
    step = linear.scale.float().repeat_interleave(group, 1)
    # Its arithmetic is float16 throughout, so a little more than half a step.
    assert ((linear.dequantize() - weight).abs() <= 0.52 * step).all()
    assert stored_bytes(TINYCHAT_V2.pack(linear)) == stored_bytes(tensors)


def test_rows_are_llm_awqs():
    for text, all_rows in GOLDEN["rows"].items():
        for group, rows in zip((128, 64, 32), all_rows, strict=True):
            assert scale_rows(int(text), group) == rows
            assert group_size_of(int(text), rows) == group
        assert group_size_of(int(text), 7) is None


def test_layout_is_the_described_one():
    """qweight[a, 64b + 16r + 8h + w], nibble t = Q[4a + r, 64b + 32h + 8t + w]; w = q·s + z."""
    linear = random_linear(16, 192, 64, seed=1)
    tensors = TINYCHAT_V2.pack(linear)
    words = tensors["qweight"].numpy().astype(np.int64) % (1 << 16)
    weight = np.zeros((16, 192))
    for row in range(16):
        for column in range(192):
            b, h, t, w = column // 64, column // 32 % 2, column // 8 % 4, column % 8
            value = words[row // 4, 64 * b + 16 * (row % 4) + 8 * h + w] >> 4 * t & 15
            assert value == linear.q[row, column]
            scale = float(tensors["scales"][column // 64, row])
            weight[row, column] = value * scale + float(tensors["scaled_zeros"][column // 64, row])
    rounded = (linear.scale.double() * linear.zero.double() / 2048).repeat_interleave(64, 1).numpy()
    difference = np.abs(weight - linear.dequantize().double().numpy())
    assert (difference <= rounded).all()
    assert difference.max() > 0


def test_one_word_by_hand():
    q = torch.zeros(8, 64, dtype=torch.uint8)
    q[5, [35, 43, 51, 59]] = torch.tensor([1, 2, 3, 9], dtype=torch.uint8)
    scale, zero = torch.full((8, 1), 0.5).half(), torch.full((8, 1), 3, dtype=torch.uint8)
    tensors = TINYCHAT_V2.pack(QuantizedLinear(q, scale, zero))
    # Row 5 is r 1 of tile row 1; columns 32 + 8t + 3 are h 1, w 3.
    assert tensors["qweight"].nonzero().tolist() == [[1, 16 + 8 + 3]]
    assert int(tensors["qweight"][1, 27]) % (1 << 16) == 0x9321
    assert tensors["scales"].shape == (16, 8)
    assert tensors["scaled_zeros"][0].tolist() == [-1.5] * 8
    assert not tensors["scaled_zeros"][1:].any()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [128, 64, 32])
def test_round_trip_is_exact(group, bias):
    linear = random_linear(40, 384, group, seed=3, bias=bias)
    back = TINYCHAT_V2.unpack(TINYCHAT_V2.pack(linear), group)
    assert same(back, linear)
    assert (back.bias is None) if not bias else torch.equal(back.bias, linear.bias)


def test_every_zero_point_survives_every_scale():
    """All positive float16 scales, subnormal ones too, times each zero point that fits."""
    every = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    for zero in range(16):
        scale = every[(every.float() * zero).half().isfinite()]
        scale = scale[: len(scale) // 256 * 256].reshape(-1, 32)  # rows in multiples of 8
        q = torch.zeros(scale.shape[0], 32 * 32, dtype=torch.uint8)
        linear = QuantizedLinear(q, scale, torch.full_like(scale, zero, dtype=torch.uint8))
        assert same(TINYCHAT_V2.unpack(TINYCHAT_V2.pack(linear), 32), linear)


def test_a_scale_rounded_apart_from_its_product_is_no_error():
    """A writer that multiplied before rounding the scale is up to 0.015 off an integer."""
    scale = torch.rand(32, 256, generator=torch.Generator().manual_seed(0)) + 0.01
    tensors = TINYCHAT_V2.pack(random_linear(256, 1024, 32))
    tensors["scales"][:], tensors["scaled_zeros"][:] = scale.half(), -(scale * 15).half()
    ratio = -tensors["scaled_zeros"].float() / tensors["scales"].float()
    assert 0.012 < (ratio - 15).abs().max() < 0.015
    assert TINYCHAT_V2.unpack(tensors, 32).zero.eq(15).all()


SIZES = [
    (12, 128, 128, "qweight: 12 output channels are not a multiple of 8"),
    (8, 192, 128, "qweight: 192 input channels are not a multiple of 128"),
    (8, 96, 32, "qweight: 96 input channels are not a multiple of 64"),
    (8, 256, 256, "groups of 128, 64, 32, found 256"),
]


@pytest.mark.parametrize(("rows", "columns", "group", "message"), SIZES)
def test_refuses_sizes_that_fill_no_tile(rows, columns, group, message):
    table = torch.zeros(8, rows).half()
    qweight = torch.zeros(rows // 4, columns, dtype=torch.int16)
    with pytest.raises(VilaDeployError, match=message):
        TINYCHAT_V2.unpack({"qweight": qweight, "scales": table, "scaled_zeros": table}, group)
    if columns % group == 0:
        with pytest.raises(VilaDeployError, match=message):
            TINYCHAT_V2.pack(random_linear(rows, columns, group))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "scales: is missing; download"),
        ({"qweight": torch.zeros(4)}, r"qweight: must have 2 dimensions, found \[4\]"),
        (
            {"qweight": torch.zeros(4, 128, dtype=torch.int32)},
            r"qweight: must be torch.int16 \[4, 128\], found torch.int32",
        ),
        ({"scales": torch.ones(8, 16)}, r"scales: must be torch.float16 \[16, 16\]"),
        ({"scaled_zeros": torch.zeros(16, 8).half()}, r"scaled_zeros: must be .*\[16, 8\]"),
        ({"bias": torch.zeros(16)}, r"bias: must be torch.float16 \[16\], found torch.float32"),
        ({"scales": torch.ones(16, 16).half()}, "scales: must be 0 in the rows after the 2 g"),
        ({"scales": torch.zeros(16, 16).half()}, "scales: must be positive for every group"),
    ],
)
def test_refuses_tensors_of_another_kind(change, message):
    tensors = TINYCHAT_V2.pack(random_linear(16, 128, 64, bias=True)) | change
    with pytest.raises(VilaDeployError, match=message):
        TINYCHAT_V2.unpack({k: v for k, v in tensors.items() if v is not None}, 64)


@pytest.mark.parametrize("ratio", [7.5, 7.04, -1.0, 16.0, -0.04, float("nan")])
def test_refuses_what_no_zero_point_gives(ratio):
    tensors = TINYCHAT_V2.pack(random_linear(16, 128, 64))
    tensors["scales"][1, 9], tensors["scaled_zeros"][1, 9] = 0.25, -0.25 * ratio
    with pytest.raises(VilaDeployError, match=r"scaled_zeros: must be .* channel 9, group 1; "):
        TINYCHAT_V2.unpack(tensors, 64)


def test_refuses_what_the_layout_cannot_hold():
    linear = random_linear(8, 128, 128)
    fields = {"q": linear.q, "zero": linear.zero}
    for scale in (0.0, -0.5, 6e4):
        wrong = torch.full_like(linear.scale, scale)
        with pytest.raises(VilaDeployError, match="scales: TinyChat needs positive scales"):
            TINYCHAT_V2.pack(QuantizedLinear(**fields, scale=wrong))
    prequant = QuantizedLinear(**fields, scale=linear.scale, prequant_scale=torch.ones(128).half())
    with pytest.raises(VilaDeployError, match="stores no prequant scale"):
        TINYCHAT_V2.pack(prequant)
