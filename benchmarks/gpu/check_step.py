"""A whole decoding step of two layers against the references of its kernels, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu.environment import Run
from benchmarks.gpu.inputs import random_llm
from vila_deploy.backends.native.decode_step import Cache, DecodeStep, StepConfig
from vila_deploy.backends.native.weights import PackedLlm
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.kernels.add_residual import add_residual_reference
from vila_deploy.kernels.attention import attention_reference
from vila_deploy.kernels.embed import embed_reference
from vila_deploy.kernels.gate_up import gate_up_reference
from vila_deploy.kernels.head import head_reference
from vila_deploy.kernels.norm_qkv import norm_qkv_reference
from vila_deploy.kernels.rope_kv import rope_kv_reference
from vila_deploy.kernels.tile_config import TOKENS

LAYERS, MAX_SEQ_LEN = 2, 256
# ‖found − reference‖ / ‖reference‖ behind two layers of float16 activations: 6e-4 in the
# interpreter at small shapes.
STEP_LIMIT = 3e-3


def check_step(run: Run, sizes: LlmConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits and the new keys and values, and their references."""
    sizes = replace(sizes, num_layers=LAYERS)
    at = 20 if run.small else 200
    llm = random_llm(sizes, MAX_SEQ_LEN, run.device)
    cache = Cache(sizes, MAX_SEQ_LEN, run.device)
    for tensor in (cache.keys, cache.values):
        tensor.normal_()
    config = StepConfig(sizes, MAX_SEQ_LEN, run.capability, run.device)
    step = DecodeStep(config, llm, cache)
    step.token.fill_(3)
    cache.position.fill_(at)
    keys, values = cache.keys.clone(), cache.values.clone()
    expected = step_reference(sizes, llm, keys, values, 3, at)
    step()
    yield step.logits, expected
    yield cache.keys[:, :, at], keys[:, :, at]
    yield cache.values[:, :, at], values[:, :, at]


def step_reference(
    sizes: LlmConfig, llm: PackedLlm, keys: Tensor, values: Tensor, token: int, at: int
) -> Tensor:
    """Return logits [1, vocabulary] in float32; `keys` and `values` get the new vectors."""
    heads, kv_heads, epsilon = sizes.num_heads, sizes.num_kv_heads, sizes.rms_norm_eps
    device, layers = llm.table.device, llm.layers
    position = torch.tensor([at], dtype=torch.int32, device=device)
    given = torch.tensor([token], device=device)
    residual, x, total = embed_reference(given, llm.table, layers[0].input_norm.weight)
    next_norms = [layer.input_norm for layer in layers[1:]] + [llm.norm]
    for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
        qkv = norm_qkv_reference(
            x, _squares(total), layer.qkv, layer.qkv_bias, epsilon, layer.input_norm.prescale
        )
        q, key, value = rope_kv_reference(qkv, llm.cos, llm.sin, position, heads, kv_heads)
        keys[index][:, at : at + 1], values[index][:, at : at + 1] = key.half(), value.half()
        attended = attention_reference(q, keys[index], values[index], position)
        residual, x, total = add_residual_reference(
            attended, layer.o, layer.post_norm.weight, residual
        )
        inner = gate_up_reference(
            x, _squares(total), layer.gate_up, sizes.intermediate_size, epsilon,
            layer.post_norm.prescale,
        )  # fmt: skip
        residual, x, total = add_residual_reference(inner, layer.down, next_norm.weight, residual)
    return head_reference(x, _squares(total), llm.head, epsilon, llm.norm.prescale)


def _squares(total: Tensor) -> Tensor:
    """Return sums of squares [tokens] as a kernel leaves them, [1, 8]."""
    squares = torch.zeros(1, TOKENS, device=total.device)
    squares[0, : len(total)] = total
    return squares
