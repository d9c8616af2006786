"""Each arithmetic instruction against numpy, over random bits and the ends of each type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.support.ptx.fault import Fault
from tests.support.ptx.numbers import DTYPES, Array
from tests.support.ptx.parse import parse
from tests.support.ptx.snippet import FAMILIES, compute

THREADS = 128


def operands(kind: str, count: int, seed: int = 0) -> list[Array]:
    """Random numbers of a type, with its extremes and zero among them."""
    dtype, random = DTYPES[kind], np.random.default_rng(seed)
    found = []
    for index in range(count):
        if dtype.kind == "f":
            values = (
                random.standard_normal(THREADS) * 4.0 ** random.integers(-6, 6, THREADS)
            ).astype(dtype)
            values[index] = 0
        else:
            limits = np.iinfo(dtype)
            values = random.integers(limits.min, limits.max, THREADS, dtype, endpoint=True)
            values[[index, index + 8, index + 16]] = (0, limits.min, limits.max)
        found.append(values)
    return found


def positive(kind: str, count: int) -> list[Array]:
    return [np.abs(values) + values.dtype.type(1) for values in operands(kind, count)]


def name(kind: str, number: int) -> str:
    return f"{FAMILIES[DTYPES[kind].itemsize]}{number}"


def check(
    opcode: str, kind: str, result: str, function: Callable[..., Any], inputs: list[Array],
    *, tolerance: float = 0.0, tail: str = "",
) -> None:  # fmt: skip
    sources = [name(kind, i + 1) for i in range(len(inputs))]
    body = f"{opcode} {', '.join([name(result, 0), *sources])}{tail};"
    with np.errstate(all="ignore"):
        expected = np.asarray(function(*inputs)).astype(DTYPES[result])
    found = compute(body, inputs, DTYPES[result])
    if tolerance:
        np.testing.assert_allclose(found, expected, rtol=tolerance)
    else:
        assert np.array_equal(found.view(f"u{found.itemsize}"), expected.view(f"u{found.itemsize}"))


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "f32"])
@pytest.mark.parametrize(("opcode", "function"), [("add", np.add), ("sub", np.subtract)])
def test_sums(opcode: str, function: Any, kind: str) -> None:
    check(f"{opcode}.{kind}", kind, kind, function, operands(kind, 2))


@pytest.mark.parametrize("kind", ["s32", "f32"])
@pytest.mark.parametrize(
    ("opcode", "function"),
    [("min", np.minimum), ("max", np.maximum)],
)  # fmt: skip
def test_extremes(opcode: str, function: Any, kind: str) -> None:
    check(f"{opcode}.{kind}", kind, kind, function, operands(kind, 2))


def test_min_and_max_prefer_numbers_to_nan() -> None:
    values, nan = operands("f32", 1)[0], np.full(THREADS, np.nan, np.float32)
    for opcode in ("min.f32", "max.f32"):
        check(opcode, "f32", "f32", lambda a, b: a, [values, nan])
        check(opcode, "f32", "f32", lambda a, b: b, [nan, values])


@pytest.mark.parametrize(
    ("opcode", "function"),
    [("and.b32", np.bitwise_and), ("or.b32", np.bitwise_or), ("xor.b32", np.bitwise_xor)],
)
def test_bits(opcode: str, function: Any) -> None:
    check(opcode, "u32", "u32", function, operands("u32", 2))


def test_not_neg_abs() -> None:
    check("not.b32", "u32", "u32", np.invert, operands("u32", 1))
    check("neg.s32", "s32", "s32", np.negative, operands("s32", 1))
    check("neg.f32", "f32", "f32", np.negative, operands("f32", 1))
    check("abs.f32", "f32", "f32", np.abs, operands("f32", 1))


def test_products() -> None:
    check("mul.f32", "f32", "f32", np.multiply, operands("f32", 2))
    check("mul.lo.s32", "s32", "s32", np.multiply, operands("s32", 2))
    check("mul.lo.s64", "s64", "s64", np.multiply, operands("s64", 2))
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        a, b = operands(kind, 2)
        check(f"mul.wide.{kind}", kind, wide, lambda a, b, w=wide: a.astype(DTYPES[w]) * b, [a, b])
        high = [int(x) * int(y) >> 32 for x, y in zip(a, b, strict=True)]
        check(f"mul.hi.{kind}", kind, kind, lambda *_, high=high: high, [a, b])
    check("mad.lo.s32", "s32", "s32", lambda a, b, c: a * b + c, operands("s32", 3))


def test_wide_multiply_and_add() -> None:
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        a, b = operands(kind, 2)
        (c,) = operands(wide, 1)
        expected = a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]) + c
        found = compute(f"mad.wide.{kind} %rd0, %r1, %r2, %rd3;", [a, b, c], DTYPES[wide])
        assert np.array_equal(found, expected)


def test_fused_multiply_and_add_rounds_once() -> None:
    a, b = (values.astype(np.float64) for values in operands("f32", 2))
    inputs = [values.astype(np.float32) for values in (a, b, -(a * b))]
    expected = (inputs[0].astype(np.float64) * inputs[1] + inputs[2]).astype(np.float32)
    assert (expected != inputs[0] * inputs[1] + inputs[2]).any()
    check("fma.rn.f32", "f32", "f32", lambda *_: expected, inputs)
    check(
        "fma.rn.f16", "f16", "f16",
        lambda a, b, c: a.astype(np.float64) * b + c, operands("f16", 3),
    )  # fmt: skip


def test_pairs_of_halves() -> None:
    halves = [values.view(np.uint32) for values in operands("f16", 2 * 3)[:3]]
    halves = [np.resize(values, THREADS) for values in halves]
    pairs = [values.view(np.float16).astype(np.float64) for values in halves]
    with np.errstate(all="ignore"):
        product = (pairs[0] * pairs[1]).astype(np.float16).view(np.uint32)
        fused = (pairs[0] * pairs[1] + pairs[2]).astype(np.float16).view(np.uint32)
    check("mul.f16x2", "u32", "u32", lambda *_: product, halves[:2])
    check("fma.rn.f16x2", "u32", "u32", lambda *_: fused, halves)


def test_division_truncates() -> None:
    a, b = operands("s32", 1)[0], np.resize(np.array([7, -3, 1, 128], np.int32), THREADS)
    pairs = zip(a, b, strict=True)
    expected = [
        int(abs(int(x)) // abs(int(y))) * (-1 if (x < 0) != (y < 0) else 1) for x, y in pairs
    ]
    check("div.s32", "s32", "s32", lambda *_: np.array(expected), [a, b])
    check("div.full.f32", "f32", "f32", np.divide, positive("f32", 2))


def test_transcendental() -> None:
    x = np.linspace(-20, 20, THREADS).astype(np.float32)
    check("ex2.approx.ftz.f32", "f32", "f32", lambda a: 2.0 ** a.astype(np.float64), [x],
          tolerance=1e-6)  # fmt: skip
    check("lg2.approx.f32", "f32", "f32", lambda a: np.log2(a.astype(np.float64)),
          positive("f32", 1), tolerance=1e-6)  # fmt: skip
    check("rsqrt.approx.ftz.f32", "f32", "f32", lambda a: a.astype(np.float64) ** -0.5,
          positive("f32", 1), tolerance=1e-6)  # fmt: skip


def test_shifts_beyond_the_width() -> None:
    a, n = operands("u32", 1)[0], np.resize(np.array([0, 1, 31, 32, 40], np.uint32), THREADS)
    left = [int(x) << int(k) & 0xFFFFFFFF for x, k in zip(a, n, strict=True)]
    right = [int(x) >> int(k) for x, k in zip(a, n, strict=True)]
    signed = [int(x) >> int(k) for x, k in zip(a.view(np.int32), n, strict=True)]
    check("shl.b32", "u32", "u32", lambda *_: np.array(left), [a, n])
    check("shr.u32", "u32", "u32", lambda *_: np.array(right), [a, n])
    check("shr.s32", "u32", "s32", lambda *_: np.array(signed), [a, n])


def test_funnel_shift_and_bit_fields() -> None:
    low, high = operands("u32", 2)
    both = [int(h) << 32 | int(x) for x, h in zip(low, high, strict=True)]
    left = np.array([(value << 7 >> 32) & 0xFFFFFFFF for value in both], np.uint32)
    right = np.array([(value >> 7) & 0xFFFFFFFF for value in both], np.uint32)
    check("shf.l.wrap.b32", "u32", "u32", lambda *_: left, [low, high], tail=", 7")
    check("shf.r.wrap.b32", "u32", "u32", lambda *_: right, [low, high], tail=", 7")
    field = [int(x) >> 4 & 7 for x in low]
    check("bfe.u32", "u32", "u32", lambda _: np.array(field), [low], tail=", 4, 3")
    sign = [-(int(x) >> 27 & 1) for x in low]
    check("bfe.s32", "u32", "s32", lambda _: np.array(sign), [low], tail=", 27, 1")


@pytest.mark.parametrize("selector", [0x3210, 0x7654, 0x5410, 0x9991, 0xC1B7])
def test_permuted_bytes(selector: int) -> None:
    low, high = operands("u32", 2)

    def byte(pair: bytes, choice: int) -> int:
        value = pair[choice & 7]
        return (0xFF if value & 0x80 else 0) if choice & 8 else value

    expected = []
    for x, y in zip(low, high, strict=True):
        pair = int(x).to_bytes(4, "little") + int(y).to_bytes(4, "little")
        chosen = bytes(byte(pair, selector >> 4 * i & 15) for i in range(4))
        expected.append(int.from_bytes(chosen, "little"))
    check("prmt.b32", "u32", "u32", lambda *_: np.array(expected), [low, high],
          tail=f", {selector:#x}U")  # fmt: skip


@pytest.mark.parametrize("kind", ["s32", "u32", "f32"])
@pytest.mark.parametrize(
    ("comparison", "function"),
    [("eq", np.equal), ("ne", np.not_equal), ("lt", np.less), ("le", np.less_equal),
     ("gt", np.greater), ("ge", np.greater_equal)],
)  # fmt: skip
def test_comparisons_and_selections(comparison: str, function: Any, kind: str) -> None:
    a, b = operands(kind, 2)
    b[::3] = a[::3]
    body = f"setp.{comparison}.{kind} %p1, %r1, %r2;\nselp.b32 %r0, %r1, %r2, %p1;"
    assert np.array_equal(compute(body, [a, b], a.dtype), np.where(function(a, b), a, b))


def test_predicates() -> None:
    a, b = operands("s32", 2)
    body = """setp.lt.s32 %p1, %r1, 0;
