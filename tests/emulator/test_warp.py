"""Exchanges and products of warps, against loops written from the manual's formulas."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ptx.fault import Fault
from tests.support.ptx.numbers import Array
from tests.support.ptx.snippet import compute, execute, snippet

LANES = np.arange(32)
NUMBERS = np.random.default_rng(0).integers(0, 1 << 32, 64, dtype=np.uint32)


@pytest.mark.parametrize(
    ("way", "count", "clamp", "source"),
    [
        ("bfly", 16, 31, LANES ^ 16),
        ("bfly", 5, 31, LANES ^ 5),
        ("idx", 7, 31, LANES * 0 + 7),
        ("up", 3, 0, np.maximum(LANES - 3, np.where(LANES < 3, LANES, 0))),
        ("down", 4, 31, np.where(LANES + 4 < 32, LANES + 4, LANES)),
    ],
)
def test_shuffles(way: str, count: int, clamp: int, source: Array) -> None:
    body = f"shfl.sync.{way}.b32 %r0, %r1, {count}, {clamp}, -1;"
    expected = NUMBERS.reshape(2, 32)[:, source].reshape(-1)
    assert np.array_equal(compute(body, [NUMBERS], np.uint32), expected)


def test_a_shuffle_by_lane() -> None:
    body = "and.b32 %r2, %r1, 31;\nshfl.sync.idx.b32 %r0, %r1, %r2, 31, -1;"
    halves = NUMBERS.reshape(2, 32)
    expected = np.take_along_axis(halves, (halves & 31).astype(np.int64), 1).reshape(-1)
    assert np.array_equal(compute(body, [NUMBERS], np.uint32), expected)


def test_a_shuffle_is_executed_by_whole_warps() -> None:
    body = (
        "setp.lt.u32 %p1, %r90, 3;\n@%p1 shfl.sync.idx.b32 %r1, %r1, 0, 31, -1;\nmov.u32 %r0, %r1;"
    )
    with pytest.raises(Fault, match="only a part of a warp"):
        compute(body, [NUMBERS], np.uint32)


def test_reductions_of_a_warp() -> None:
    signed = NUMBERS.view(np.int32).reshape(2, 32)
    for way, expected in (("min", signed.min(1)), ("max", signed.max(1))):
        found = compute(f"redux.sync.{way}.s32 %r0, %r1, -1;", [NUMBERS], np.int32)
        assert np.array_equal(found, expected.repeat(32))


def store_and_load(load: str, threads: int = 32) -> str:
    """Each lane stores its number, then loads a matrix whose row its lane's address names."""
    return f"""shl.b32 %r10, %r90, 2;
st.shared.b32 [ %r10 + 0 ], %r1;
st.shared.b32 [ %r10 + 128 ], %r2;
st.shared.b32 [ %r10 + 256 ], %r3;
st.shared.b32 [ %r10 + 384 ], %r4;
shl.b32 %r11, %r90, 4;
{load}"""


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_out_of_shared_memory(transposed: bool) -> None:
    """The manual: row r of matrix i is at the address of lane 8i + r; a lane gets two numbers."""
    words = [np.random.default_rng(i).integers(0, 1 << 32, 32, dtype=np.uint32) for i in range(4)]
    matrices = np.concatenate(words).view(np.uint16).reshape(4, 8, 8)
    trans = ".trans" * transposed
    load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r11];\n"
    for index in range(4):
        body = store_and_load(load) + f"mov.u32 %r0, %r2{index};"
        found = compute(body, words, np.uint32, 512).view(np.uint16).reshape(32, 2)
        matrix = matrices[index].T if transposed else matrices[index]
        for lane in range(32):
            row, column = lane // 4, 2 * (lane % 4)
            assert found[lane].tolist() == matrix[row, column : column + 2].tolist()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_into_shared_memory_and_back(transposed: bool) -> None:
    words = [np.random.default_rng(i).integers(0, 1 << 32, 32, dtype=np.uint32) for i in range(4)]
    trans = ".trans" * transposed
    body = f"""shl.b32 %r11, %r90, 4;
stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r11], {{%r1, %r2, %r3, %r4}};
ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r11];
mov.u32 %r0, %r2NUMBER;"""
    for index in range(4):
        found = compute(body.replace("NUMBER", str(index)), words, np.uint32, 512)
        assert np.array_equal(found, words[index])


