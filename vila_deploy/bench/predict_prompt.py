"""Predicted seconds of a prompt in the native backend: its products, and what launches cost.

Launched one by one from the host, kernels wait for it where it is slower than they are; a CUDA
graph is one launch. Constants are named here and in predict.py, each with its source; none was
measured on a GPU of ours. Products count as if the tensor cores were the limit, attention not at
all.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.bench.predict import GAP_S, GPUS, SMALL_KERNEL_S
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.tile_config import widest_gemm

# Of torch's operations and Triton's launches from Python: assumed.
HOST_LAUNCH_S = 16e-6
# Dense float16 with float32 sums (NVIDIA's data sheets).
FLOPS = {"a100": 312e12, "rtx4090": 165e12, "orin": 42e12, "h100": 989e12, "h200": 989e12}
REACHED = 0.5  # by products: assumed
# Launches of a layer: norm, product, rotation, attention, product, norm, product, activation,
# product; four more where weights are written out as float16 first.
KERNELS, DEQUANTIZED = 9, 4
# As it was with torch's operations for norms, activation and sums.
KERNELS_OF_TORCH = 39


@dataclass(frozen=True)
class PromptModel:
    """A prompt of one model on a GPU of GPUS, padded to `tokens`.

    Args:
        kernels: launches of a layer for up to `widest_gemm` tokens.
        graph: they are one CUDA graph.
    """

    llm: LlmConfig
    target: str
    tokens: int
    kernels: int = KERNELS
    graph: bool = True

    @property
    def launches(self) -> int:
        """Launches of the decoder's layers."""
        dense = self.tokens > widest_gemm(GPUS[self.target].capability)
        return self.llm.num_layers * (self.kernels + DEQUANTIZED * dense) + 1

    @property
    def device_seconds(self) -> float:
        """Seconds that the GPU takes."""
        llm = self.llm
        queries, keys = (n * llm.head_dim for n in (llm.num_heads, llm.num_kv_heads))
        weights = llm.hidden_size * (2 * queries + 2 * keys + 3 * llm.intermediate_size)
        flops = 2.0 * self.tokens * weights * llm.num_layers
        small = self.launches * (GAP_S + SMALL_KERNEL_S)
        return flops / (FLOPS[self.target] * REACHED) + small

    @property
    def seconds(self) -> float:
        """Seconds until the last layer is done."""
        if self.graph:
            return self.device_seconds + HOST_LAUNCH_S
        return max(self.device_seconds, self.launches * HOST_LAUNCH_S)
