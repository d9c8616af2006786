"""A prompt's tokens through the decoder as a list of launches over fixed buffers, like a step's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vila_deploy.backends.native.decode_step import Cache, StepConfig
from vila_deploy.backends.native.slot_caches import SlotCaches
from vila_deploy.backends.native.weights import Norm, PackedLlm
from vila_deploy.kernels.linear import Call, is_dense, product_calls
from vila_deploy.kernels.packed_linear import PackedLinear
from vila_deploy.kernels.prompt_attention import prompt_attention
from vila_deploy.kernels.prompt_norm import prompt_norm
from vila_deploy.kernels.rope_kv import rope_kv
from vila_deploy.kernels.swiglu import swiglu


class PromptBuffers:
    """What passes over up to `tokens` tokens share: one of them runs at a time.

    `residual` float32 [tokens, hidden] holds the embeddings first; `span` int32 [3] says where they
    belong, as `prompt_attention` takes it.
    """

    def __init__(self, config: StepConfig, llm: PackedLlm, tokens: int):
        sizes, layer = config.llm, llm.layers[0]

        def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=config.device)

        hidden, heads, dim = sizes.hidden_size, sizes.num_heads, sizes.head_dim
        self.span = buffer(3, dtype=torch.int32)
        self.residual, self.added = (
            buffer(tokens, hidden, dtype=torch.float32) for _ in range(2)
        )  # fmt: skip
        self.x, self.attended = buffer(tokens, hidden), buffer(tokens, heads * dim)
        self.qkv, self.q = buffer(tokens, layer.qkv.out_features), buffer(tokens, heads, dim)
        self.pairs = buffer(tokens, layer.gate_up.out_features)
        self.inner = buffer(tokens, sizes.intermediate_size)
        self.scale = buffer(tokens, dtype=torch.float32)
        weights = (layer.qkv, layer.o, layer.gate_up, layer.down)
        widest = [w.out_features * w.in_features for w in weights
                  if is_dense(tokens, w, config.capability)]  # fmt: skip
        self.dense = buffer(max(widest)) if widest else None


class PromptPass:
    """`calls` append up to `tokens` tokens to a slot and leave their residual behind each layer.

    The caller fills `span` and the first rows of `residual`. Rows behind the span's tokens are
    computed too, and change neither the cache nor a bit of the others.
    """

    def __init__(
        self,
        config: StepConfig,
        llm: PackedLlm,
        caches: Cache | SlotCaches,
        buffers: PromptBuffers,
        tokens: int,
    ):
        self._config, self._llm, self._caches = config, llm, caches
        self._buffers, self._tokens = buffers, tokens
        self.calls = tuple(self._calls())
        # Those of other layers are the same kernels.
        self.first_layer = self.calls[: 1 + (len(self.calls) - 1) // len(llm.layers)]

    def __call__(self) -> None:
        for call in self.calls:
            call()

    def _rows(self, *buffers: Tensor) -> Sequence[Tensor]:
        return [buffer[: self._tokens] for buffer in buffers]

    def _calls(self) -> list[Call]:
        llm, of = self._llm, self._buffers
        calls: list[Call] = [self._norm(llm.layers[0].input_norm)]
        next_norms = [layer.input_norm for layer in llm.layers[1:]] + [llm.norm]
        for index, (layer, next_norm) in enumerate(zip(llm.layers, next_norms, strict=True)):
            calls += self._product(of.x, layer.qkv, of.qkv, layer.qkv_bias)
            calls += self._attention(index)
            calls += self._product(of.attended, layer.o, of.added)
            calls.append(self._norm(layer.post_norm, of.added))
            calls += self._product(of.x, layer.gate_up, of.pairs)
            pairs, inner, scale = self._rows(of.pairs, of.inner, of.scale)
            calls.append(swiglu(pairs, inner, scale, self._config.capability))
            calls += self._product(of.inner, layer.down, of.added)
            calls.append(self._norm(next_norm, of.added, of.scale))
        return calls

    def _norm(self, norm: Norm, added: Tensor | None = None, scale: Tensor | None = None) -> Call:
        residual, x = self._rows(self._buffers.residual, self._buffers.x)
        if added is not None:
            (added,) = self._rows(added)
        if scale is not None:
            (scale,) = self._rows(scale)
        config = self._config
        return prompt_norm(
            residual, added, scale, norm.weight, x, config.llm.rms_norm_eps, norm.prescale,
            config.capability,
        )  # fmt: skip

    def _product(
        self, x: Tensor, weight: PackedLinear, y: Tensor, bias: Tensor | None = None
    ) -> list[Call]:
        x, y = self._rows(x, y)
        capability = self._config.capability
        return product_calls(x, weight, bias, y, capability, self._buffers.dense)

    def _attention(self, index: int) -> list[Call]:
        """Write the cache before the tokens attend, since they see each other in it."""
        llm, span = self._llm, self._buffers.span
        keys, values, scales = self._caches.layer(index)
        qkv, q, out = self._rows(self._buffers.qkv, self._buffers.q, self._buffers.attended)
        return [
            rope_kv(qkv, llm.cos, llm.sin, span, q, keys, values, scales),
            prompt_attention(q, keys, values, span, out, self._config.capability, scales),
        ]
