"""One decoding step as a list of kernel launches over fixed buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vila_deploy.backends.native.float16_range import fit_into_float16
from vila_deploy.backends.native.weights import Layer, Norm, PackedLlm
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.engine.precision import FP16
from vila_deploy.kernels.add_residual import add_residual
from vila_deploy.kernels.argmax import argmax
from vila_deploy.kernels.attention import SplitScratch, attention, rope_attention
from vila_deploy.kernels.capability import ComputeCapability
from vila_deploy.kernels.embed import embed
from vila_deploy.kernels.fused_layer import PHASES, fused_layer
from vila_deploy.kernels.gate_up import gate_up
from vila_deploy.kernels.head import head
from vila_deploy.kernels.kv_int8 import dequantize_vectors
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.launch_mode import LaunchMode
from vila_deploy.kernels.next_weights import link_weights
from vila_deploy.kernels.norm_qkv import norm_qkv
from vila_deploy.kernels.rope_kv import Scales, rope_kv
from vila_deploy.kernels.sample import sample
from vila_deploy.kernels.tile_config import TOKENS, attention_splits, gemv_programs


def zero_vectors(
    shape: tuple[int, ...], device: str, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return keys and values [..., dim], and in int8 scales of both, float16 [2, ...]."""
    kind = torch.float16 if dtype == FP16 else torch.int8
    keys, values = (torch.zeros(shape, dtype=kind, device=device) for _ in range(2))
    if dtype == FP16:
        return keys, values, None
    return keys, values, torch.zeros((2, *shape[:-1]), dtype=torch.float16, device=device)


