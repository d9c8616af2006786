"""Decoding steps of small random models, launch by launch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu.inputs import config, random_llm
from tests.support.emulator.capabilities import NEWEST
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.kernels.fused_layer import with_fused_warps
from vila_deploy.kernels.launch_mode import LAUNCH_MODES

POSITIONS, AT = 256, 70
PRODUCTS = {"norm_qkv_kernel", "add_residual_kernel", "gate_up_kernel"}


@dataclass
class RandomStep:
    """A step, and the cache of 70 tokens of noise that it goes on from."""

    step: DecodeStep
    cache: Cache
    tokens: int

    def run(self, *, fused_warps: bool = False) -> list[Tensor]:
        """Execute it; return logits, tokens, keys, values and the position that it leaves.

        Args:
            fused_warps: separate products have as many warps as those of a fused launch.
        """
        for launch in self.step.launches:
            if fused_warps and launch.name in PRODUCTS:
                launch = with_fused_warps(launch)
            launch()
        end, cache = AT + self.tokens, self.cache
        kept = (self.step.logits, self.step.token, cache.keys[:, :, :end], cache.values[:, :, :end])
        return [*kept, cache.position]


def random_step(name: str, tokens: int = 1) -> RandomStep:
    """Return a step in a launch mode of a model with two small layers, on the emulated 9.0."""
    torch.manual_seed(0)
    sizes = replace(config("8B", "int4", small=True), num_layers=2)
    llm = random_llm(sizes, POSITIONS, "cpu")
    step_config = StepConfig(sizes, POSITIONS, NEWEST, "cpu", LAUNCH_MODES[name])
    cache = Cache(sizes, POSITIONS, "cpu")
    step = DecodeStep(step_config, llm, cache, tokens)
    for vectors in (cache.keys, cache.values):
        # What isn't written yet must not be read.
        vectors.normal_()[:, :, AT:] = torch.nan
    cache.position.fill_(AT)
    step.token.fill_(30)
    return RandomStep(step, cache, tokens)