setp.lt.s32 %p2, %r2, 0;
not.pred %p3, %p2;
and.pred %p4, %p1, %p3;
mov.pred %p5, 0;
or.pred %p4, %p4, %p5;
selp.b32 %r0, 1, 0, %p4;"""
    assert np.array_equal(compute(body, [a, b], np.int32), ((a < 0) & (b >= 0)).astype(np.int32))


def test_moves_take_registers_apart_and_put_them_together() -> None:
    (a,) = operands("u32", 1)
    assert np.array_equal(
        compute("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r0, {%rs2, %rs1};", [a], np.uint32),
        a << np.uint32(16) | a >> np.uint32(16),
    )
    body = "mov.b64 %rd1, {%r1, %r2};\nshr.u64 %rd0, %rd1, 16;"
    b = operands("u32", 2)[1]
    whole = (b.astype(np.uint64) << np.uint64(32) | a) >> np.uint64(16)
    assert np.array_equal(compute(body, [a, b], np.uint64), whole)


@pytest.mark.parametrize(
    ("opcode", "kind", "result", "function"),
    [
        ("cvt.f32.f16", "f16", "f32", lambda a: a),
        ("cvt.rn.f16.f32", "f32", "f16", lambda a: a),
        ("cvt.rn.f16.s16", "s16", "f16", lambda a: a),
        ("cvt.rn.f32.s32", "s32", "f32", lambda a: a),
        ("cvt.s64.s32", "s32", "s64", lambda a: a),
        ("cvt.u64.u32", "u32", "u64", lambda a: a),
        ("cvt.u32.u64", "u64", "u32", lambda a: a & np.uint64(0xFFFFFFFF)),
        ("cvt.u16.u32", "u32", "u16", lambda a: a & np.uint32(0xFFFF)),
        ("cvt.u32.u16", "u16", "u32", lambda a: a),
        ("cvt.rmi.ftz.f32.f32", "f32", "f32", np.floor),
        ("cvt.rzi.s32.f32", "f32", "s32", np.trunc),
        ("cvt.rni.s32.f32", "f32", "s32", np.rint),
    ],
)
def test_conversions(opcode: str, kind: str, result: str, function: Any) -> None:
    check(opcode, kind, result, function, operands(kind, 1))


def test_conversions_to_integers_saturate() -> None:
    x = np.array([1e9, -1e9, 40000, -40000, 3.7, -3.7, np.inf, 0], np.float32)
    (found,) = (compute("cvt.rzi.s16.f32 %rs0, %r1;", [np.resize(x, 32)], np.int16),)
    assert found[:8].tolist() == [32767, -32768, 32767, -32768, 3, -3, 32767, 0]


def test_bytes_in_wider_registers_keep_their_sign() -> None:
    (a,) = operands("u32", 1)
    found = compute("cvt.s8.s32 %rs0, %r1;", [a], np.int16)
    assert np.array_equal(found, a.astype(np.uint8).view(np.int8).astype(np.int16))


def test_two_floats_become_a_pair_of_halves() -> None:
    a, b = operands("f32", 2)
    found = compute("cvt.rn.f16x2.f32 %r0, %r1, %r2;", [a, b], np.uint32)
    assert np.array_equal(found.view(np.float16)[0::2], b.astype(np.float16))
    assert np.array_equal(found.view(np.float16)[1::2], a.astype(np.float16))


@pytest.mark.parametrize(
    "body",
    [
        "sin.approx.f32 %r0, %r1;",
        "add.sat.f32 %r0, %r1, %r1;",
        "cvt.sat.f16.f32 %rs0, %r1;",
        "mul24.lo.s32 %r0, %r1, %r1;",
    ],
)
def test_what_is_not_known_is_a_fault(body: str) -> None:
    with pytest.raises(Fault, match="unknown instruction"):
        compute(body, operands("f32", 1), np.uint32)


def test_a_register_is_written_before_it_is_read() -> None:
    with pytest.raises(Fault, match=r"%r7 is read before it is written"):
        compute("add.s32 %r0, %r7, %r1;", operands("u32", 1), np.uint32)


def test_a_module_without_a_kernel_is_a_fault() -> None:
    with pytest.raises(Fault, match="no kernel"):
        parse(".version 8.7\n.target sm_90a\n")