class Cache:
    """Keys and values of one sequence, float16 [layers, kv_heads, max_seq_len, dim].

    `position` int32 [1] counts the tokens in it. In int8 there are `scales` beside keys and values,
    float16 [2, layers, kv_heads, max_seq_len].
    """

    def __init__(self, config: LlmConfig, max_seq_len: int, device: str, dtype: str = FP16):
        shape = (config.num_layers, config.num_kv_heads, max_seq_len, config.head_dim)
        self._take(*zero_vectors(shape, device, dtype))

    @classmethod
    def of_vectors(
        cls, keys: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None
    ) -> Cache:
        """Return a cache over vectors that lie elsewhere."""
        cache = cls.__new__(cls)
        cache._take(keys, values, scales)
        return cache

    def _take(
        self, keys: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None
    ) -> None:  # fmt: skip
        self.keys, self.values, self.scales = keys, values, scales
        self.position = torch.zeros(1, dtype=torch.int32, device=keys.device)
        # The token that follows the last position is kept too.
        history_len = keys.shape[2] + 1
        self.history = torch.zeros(history_len, dtype=torch.int32, device=keys.device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes, and that every later step reads of it."""
        tensors = [self.keys, self.values, *([] if self.scales is None else [self.scales])]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return size // self.keys.shape[2]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
        """Return keys, values and their scales of a layer, as the kernels take them."""
        scales = None if self.scales is None else (self.scales[0, index], self.scales[1, index])
        return self.keys[index], self.values[index], scales

    def between(self, start: int, end: int) -> list[torch.Tensor]:
        """Return all layers' keys, values and scales of the positions [start, end), as views."""
        vectors = [tensor[:, :, start:end] for tensor in (self.keys, self.values)]
        return vectors if self.scales is None else [*vectors, self.scales[..., start:end]]

    def read(self, index: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float16 keys and values [kv_heads, end, dim] of a layer."""
        keys, values, scales = self.layer(index)
        keys, values = keys[:, :end], values[:, :end]
        if scales is None:
            return keys, values
        key_scales, value_scales = (scale[:, :end] for scale in scales)
        return dequantize_vectors(keys, key_scales), dequantize_vectors(values, value_scales)


@dataclass(frozen=True)
class StepConfig:
    """What launches depend on besides the weights.

    Args:
        device: torch's name of the device that buffers are on.
        launch_mode: how the kernels follow each other.
        preferred_mode: takes its place when a session opens, if it gives the same bytes.
    """

    llm: LlmConfig
    max_seq_len: int
    capability: ComputeCapability
    device: str
    launch_mode: LaunchMode = field(default_factory=LaunchMode)
    preferred_mode: LaunchMode | None = None


class DecodeStep:
    """`launches` turn `token` [tokens] at the cache's position into `logits` and the next token.

    With one token, the step also moves the position on and leaves the next token in `token`, so
    that it can be replayed without the host; `sampled` is the same but draws it, as `settings`
    (1 / temperature, top_p) and the number in `uniform` of its position say. With more (up to 8),
    each token sees those before it, `token` becomes the greedy successor of each, and the position
    stays: the caller moves it behind the tokens that it accepts.

    Raises:
        VilaDeployError: the GPU lacks what the launch mode takes.
    """

    def __init__(self, config: StepConfig, llm: PackedLlm, cache: Cache, tokens: int = 1):
        sizes, device, capability = config.llm, config.device, config.capability
        config.launch_mode.check(capability)
        self._config, self._llm, self._cache = config, llm, cache
        hidden, heads, dim = sizes.hidden_size, sizes.num_heads, sizes.head_dim
        width = (heads + 2 * sizes.num_kv_heads) * dim

        def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._allocate_inputs(tokens)
        self.logits = buffer(tokens, sizes.vocab_size, dtype=torch.float32)
        self._residual = buffer(tokens, hidden, dtype=torch.float32)
        self._x, self._attended = buffer(tokens, hidden), buffer(tokens, heads * dim)
        self._inner = buffer(tokens, sizes.intermediate_size)
        self._qkv, self._q = buffer(tokens, width), buffer(tokens, heads, dim)
        self._first_squares = buffer(1, TOKENS, dtype=torch.float32)
        self._squares = buffer(gemv_programs(capability, hidden), TOKENS, dtype=torch.float32)
        splits = attention_splits(capability, sizes.num_kv_heads, config.max_seq_len)
        self._scratch = SplitScratch(tokens, heads, dim, splits, device)
        head_programs = gemv_programs(capability, sizes.vocab_size)
        self._best = buffer(head_programs, TOKENS, dtype=torch.float32)
        self._index = buffer(head_programs, TOKENS, dtype=torch.int32)
        self._arrivals = buffer(1, dtype=torch.int32)
        self.launches = tuple(self._launches())
        self.sampled = self._sampled_launches()

    def _allocate_inputs(self, tokens: int) -> None:
        device = self._config.device
        self.token = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.uniform = torch.zeros(len(self._cache.history), device=device)
        self.settings = torch.zeros(2, device=device)
        # Whether a step moves the position on and attends without `rope_kv`.
        self._advances = tokens == 1

    def _sampled_launches(self) -> tuple[Launch, ...]:
        if not self._advances:
            return ()
        return (*self.launches[:-1], *self._with_pdl([self._sample(step=True)]))

    def __call__(self, *, sampled: bool = False) -> None:
        for launch in self.sampled if sampled else self.launches:
            launch()

    def draw(self) -> None:
        """Draw `token` from the logits of the last step or prompt, in place of the greedy one."""
        self._sample(step=False)()

    def after_prompt(self) -> list[Launch]:
        """Return what `finish` and `draw` launch."""
        return [self._head(), self._argmax(step=False), self._sample(step=False)]

    def finish(self, residual: torch.Tensor) -> None:
        """Compute logits, and the greedy token into `token`, of the last layer's residual [hidden].

        The residual is float32.
        """
        normed = (residual * self._llm.norm.weight)[None]
        # RMSNorm takes out of its sum of squares again what is divided here.
        self._x[:1], scale = fit_into_float16(normed)
        self._squares.zero_()
        self._squares[0, 0] = (residual / scale[0]).square().sum()
        for launch in (self._head(), self._argmax(step=False)):
            launch()

    def _launches(self) -> list[Launch]:
        llm = self._llm
        norm = llm.layers[0].input_norm
        launches = [
            embed(self.token, llm.table, norm.weight, self._residual, self._x, self._first_squares)
        ]
        next_norms = [layer.input_norm for layer in llm.layers[1:]] + [llm.norm]
        for index, (layer, next_norm) in enumerate(zip(llm.layers, next_norms, strict=True)):
            launches += self._layer(index, layer, next_norm)
        if self._advances and self._config.launch_mode.fuse_layers:
            launches = self._fuse_layers(launches)
        launches = [*launches, self._head(), self._argmax(step=self._advances)]
        if self._config.launch_mode.prefetch_next:
            launches = link_weights(launches, self._config.capability)
        return self._with_pdl(launches)

    def _with_pdl(self, launches: list[Launch]) -> list[Launch]:
        if not self._config.launch_mode.pdl:
            return launches
        return [launch.with_pdl() for launch in launches]

    def _fuse_layers(self, launches: list[Launch]) -> list[Launch]:
        """Join what stands between one attention and the next into one launch each."""
        attention_launches = 1 if self._config.launch_mode.merge_attention else 2
        # Ahead are embed, q, k and v and attention of the first layer; three of the last are left.
        start, end = 2 + attention_launches, len(launches) - 3
        fused = launches[:start]
        for first in range(start, end, PHASES + attention_launches):
            behind = first + PHASES
            phases = launches[first:behind]
            fused += fused_layer(phases, self._arrivals, self._config.capability)
            fused += launches[behind : behind + attention_launches]
        return [*fused, *launches[end:]]

    def _head(self) -> Launch:
        norm = self._llm.norm
        return head(
            self._x, self._squares, self._llm.head, self.logits, self._best, self._index,
            self._config.llm.rms_norm_eps, norm.prescale, self._config.capability,
        )  # fmt: skip

    def _argmax(self, *, step: bool) -> Launch:
        cache = self._cache
        return argmax(
            self._best, self._index, self.token, cache.history, cache.position, step=step
        )  # fmt: skip

    def _sample(self, *, step: bool) -> Launch:
        cache = self._cache
        return sample(
            self.logits[:1], self.uniform, self.settings, self.token, cache.history,
            cache.position, step=step,
        )  # fmt: skip

    def _layer(self, index: int, layer: Layer, next_norm: Norm) -> list[Launch]:
        capability, epsilon = self._config.capability, self._config.llm.rms_norm_eps
        squares = self._first_squares if index == 0 else self._squares
        return [
            norm_qkv(
                self._x, squares, layer.qkv, layer.qkv_bias, self._qkv, epsilon,
                layer.input_norm.prescale, capability,
            ),
            *self._attention(index),
            add_residual(
                self._attended, layer.o, layer.post_norm.weight, self._residual, self._x,
                self._squares, capability,
            ),
            gate_up(
                self._x, self._squares, layer.gate_up, self._inner, epsilon,
                layer.post_norm.prescale, capability,
            ),
            add_residual(
                self._inner, layer.down, next_norm.weight, self._residual, self._x, self._squares,
                capability,
            ),
        ]  # fmt: skip

    def _attention(self, index: int) -> tuple[Launch, ...]:
        """Write the cache before several tokens attend, since they see each other in it."""
        llm, cache, capability = self._llm, self._cache, self._config.capability
        (keys, values, scales), position = cache.layer(index), cache.position
        if self._advances:
            return rope_attention(
                self._qkv, (llm.cos, llm.sin), keys, values, position, self._attended,
                self._scratch, capability, scales,
                merged=self._config.launch_mode.merge_attention,
            )  # fmt: skip
        rope = rope_kv(self._qkv, llm.cos, llm.sin, position, self._q, keys, values, scales)
        return rope, *attention(
            self._q, keys, values, position, self._attended, self._scratch, capability, scales
        )
