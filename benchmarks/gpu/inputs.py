"""Random weights and activations, made on the device in no time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vila_deploy.backends.native.pinned import pinned
from vila_deploy.backends.native.weights import PackedLlm, empty_llm, map_tensors
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.checkpoint.presets import preset
from vila_deploy.kernels.packed_linear import ZERO_UNIT, PackedLinear, empty_like_packed
from vila_deploy.onnx_export.rotary import rotary_tables

# The shapes: label → preset.
MODELS = {
    "3B": "VILA1.5-3b",
    "8B": "Llama-3-VILA1.5-8B",
    "13B": "VILA1.5-13b",
    "40B": "VILA1.5-40b",
}
Q_SPREAD = 4.7  # standard deviation of q − zero point


def config(model: str, precision: str, *, small: bool) -> LlmConfig:
    """Return a model of the table, or one of its kind that the interpreter can run."""
    llm = preset(MODELS[model], precision).llm
    if not small:
        return llm
    group = llm.num_heads // llm.num_kv_heads
    return replace(
        llm, hidden_size=128, intermediate_size=256, num_layers=1, num_heads=group,
        num_kv_heads=1, head_dim=32, vocab_size=96,
    )  # fmt: skip


def random_packed(
    out_features: int, in_features: int, bits: int, device: str, group: int = 128
) -> PackedLinear:
    """Return a weight of unit gain: outputs are as large as inputs."""
    packed = empty_like_packed(out_features, in_features, bits, group, device)
    fill(packed.words, in_features)
    if bits < 16:
        _fill_scales(packed.scale_zero, in_features, bits)
    return packed


def random_llm(
    sizes: LlmConfig,
    max_seq_len: int,
    device: str,
    lm_head: str = "fp16",
    table_in_host: bool = False,
) -> PackedLlm:
    """Return a decoder with random weights of unit gain and norms of 1."""
    empty = empty_llm(sizes, max_seq_len, lm_head=lm_head)
    tables = dict(zip(("cos", "sin"), rotary_tables(sizes, max_seq_len), strict=True))

    def make(name: str, tensor: Tensor) -> Tensor:
        if name == "table" and table_in_host:
            return pinned(torch.empty(tensor.shape, dtype=tensor.dtype).normal_(), device)
        if name in tables:
            return tables[name].to(device)
        real = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        inputs = sizes.hidden_size
        if ".down." in name:
            inputs = sizes.intermediate_size
        if name.endswith("scale_zero"):
            real.zero_()
            if tensor.numel() > 1:  # float16 weights have none
                _fill_scales(real, inputs, empty.head.bits if name.startswith("head") else 4)
        elif name.endswith("norm.weight"):
            real.fill_(1.0)
        elif name.endswith("bias"):
            real.zero_()
        else:
            fill(real, inputs)
        return real

    return map_tensors(empty, make)


def fill(tensor: Tensor, inputs: int) -> None:
    """Fill with any quantized values, or floats of standard deviation 1 / √inputs."""
    if tensor.dtype == torch.int16:
        tensor.random_(-(2**15), 2**15)
    else:
        tensor.normal_(0.0, inputs**-0.5)


def _fill_scales(scale_zero: Tensor, inputs: int, bits: int) -> None:
    halves = scale_zero.view(torch.float16).unflatten(-1, (-1, 2))
    spread = Q_SPREAD if bits == 4 else 74.0
    halves[..., 0].fill_(inputs**-0.5 / spread)
    zero_points = torch.randint(6, 10, halves.shape[:-1], device=scale_zero.device)
    halves[..., 1] = -ZERO_UNIT * (zero_points if bits == 4 else torch.full_like(zero_points, 128))


def linears(sizes: LlmConfig) -> dict[str, tuple[int, int]]:
    """Return name → (out, in) of a layer's products and of the head."""
    hidden, inner, dim = sizes.hidden_size, sizes.intermediate_size, sizes.head_dim
    queries = sizes.num_heads * dim
    return {
        "qkv": (queries + 2 * sizes.num_kv_heads * dim, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (sizes.vocab_size, hidden),
    }
