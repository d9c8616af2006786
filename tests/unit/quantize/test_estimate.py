"""What --plan of vila-quantize says of memory and time against what torch itself counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.data.data_size import TEMPLATE_TOKENS, DataSize, data_size
from vila_deploy.data.examples import Example, LazyImage
from vila_deploy.formats.base import QuantScheme
from vila_deploy.quantize.algorithms.gptq import gptq_quantize
from vila_deploy.quantize.algorithms.hessian import HessianAccumulator, HessianFactor
from vila_deploy.quantize.estimate import time
from vila_deploy.quantize.estimate.memory import FLOAT32, MemoryEstimate
from vila_deploy.quantize.estimate.plan import plan
from vila_deploy.quantize.estimate.time import OperationCost, Speed
from vila_deploy.quantize.options import QuantizeOptions

ROWS, COLUMNS, GROUP = 768, 512, 64
SCHEME = QuantScheme(GROUP, False)
CONFIG: VilaConfig = preset("VILA1.5-3b", "fp16")
ESTIMATE = MemoryEstimate(CONFIG, GROUP, 0)


def test_activations_that_do_not_stay_in_memory_are_planned_on_the_disk() -> None:
    config = preset("VILA1.5-13b", "fp16")
    asked = QuantizeOptions(QuantScheme(128, False))
    assert plan(config, asked, DataSize(1024)).scratch_bytes == 0
    # 65,536 tokens: three of 5120 channels beside what enters down_proj, or four.
    states, inner = 65536 * 5120 * 4, 65536 * 13824 * 4
    assert plan(config, asked).scratch_bytes == 2 * states + max(2 * states, inner)
    assert plan(config, QuantizeOptions(asked.scheme, "awq")).scratch_bytes == 0


def allocated(work: Callable[[], object]) -> int:
    """The most bytes that torch has at a time more than before, by its own allocator's account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


def hessian() -> HessianAccumulator:
    accumulator = HessianAccumulator(COLUMNS)
    accumulator.add(torch.randn(2 * COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)))
    return accumulator


@pytest.fixture(scope="module")
def factor() -> HessianFactor:
    return hessian().factor()


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


def test_memory_of_gptq(factor: HessianFactor) -> None:
    own = weight()
    measured = allocated(lambda: gptq_quantize(own, factor, SCHEME, "w"))
    assert ESTIMATE._gptq(COLUMNS, ROWS) == pytest.approx(measured, rel=0.15)


def test_memory_of_factoring_the_hessian() -> None:
    accumulator = hessian()
    # Two besides the Hessian itself, which is there already.
    assert allocated(accumulator.factor) == pytest.approx(2 * FLOAT32 * COLUMNS**2, rel=0.15)


def _addmm_operations(own: torch.Size, left: torch.Size, right: torch.Size, **rest: object) -> int:
    return 2 * left[0] * left[1] * right[1]


def test_products_of_gptq(factor: HessianFactor) -> None:
    # torch counts addmm, but not in place.
    in_place = {torch.ops.aten.addmm_: _addmm_operations}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        gptq_quantize(weight(), factor, SCHEME, "w")
    counted = time._gptq(ROWS, COLUMNS, 0, error_correction=False).flops
    # What stays within a block of 64 channels is done row by row, which torch doesn't count.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_true_shapes_of_13b_take_less_than_8_gb() -> None:
    config, data = preset("VILA1.5-13b", "fp16"), DataSize(1024)
    for algorithm in ("rtn", "awq-gptq"):
        options = QuantizeOptions(QuantScheme(), algorithm)
        assert plan(config, options, data, data).device_bytes < 8e9


def test_more_tokens_take_more_memory_until_they_lie_in_a_file() -> None:
    few, many, more = (ESTIMATE.awq_gptq(tokens) for tokens in (4096, 65536, 1 << 20))
    assert many - few > 1.8 * (65536 - 4096) * CONFIG.llm.hidden_size * FLOAT32
    assert more < many


def test_seconds_of_each_stage() -> None:
    slow, fast = Speed(1e9, 1e8, 1e-5), Speed(2e9, 2e8, 5e-6)
    options = QuantizeOptions(SCHEME)
    planned, faster = (plan(CONFIG, options, speed=speed) for speed in (slow, fast))
    assert planned.seconds == pytest.approx(sum(s.seconds or 0 for s in planned.steps))
    assert faster.seconds == pytest.approx(planned.seconds / 2 if planned.seconds else None)
    unknown = plan(CONFIG, options)
    assert unknown.seconds is None
    assert {stage["seconds"] for stage in unknown.to_json()["stages"]} == {None}


def test_an_algorithm_that_does_more_takes_longer() -> None:
    speed = Speed(1e10, 1e9, 1e-5)
    seconds = [
        time.round_to_nearest(CONFIG).seconds(speed),
        time.awq_gptq(CONFIG, 1024, GROUP).seconds(speed),
        time.awq_gptq(CONFIG, 16384, GROUP).seconds(speed),
        time.awq(CONFIG, 16384).seconds(speed),
    ]
    assert seconds == sorted(seconds)


def test_seconds_of_an_effort() -> None:
    own = (OperationCost(2.0, 3.0, 4.0) + OperationCost(flops=2.0)) * 10
    assert own.seconds(Speed(4.0, 3.0, 0.5)) == 10 + 10 + 20


def test_probe_is_of_this_computer() -> None:
    speed = time.probe(dataclasses.replace(CONFIG))
    assert 1e6 < speed.flops < 1e15
    assert 1e5 < speed.bytes < 1e13
    assert 1e-8 < speed.call_s < 1


def test_amount_of_data() -> None:
    texts = [Example("x" * 400)] * 100
    assert data_size(CONFIG, texts, 128) == DataSize(100 * 101)
    assert data_size(CONFIG, texts, 2) == DataSize(2 * 512)
    image = LazyImage("p", lambda: None)  # type: ignore[arg-type, return-value]
    asked = [Example("y" * 40, "z" * 40, (image,))] * 3
    each = CONFIG.tokens_per_block
    spliced = 3 * (TEMPLATE_TOKENS + 20 + each)
    assert data_size(CONFIG, asked, 128) == DataSize(spliced, each, 1, 1)
    # Images take at most half as long as there is text for the others.
    half = data_size(CONFIG, texts + asked, 2)
    assert half.tokens == 512 + TEMPLATE_TOKENS + 20 + each