def fragments(matrix: Array, places: list[tuple[int, int]]) -> list[Array]:
    """Registers of 32 lanes that hold two float16 of a matrix each."""
    registers = []
    for down, across in places:
        pairs = [
            matrix[lane // 4 + down, lane % 4 * 2 + across : lane % 4 * 2 + across + 2]
            for lane in range(32)
        ]
        registers.append(np.ascontiguousarray(pairs, np.float16).view(np.uint32)[:, 0])
    return registers


def test_a_product_of_a_warp() -> None:
    """Registers as the manual says for m16n8k16: A by rows, B by columns, C of two in a row."""
    random = np.random.default_rng(0)
    a, b = (
        random.standard_normal((16, 16)).astype(np.float16),
        random.standard_normal((16, 8)).astype(np.float16),
    )
    c = random.standard_normal((16, 8)).astype(np.float32)
    inputs = fragments(a, [(0, 0), (8, 0), (0, 8), (8, 8)])
    inputs += fragments(np.ascontiguousarray(b.T), [(0, 0), (0, 8)])
    places = [(0, 0), (0, 1), (8, 0), (8, 1)]
    inputs += [
        np.array([c[lane // 4 + down, lane % 4 * 2 + across] for lane in range(32)], np.float32)
        for down, across in places
    ]
    product = """mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r20, %r21, %r22, %r23 }, \
{ %r1, %r2, %r3, %r4 }, { %r5, %r6 }, { %r7, %r8, %r9, %r10 };
"""
    expected = a.astype(np.float64) @ b.astype(np.float64) + c
    for index, (down, across) in enumerate(places):
        found = compute(product + f"mov.u32 %r0, %r2{index};", inputs, np.float32)
        wanted = [expected[lane // 4 + down, lane % 4 * 2 + across] for lane in range(32)]
        assert np.array_equal(found, np.array(wanted, np.float32))


# Warp groups

COLUMNS = 16


def swizzled(matrix: Array) -> Array:
    """Rows of 64 float16 in the 128-byte swizzle: chunks of 16 bytes, turned by the row."""
    out = np.empty_like(matrix)
    for row in range(len(matrix)):
        for chunk in range(8):
            to = chunk ^ row % 8
            out[row, 8 * to : 8 * to + 8] = matrix[row, 8 * chunk : 8 * chunk + 8]
    return out


def group_product(
    a: Array, b: Array, *, wait: str = "wgmma.wait_group.sync.aligned 0;\n", skip: str = ""
) -> Array:
    """A[64, 64] (its first 16 columns) times B[16 columns, 64], both swizzled by 128 bytes."""
    memory = np.concatenate([swizzled(a).reshape(-1), swizzled(b).reshape(-1)])
    words, out = memory.view(np.uint32), np.zeros((8, 128), np.float32)
    registers = [f"%r{20 + i}" for i in range(8)]
    lines = ["mov.u32 %r10, %r90;", "shl.b32 %r11, %r90, 2;"]
    for step in range(len(words) // 128):
        lines += [
            "mad.wide.u32 %rd1, %r90, 4, %rd70;",
            f"ld.global.b32 {{ %r2 }}, [ %rd1 + {512 * step} ];",
            f"st.shared.b32 [ %r11 + {512 * step} ], %r2;",
        ]
    # Stride 1024 bytes from 8 rows to the next, swizzle 128: bits 62 and 63 are 1.
    base = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
    lines += [
        "bar.sync 0;", f"mov.b64 %rd2, {base};", f"mov.b64 %rd3, {base + (8192 >> 4)};",
        *(f"mov.b32 {register}, 0f3F800000;" for register in registers), "mov.pred %p1, 1;",
        skip, "wgmma.fence.sync.aligned;",
        f"wgmma.mma_async.sync.aligned.m64n{COLUMNS}k16.f32.f16.f16 "
        f"{{{','.join(registers)}}}, %rd2, %rd3, %p1, 1, 1, 0, 0;",
        "wgmma.commit_group.sync.aligned;", wait, "$L__behind:",
    ]  # fmt: skip
    for index, register in enumerate(registers):
        lines.append(f"mad.wide.u32 %rd4, %r90, 4, %rd71;\n"
                     f"st.global.b32 [ %rd4 + {512 * index} ], {{ {register} }};")  # fmt: skip
    execute(snippet("\n".join(lines), [words], out, 128, loaded=0), [words, out], 1, 16384)
    return out


def test_a_product_of_a_warp_group() -> None:
    random = np.random.default_rng(1)
    a = random.standard_normal((64, 64)).astype(np.float16)
    b = random.standard_normal((COLUMNS, 64)).astype(np.float16)
    found = group_product(a, b)
    expected = 1 + a[:, :16].astype(np.float64) @ b[:, :16].astype(np.float64).T
    for register in range(8):
        for thread in range(128):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (register // 2 % 2)
            column = 8 * (register // 4) + 2 * (thread % 4) + register % 2
            assert found[register, thread] == np.float32(expected[row, column])


def test_a_warp_group_multiplies_as_a_whole() -> None:
    a, b = np.zeros((64, 64), np.float16), np.zeros((COLUMNS, 64), np.float16)
    with pytest.raises(Fault, match="only a part of a program executes a warp group's"):
        group_product(a, b, skip="setp.lt.u32 %p2, %r90, 32;\n@%p2 bra $L__behind;")


def test_a_product_of_a_warp_group_is_waited_for() -> None:
    a, b = np.zeros((64, 64), np.float16), np.zeros((COLUMNS, 64), np.float16)
    with pytest.raises(Fault, match=r"is read before wgmma\.wait_group"):
        group_product(a, b, wait="")
    with pytest.raises(Fault, match="race: a write of what another warp reads"):
        group_product(a, b, wait="st.shared.b32 [ %r11 + 0 ], %r2;")
