"""Compiled products: how SASS is read, and what the rows promise of every shape of the table."""

from __future__ import annotations

import pytest

from benchmarks.gpu.attention_instructions import FORMS, MAX_SEQ_LEN, Parts, parts
from benchmarks.gpu.inputs import MODELS, config, linears
from benchmarks.gpu.instructions import BLOCK, CAPABILITY, issue_share, main_loop
from benchmarks.page_tables.sources import results
from vila_deploy.bench.predict import ATTENTION
from vila_deploy.kernels.tile_config import (
    attention_shared_bytes,
    attention_splits,
    gate_up_tile,
    gemv_tile,
)

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x1 */
        /*0010*/              @!P0 BRA 0x00b0 ;                /* 0x2 */
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;     /* 0x3 */
        /*0030*/               @P1 BRA 0x0020 ;                /* 0x4 */
        /*0040*/                   LDGSTS.E.128 [R3], [R4] ;   /* 0x5 */
        /*0050*/               @P2 ISETP.LT.AND P0, PT, R2 ;   /* 0x6 */
        /*0060*/                   HMMA.16816.F32 R4, R8, R2 ; /* 0x7 */
        /*0070*/                   HMMA.16816.F32 R4, R9, R2 ; /* 0x8 */
        /*0080*/               @P1 BRA `(.L_x_1) 0x0040 ;      /* 0x9 */
        /*0090*/                   EXIT ;                      /* 0xa */
        /*00a0*/                   BRA 0x00a0 ;                /* 0xb */
"""
ATTENTION_SASS = """
        /*0000*/               @!P0 EXIT ;                     /* 0x1 */
        /*0010*/                   LDGSTS.E.128 [R3], [R4] ;   /* 0x2 */
        /*0020*/                   HMMA.16816.F32 R4, R8, R2 ; /* 0x3 */
        /*0030*/               @P1 BRA 0x0020 ;                /* 0x4 */
        /*0040*/                   STG.E [R3], R4 ;            /* 0x5 */
        /*0050*/                   ATOMG.E.ADD.STRONG.GPU PT ; /* 0x6 */
        /*0060*/               @P2 EXIT ;                      /* 0x7 */
        /*0070*/                   LDG.E R3, [R4] ;            /* 0x8 */
        /*0080*/                   EXIT ;                      /* 0x9 */
        /*0090*/                   BRA 0x0090 ;                /* 0xa */
"""
ROWS, ATTENTION_ROWS = results("gpu-instructions"), results("gpu-attention")


def test_the_loop_with_the_products_is_found() -> None:
    loop = main_loop(SASS)
    assert len(loop.instructions) == 5
    assert (loop.count("HMMA"), loop.count("LDGSTS"), loop.count("SEL", "ISETP")) == (2, 1, 1)


def test_all_issue_slots_are_taken_by_as_many_instructions_as_there_are() -> None:
    """132 multiprocessors · 4 · 1.98 GHz for 4.3 TB/s of 4.25 bits a weight: 4.13 a weight."""
    assert issue_share(4.13) == pytest.approx(1.0, rel=2e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['model']}-{row['product']}")
def test_a_row_is_of_todays_tile_and_leaves_room(row: dict[str, float]) -> None:
    tile = (gate_up_tile if row["product"] == "gate_up" else gemv_tile)(
        CAPABILITY, int(row["out"]), int(row["in"]) // BLOCK
    )
    assert (row["rows"], row["split"], row["stages"]) == (tile.rows, tile.split, tile.stages)
    assert row["stack_bytes"] == 0
    assert row["waves"] <= 1 or row["waves"] % 1 >= 0.5
    assert row["issue_share"] <= 0.6
    whole = (row["stages"] - 1) * row["split"] >= row["in"] / BLOCK
    assert row["kib_in_flight"] >= 26 or whole


def test_every_product_of_every_model_has_a_row() -> None:
    found = {(row["model"], row["product"], (row["out"], row["in"])) for row in ROWS}
    assert found == {
        (model, name, shape)
        for model in MODELS
        for name, shape in linears(config(model, "int4", small=False)).items()
        if name != "head"
    }


def test_the_parts_of_attention_are_told_apart() -> None:
    assert parts(ATTENTION_SASS) == Parts(ahead=2, loop=2, behind=2, merging=3)


def test_attention_of_every_model_has_a_row_for_each_form() -> None:
    found = [(row["model"], row["warps"], row["splits"]) for row in ATTENTION_ROWS]
    assert found == [
        (model, warps, attention_splits(CAPABILITY, sizes.num_kv_heads, MAX_SEQ_LEN, programs))
        for model in MODELS
        for sizes in [config(model, "int4", small=False)]
        for warps, programs in FORMS.items()
    ]


@pytest.mark.parametrize("row", ATTENTION_ROWS, ids=lambda row: f"{row['model']}-{row['warps']}")
def test_what_is_predicted_rests_on_the_code(row: dict[str, int]) -> None:
    assert row["stack_bytes"] == 0
    assert row["shared_bytes"] == attention_shared_bytes(CAPABILITY)
    if row["warps"] == ATTENTION.warps:
        assert row["ahead"] == pytest.approx(ATTENTION.ahead, abs=2)
        assert row["loop"] == pytest.approx(ATTENTION.loop, abs=2)
        behind = ATTENTION.behind + ATTENTION.split * row["splits"]
        assert row["behind"] + row["merging"] == pytest.approx(behind, rel=0.03)
