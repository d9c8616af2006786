"""Print as JSON what is compiled when a native engine opens; a process of its own: not interpreted.

missing: kernels that prompts of some length launch, and opening doesn't compile.
counts: of two calls, kernels compiled and found, in an empty cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace

import torch

from vila_deploy.backends.native import compile_ahead as module
from vila_deploy.backends.native.compile import ONE_BY_ONE
from vila_deploy.backends.native.compile_ahead import KernelSet, compile_ahead
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.prompts import Prompts
from vila_deploy.backends.native.rows_step import RowsStep
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.backends.native.weights import empty_llm
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.kernels.aot import distinct
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import LAUNCH_MODES, PREFERRED, LaunchMode

H100, MAX_SEQ_LEN = ComputeCapability(9, 0), 1024
LENGTHS = (1, 2, 9, 17, 33, 48, 213, 256, 300)


def missing(
    model: str, modules: ModulePrecision, mode: LaunchMode = ONE_BY_ONE, *, several: bool = False
) -> list[str]:
    config = preset(model, "int4").llm
    compiled = KernelSet(config, MAX_SEQ_LEN, H100, modules, mode, several=several).launches()
    launched: list[Launch] = []
    call, Launch.__call__ = Launch.__call__, lambda self: launched.append(self)
    config = replace(config, num_layers=2)
    llm = empty_llm(config, MAX_SEQ_LEN, lm_head=modules.lm_head)
    step_config = StepConfig(config, MAX_SEQ_LEN, H100, "meta", mode)
    steps: list[DecodeStep]
    if several:
        caches = SlotCaches(config, MAX_SEQ_LEN, 8, "meta", modules.kv_cache)
        cache: Cache | SlotCaches = caches
        steps = [RowsStep(step_config, llm, caches, rows) for rows in (1, 2, 4, 8)]
    else:
        cache = Cache(config, MAX_SEQ_LEN, "meta", modules.kv_cache)
        steps = [DecodeStep(step_config, llm, cache)]
    prompts = Prompts(step_config, llm, cache, steps[0])
    for tokens in LENGTHS:
        embeds = torch.empty(tokens, config.hidden_size, device="meta")
        prompts.append(embeds, 0)
    steps[0].draw()
    for step in steps:
        step()
        step(sampled=True)
    Launch.__call__ = call
    known = len(distinct(compiled))
    return [launch.name for launch in distinct([*compiled, *launched])[known:]]


def counts() -> list[list[int]]:
    few = KernelSet(preset("VILA1.5-3b", "int4").llm, MAX_SEQ_LEN, H100)
    launches = [one for one in few.launches() if one.name in ("argmax_kernel", "embed_kernel")]
    module.session_launches = lambda *_, several: launches
    said: list[int] = []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for _ in range(2):
            count = compile_ahead([few, few], 0, said.append)
            found.append([count.kernels, count.compiled, count.found])
    return [*found, said]


if __name__ == "__main__":
    small = ModulePrecision(lm_head="int4", kv_cache="int8")
    rows = [
        missing("VILA1.5-3b", ModulePrecision()),
        missing("NVILA-8B", small),
        missing("NVILA-8B", small, several=True),
        missing("NVILA-8B", small, LAUNCH_MODES[PREFERRED], several=True),
    ]
    print(json.dumps({"missing": rows, "counts": counts()}))
