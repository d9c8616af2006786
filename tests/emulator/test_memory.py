"""Loads, stores, barriers and copies: what they do, and that every check fires."""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.ptx.fault import Fault
from tests.support.ptx.machine import Options
from tests.support.ptx.numbers import Array
from tests.support.ptx.provenance import written_params
from tests.support.ptx.snippet import compute, execute, snippet

NUMBERS = np.arange(64, dtype=np.uint32) * 3 + 1
# Where a thread's own word lies in shared memory, in %r10; its neighbour's of the other warp, %r12.
PLACES = """shl.b32 %r10, %r90, 2;
xor.b32 %r11, %r90, 32;
shl.b32 %r12, %r11, 2;
"""
OTHER_WARP = np.roll(NUMBERS, 32)


def two_warps(body: str, shared_bytes: int = 256) -> Array:
    return compute(PLACES + body, [NUMBERS], np.uint32, shared_bytes)


# Bounds and alignment


@pytest.mark.parametrize(
    ("offset", "message"),
    [(0, None), (4, "out of bounds: 4 bytes at .0 from the end of snippet_param_0"),
     (-4, None), (2, "misaligned"), (-300, "out of bounds")],
)  # fmt: skip
def test_a_load_stays_within_its_tensor_and_is_aligned(offset: int, message: str | None) -> None:
    body = f"""setp.eq.b32 %p1, %r90, 31;
mov.u32 %r0, 0;
@%p1 ld.global.b32 {{ %r0 }}, [ %rd80 + {offset} ];"""
    if message is None:
        found = compute(body, [NUMBERS[:32]], np.uint32)
        assert found[31] == NUMBERS[31 + offset // 4]
        assert not found[:31].any()
    else:
        with pytest.raises(Fault, match=message):
            compute(body, [NUMBERS[:32].copy()], np.uint32)


def test_vectors_are_aligned_as_a_whole() -> None:
    numbers = np.arange(256, dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    body = """mad.wide.u32 %rd1, %r90, 16, %rd70;
ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + OFFSET ];
add.s32 %r5, %r2, %r4;
add.s32 %r0, %r1, %r5;"""
    kernel = snippet(body.replace("OFFSET", "0"), [numbers], out, 64)
    execute(kernel, [numbers, out])
    assert np.array_equal(out, numbers.reshape(64, 4)[:, [0, 1, 3]].sum(1))
    kernel = snippet(body.replace("OFFSET", "8"), [numbers], out, 32)
    with pytest.raises(Fault, match="misaligned access of 16 bytes"):
        execute(kernel, [numbers, out])


def test_narrow_loads_extend_as_their_type_says() -> None:
    numbers = np.array([-1, 5, -128, 127], np.int8).view(np.uint32).repeat(32)
    for opcode, expected in (("s8", -1), ("u8", 255)):
        found = compute(f"ld.global.{opcode} %rs0, [ %rd80 + 0 ];", [numbers], np.int16)
        assert set(found.tolist()) == {expected}


@pytest.mark.parametrize(
    "instruction", ["prefetch.global.L2 [%rd1];", "ld.global.b32 %r2, [%rd1];"]
)
def test_nothing_behind_a_tensor_is_touched(instruction: str) -> None:
    with pytest.raises(Fault, match="out of bounds"):
        compute(
            f"add.s64 %rd1, %rd80, 128;\n{instruction}\nmov.u32 %r0, %r1;", [NUMBERS], np.uint32
        )


def test_two_threads_do_not_store_different_values_at_one_address() -> None:
    out = np.zeros(32, np.uint32)
    for value, fails in (("%r1", True), ("7", False)):
        body = f"mov.u32 %r2, {value};\nst.global.b32 [ %rd71 + 0 ], {{ %r2 }};"
        kernel = snippet(body, [NUMBERS], out)
        if fails:
            with pytest.raises(Fault, match="different values at one address of snippet_param_1"):
                execute(kernel, [NUMBERS, out])
        else:
            execute(kernel, [NUMBERS, out])
            assert out[0] == 7


# Races within a program


def test_shared_memory_hands_values_to_another_warp() -> None:
    body = "st.shared.b32 [ %r10 + 0 ], %r1;\nbar.sync 0;\nld.shared.b32 %r0, [ %r12 + 0 ];"
    assert np.array_equal(two_warps(body), OTHER_WARP)


def test_a_missing_barrier_is_a_race() -> None:
    store, load = "st.shared.b32 [ %r10 + 0 ], %r1;\n", "ld.shared.b32 %r0, [ %r12 + 0 ];\n"
    with pytest.raises(Fault, match="race: a read of what another warp wrote"):
        two_warps(store + load)
    with pytest.raises(Fault, match="race: a write of what another warp reads"):
        two_warps(f"{store}bar.sync 0;\n{load}{store}")
    two_warps(f"{store}bar.sync 0;\n{load}bar.sync 0;\n{store}")
    with pytest.raises(Fault, match="race: a write of what another warp writes"):
        two_warps(
            f"{store}shr.u32 %r13, %r90, 5;\nst.shared.b32 [ %r12 + 0 ], %r1;\nmov.u32 %r0, %r1;"
        )


def test_two_threads_do_not_store_different_values_at_one_shared_address() -> None:
    same = "mov.u32 %r13, 0;\nst.shared.b32 [ %r13 + 0 ], VALUE;\nmov.u32 %r0, %r1;"
    two_warps(same.replace("VALUE", "%r13"))
    with pytest.raises(Fault, match="different values at one address of shared"):
        two_warps(same.replace("VALUE", "%r1"))


@pytest.mark.parametrize("vector", ["v2.b16", "v4.b16", "v2.b32", "v4.b32"])
def test_several_warps_may_store_the_same_vector(vector: str) -> None:
    load = "bar.sync 0;\nld.shared.b32 %r0, [ %r13 + 0 ];"
    count, bits = int(vector[1]), int(vector[-2:])
    names = [f"%{'rs' if bits == 16 else 'r'}{20 + index}" for index in range(count)]
    numbers = [f"mov.b{bits} {name}, {index + 1};" for index, name in enumerate(names)]
    store = f"st.shared.{vector} [ %r13 + 0 ], {{ {', '.join(names)} }};\n"
    body = "\n".join(["mov.u32 %r13, 0;", *numbers, store])
    assert set(two_warps(body + load).tolist()) == {0x20001 if bits == 16 else 1}
    # Of one half of the vector, the warps have different values.
    other = f"mov.b{bits} {names[-1]}, " if bits == 32 else f"cvt.u16.u32 {names[-1]}, "
    with pytest.raises(Fault, match="different values at one address of shared"):
        two_warps(body.replace(store, f"{other}%r1;\n{store}") + load)


def test_what_several_warps_stored_waits_for_a_barrier() -> None:
    """For each of them: also the one that is executed last here."""
    same = "mov.u32 %r13, 0;\nst.shared.b32 [ %r13 + 0 ], %r13;\n"
    last = "setp.ge.u32 %p1, %r90, 32;\nmov.u32 %r0, 0;\n"
    load, store = "@%p1 ld.shared.b32 %r0, [ %r13 + 0 ];", "@%p1 st.shared.b32 [ %r13 + 0 ], %r0;"
    for access, message in ((load, "a read of"), (store, "a write of")):
        two_warps(f"{same}{last}bar.sync 0;\n{access}")
        with pytest.raises(Fault, match=f"race: {message} what another warp w"):
            two_warps(same + last + access)


def test_a_missing_barrier_around_global_memory_is_a_race() -> None:
    body = """st.global.b32 [ %rd81 + 0 ], { %r1 };
BARRIER
mad.wide.u32 %rd1, %r11, 4, %rd71;
ld.global.b32 { %r2 }, [ %rd1 + 0 ];
mov.u32 %r0, %r2;"""
    with pytest.raises(Fault, match="race: a read of what another warp wrote"):
        two_warps(body.replace("BARRIER", ""))
    with pytest.raises(Fault, match="race: a write of what another warp reads"):
        two_warps(body.replace("BARRIER", "bar.sync 0;"))
    found = two_warps(body.replace("BARRIER", "bar.sync 0;") + "\nbar.sync 0;")
    assert np.array_equal(found, OTHER_WARP)


def test_shared_memory_has_an_end() -> None:
    with pytest.raises(Fault, match="out of bounds: shared address"):
        two_warps("ld.shared.b32 %r0, [ %r10 + 64 ];", shared_bytes=256)
    with pytest.raises(Fault, match="misaligned access of 4 bytes"):
        two_warps("ld.shared.b32 %r0, [ %r10 + 2 ];", shared_bytes=512)


def test_what_nobody_wrote_is_nan() -> None:
    found = compute("ld.shared.b32 %r0, [ %r90 * 4 + 0 ];".replace("%r90 * 4", "%r91"), [NUMBERS],
                    np.float32, 256)  # fmt: skip
    assert np.isnan(found).all()


def test_a_barrier_is_reached_by_a_whole_program() -> None:
    with pytest.raises(Fault, match="a barrier that only a part of a program reaches"):
        two_warps("setp.lt.u32 %p1, %r90, 32;\n@%p1 bar.sync 0;\nmov.u32 %r0, %r1;")


# Copies


COPY = """mov.b32 %r20, 4;
cp.async.ca.shared.global [ %r10 + 0 ], [ %rd80 + 0 ], 0x4, %r20;
cp.async.commit_group;
"""


def test_a_copy_is_there_when_its_group_is_waited_for() -> None:
    own, other = "ld.shared.b32 %r0, [ %r10 + 0 ];", "ld.shared.b32 %r0, [ %r12 + 0 ];"
    wait = "cp.async.wait_group 0;\n"
    assert np.array_equal(two_warps(COPY + wait + own), NUMBERS)
    assert np.array_equal(two_warps(COPY + wait + "bar.sync 0;\n" + other), OTHER_WARP)
    for body in (own, "bar.sync 0;\n" + own, wait.replace("0;", "1;") + own):
        with pytest.raises(Fault, match=r"race: a read of bytes that a cp\.async may still write"):
            two_warps(COPY + body)
    with pytest.raises(Fault, match="race: a read of what another warp wrote"):
        two_warps(COPY + wait + other)


def test_a_copy_may_not_overwrite_what_is_read() -> None:
    wait, own = "cp.async.wait_group 0;\n", "ld.shared.b32 %r0, [ %r10 + 0 ];\n"
    other = "ld.shared.b32 %r0, [ %r12 + 0 ];\n"
    two_warps(COPY + wait + own + COPY)
    with pytest.raises(Fault, match="race: a write of what another warp reads"):
        two_warps(COPY + wait + "bar.sync 0;\n" + other + COPY)
    with pytest.raises(Fault, match=r"race: a write of bytes that a cp\.async may still write"):
        two_warps(COPY + COPY)
    with pytest.raises(Fault, match=r"race: a write of bytes that a cp\.async may still write"):
        two_warps(COPY + "st.shared.b32 [ %r10 + 0 ], %r1;\nmov.u32 %r0, %r1;")


def test_without_race_checks_a_copy_that_nobody_waited_for_is_not_there() -> None:
    out = np.zeros(64, np.float32)
    body = PLACES + COPY + "ld.shared.b32 %r0, [ %r10 + 0 ];"
    execute(snippet(body, [NUMBERS], out, 64), [NUMBERS, out], 1, 256, Options(races=False))
    assert np.isnan(out).all()


def test_a_masked_copy_writes_zeros_and_reads_nothing() -> None:
    body = """setp.lt.u32 %p1, %r90, 8;
selp.b32 %r20, 4, 0, %p1;
selp.b64 %rd1, %rd80, 0, %p1;
cp.async.ca.shared.global [ %r10 + 0 ], [ %rd1 + 0 ], 0x4, %r20;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared.b32 %r0, [ %r10 + 0 ];"""
    assert np.array_equal(two_warps(body), np.where(np.arange(64) < 8, NUMBERS, 0))
    with pytest.raises(Fault, match="out of bounds"):
        two_warps(body.replace(", 0x4, %r20", ", 0x4"))


# Between programs


SUM = """st.global.b32 [ %rd81 + 0 ], { %r1 };
BEFORE
setp.eq.b32 %p1, %r90, 0;
mov.b32 %r20, 1;
mov.b32 %r21, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r21, [ %rd72 + 0 ], %r20;
@%p1 st.shared.b32 [ global_smem + 0 ], %r21;
BEHIND
ld.shared.b32 %r22, [ global_smem + 0 ];
setp.ne.b32 %p2, %r22, 1;
@%p2 bra $L_end;
xor.b32 %r23, %r92, 64;
mad.wide.u32 %rd1, %r23, 4, %rd71;
ld.global.b32 { %r24 }, [ %rd1 + 0 ];
st.global.b32 [ %rd83 + 0 ], { %r24 };
$L_end:
"""


def last_program(before: str, behind: str) -> Array:
    """The last of two programs copies what the other one wrote."""
    numbers, parts = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    count, out = np.zeros(1, np.uint32), np.zeros(128, np.uint32)
    body = SUM.replace("BEFORE", before).replace("BEHIND", behind)
    kernel = snippet(body, [numbers, parts, count], out, 64, loaded=1)
    execute(kernel, [numbers, parts, count, out], grid=2, shared_bytes=16)
    assert count[0] == 2
    return out


def test_a_release_and_an_acquisition_order_programs() -> None:
    found = last_program("bar.sync 0;", "bar.sync 0;")
    assert np.array_equal(found[64:], np.arange(64))
    assert not found[:64].any()


def test_what_was_not_released_by_all_warps_is_a_race() -> None:
    with pytest.raises(Fault, match="race: a read of what another warp wrote"):
        last_program("", "bar.sync 0;")
    with pytest.raises(Fault, match="race"):
        last_program("bar.sync 0;", "")


def test_written_parameters_are_found_through_registers_and_branches() -> None:
    numbers = np.zeros(64, np.uint32)
    kernel = snippet(SUM.replace("BEFORE", "").replace("BEHIND", ""), [numbers] * 3, numbers)
    assert written_params(kernel) == {f"snippet_param_{index}" for index in (1, 2, 3)}


# Dependent launches


@pytest.mark.parametrize(
    ("early", "fails"),
    [
        ("prefetch.global.L2 [%rd80];", False),
        ("ld.global.cg.b32 { %r2 }, [ %rd80 + 0 ];", False),
        ("ld.global.b32 { %r2 }, [ %rd80 + 0 ];", True),
        ("st.global.b32 [ %rd81 + 0 ], { %r90 };", True),
        ("mov.b32 %r3, 0;\ncp.async.ca.shared.global [ %r3 + 0 ], [ %rd80 + 0 ], 0x4;", True),
    ],
)
def test_a_dependent_launch_reads_nothing_before_it_waits(early: str, fails: bool) -> None:
    out = np.zeros(32, np.uint32)
    kernel = snippet(early + "\ngriddepcontrol.wait;\n", [NUMBERS], out, loaded=0)
    options = Options(dependent=True)
    if fails:
        with pytest.raises(Fault, match=r"before griddepcontrol\.wait"):
            execute(kernel, [NUMBERS, out], 1, 16, options)
    else:
        execute(kernel, [NUMBERS, out], 1, 16, options)


def test_an_endless_loop_is_a_fault() -> None:
    out = np.zeros(32, np.uint32)
    kernel = snippet("$L_again:\nbra $L_again;\nmov.u32 %r0, 0;", [NUMBERS], out)
    with pytest.raises(Fault, match="has not ended after"):
        execute(kernel, [NUMBERS, out], 1, 16, Options(max_steps=1000))


def test_threads_part_and_meet_again() -> None:
    body = """mov.u32 %r0, 0;
$L_loop:
add.s32 %r0, %r0, 1;
setp.lt.u32 %p1, %r0, %r90;
@%p1 bra $L_loop;
setp.eq.b32 %p2, %r90, 5;
@!%p2 bra $L_else;
add.s32 %r0, %r0, 100;
bra.uni $L_end;
$L_else:
add.s32 %r0, %r0, 1000;
$L_end:
shl.b32 %r0, %r0, 1;"""
    expected = np.maximum(np.arange(32), 1) + 1000
    expected[5] = 105
    assert np.array_equal(compute(body, [NUMBERS[:32]], np.uint32), expected * 2)
