"""One decoding step as a list of kernel launches over fixed buffers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vila_deploy.backends.native.weights import Layer, Norm, PackedLlm
from vila_deploy.checkpoint.llm_config import LlmConfig
from vila_deploy.formats.module_dtypes import FP16
from vila_deploy.kernels.add_residual import add_residual, parts
from vila_deploy.kernels.argmax import pick
from vila_deploy.kernels.attention import Parts, attention, rope_attention
from vila_deploy.kernels.embed import embed
from vila_deploy.kernels.fused_layer import PHASES, joined
from vila_deploy.kernels.gate_up import gate_up
from vila_deploy.kernels.head import head
from vila_deploy.kernels.kv_int8 import widen_vectors
from vila_deploy.kernels.launch import Launch
from vila_deploy.kernels.norm_qkv import norm_qkv
from vila_deploy.kernels.pdl import Boundaries
from vila_deploy.kernels.rope_kv import Scales, rope_kv
from vila_deploy.kernels.sample import sample
from vila_deploy.kernels.tile_config import TOKENS, attention_splits


class Cache:
    """Keys and values, float16 [layers, kv_heads, slots, dim]; `position` int32 [1] counts them.

    In int8 there are `scales` beside them, float16 [2, layers, kv_heads, slots].
    """

    def __init__(self, config: LlmConfig, slots: int, device: str, dtype: str = FP16):
        shape = (config.num_layers, config.num_kv_heads, slots, config.head_dim)
        kind = torch.float16 if dtype == FP16 else torch.int8
        self.keys = torch.zeros(shape, dtype=kind, device=device)
        self.values = torch.zeros(shape, dtype=kind, device=device)
        self.scales: torch.Tensor | None = None
        if dtype != FP16:
            self.scales = torch.zeros((2, *shape[:-1]), dtype=torch.float16, device=device)
        self.position = torch.zeros(1, dtype=torch.int32, device=device)
        # The token that follows the last slot has a place too.
        self.history = torch.zeros(slots + 1, dtype=torch.int32, device=device)

    @property
    def bytes_per_token(self) -> int:
        """What one token takes, and what every step reads of it again."""
        parts = [self.keys, self.values, *([] if self.scales is None else [self.scales])]
        return sum(part.numel() * part.element_size() for part in parts) // self.keys.shape[2]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor, Scales | None]:
        """Keys, values and their scales of a layer, as the kernels take them."""
        scales = None if self.scales is None else (self.scales[0, index], self.scales[1, index])
        return self.keys[index], self.values[index], scales

    def read(self, index: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float16 keys and values [kv_heads, end, dim] of a layer."""
        keys, values, scales = self.layer(index)
        keys, values = keys[:, :end], values[:, :end]
        if scales is None:
            return keys, values
        return widen_vectors(keys, scales[0][:, :end]), widen_vectors(values, scales[1][:, :end])


@dataclass(frozen=True)
class Sizes:
    """What launches depend on besides the weights."""

    config: LlmConfig
    slots: int
    sm: int
    device: str
    boundaries: Boundaries = field(default_factory=Boundaries)


class DecodeStep:
    """`launches` turn `token` [tokens] at the cache's position into `logits` and the next token.

    With one token, the step also moves the position on and leaves the next token in `token`, so
    that it can be replayed without the host; `sampled` is the same but draws it, as `settings`
    (1 / temperature, top_p) and the number in `uniform` of its position say. With more (up to 8),
    each token sees those before it, `token` becomes the greedy successor of each, and the position
    stays: the caller keeps what it accepts.
    """

    def __init__(self, sizes: Sizes, llm: PackedLlm, cache: Cache, tokens: int = 1):
        config, device = sizes.config, sizes.device
        sizes.boundaries.check(sizes.sm)
        self._sizes, self._llm, self._cache = sizes, llm, cache
        hidden, heads, dim = config.hidden_size, config.num_heads, config.head_dim
        width = (heads + 2 * config.num_kv_heads) * dim

        def buffer(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.token = buffer(tokens, dtype=torch.int32)
        self.logits = buffer(tokens, config.vocab_size, dtype=torch.float32)
        self._stream = buffer(tokens, hidden, dtype=torch.float32)
        self._x, self._attended = buffer(tokens, hidden), buffer(tokens, heads * dim)
        self._inner = buffer(tokens, config.intermediate_size)
        self._qkv, self._q = buffer(tokens, width), buffer(tokens, heads, dim)
        self._first = buffer(1, TOKENS, dtype=torch.float32)
        self._squares = buffer(parts(sizes.sm, hidden), TOKENS, dtype=torch.float32)
        splits = attention_splits(sizes.sm, config.num_kv_heads, sizes.slots)
        self._parts = Parts(tokens, heads, dim, splits, device)
        ends = parts(sizes.sm, config.vocab_size)
        self._best = buffer(ends, TOKENS, dtype=torch.float32)
        self._index = buffer(ends, TOKENS, dtype=torch.int32)
        self.uniform = buffer(len(cache.history), dtype=torch.float32)
        self.settings = buffer(2, dtype=torch.float32)
        self._arrived = buffer(1, dtype=torch.int32)
        self.launches = tuple(self._launches(tokens))
        drawn = self._overlapped([self._sample(step=True)])
        self.sampled = (*self.launches[:-1], *drawn) if tokens == 1 else ()

    def __call__(self, *, sampled: bool = False) -> None:
        for launch in self.sampled if sampled else self.launches:
            launch()

    def draw(self) -> None:
        """Draws `token` from the logits of the last step or prompt, in place of the greedy one."""
        self._sample(step=False)()

    def finish(self, stream: torch.Tensor) -> None:
        """Logits, and the greedy token into `token`, of a stream [hidden] that left the layers."""
        self._x[0] = (stream * self._llm.norm.weight).half()
        self._squares.zero_()
        self._squares[0, 0] = stream.square().sum()
        for launch in (self._head(), self._pick(step=False)):
            launch()

    def _launches(self, tokens: int) -> list[Launch]:
        llm = self._llm
        first = llm.layers[0].input_norm
        found = [embed(self.token, llm.table, first.weight, self._stream, self._x, self._first)]
        following = [layer.input_norm for layer in llm.layers[1:]] + [llm.norm]
        for index, (layer, after) in enumerate(zip(llm.layers, following, strict=True)):
            found += self._layer(index, layer, after)
        if tokens == 1:
            found = self._joined(found)
        return self._overlapped([*found, self._head(), self._pick(step=tokens == 1)])

    def _overlapped(self, launches: list[Launch]) -> list[Launch]:
        if not self._sizes.boundaries.overlap:
            return launches
        return [launch.overlapped() for launch in launches]

    def _joined(self, launches: list[Launch]) -> list[Launch]:
        """What stands between one attention and the next in a launch, if that is wanted."""
        boundaries = self._sizes.boundaries
        if not boundaries.join:
            return launches
        attends = 1 if boundaries.merge else 2
        # Ahead are embed, q, k and v and attention of the first layer; three of the last are left.
        start, end = 2 + attends, len(launches) - 3
        found = launches[:start]
        for first in range(start, end, PHASES + attends):
            behind = first + PHASES
            found += joined(launches[first:behind], self._arrived, self._sizes.sm)
            found += launches[behind : behind + attends]
        return [*found, *launches[end:]]

    def _head(self) -> Launch:
        config, norm = self._sizes.config, self._llm.norm
        return head(
            self._x, self._squares, self._llm.head, self.logits, self._best, self._index,
            config.rms_norm_eps, norm.unit, self._sizes.sm,
        )  # fmt: skip

    def _pick(self, *, step: bool) -> Launch:
        cache = self._cache
        return pick(self._best, self._index, self.token, cache.history, cache.position, step=step)

    def _sample(self, *, step: bool) -> Launch:
        cache = self._cache
        return sample(
            self.logits[:1], self.uniform, self.settings, self.token, cache.history,
            cache.position, step=step,
        )  # fmt: skip

    def _layer(self, index: int, layer: Layer, after: Norm) -> list[Launch]:
        sm, epsilon = self._sizes.sm, self._sizes.config.rms_norm_eps
        squares = self._first if index == 0 else self._squares
        return [
            norm_qkv(
                self._x, squares, layer.qkv, layer.qkv_bias, self._qkv, epsilon,
                layer.input_norm.unit, sm,
            ),
            *self._attend(index),
            add_residual(
                self._attended, layer.o, layer.post_norm.weight, self._stream, self._x,
                self._squares, sm,
            ),
            gate_up(
                self._x, self._squares, layer.gate_up, self._inner, epsilon, layer.post_norm.unit,
                sm,
            ),
            add_residual(
                self._inner, layer.down, after.weight, self._stream, self._x, self._squares, sm
            ),
        ]  # fmt: skip

    def _attend(self, index: int) -> tuple[Launch, ...]:
        """Several tokens see each other in the cache, so it is written before they attend."""
        llm, cache, sm = self._llm, self._cache, self._sizes.sm
        (keys, values, scales), position = cache.layer(index), cache.position
        if len(self.token) == 1:
            return rope_attention(
                self._qkv, (llm.cos, llm.sin), keys, values, position, self._attended,
                self._parts, sm, scales, merged=self._sizes.boundaries.merge,
            )  # fmt: skip
        turn = rope_kv(self._qkv, llm.cos, llm.sin, position, self._q, keys, values, scales)
        return turn, *attention(
            self._q, keys, values, position, self._attended, self._parts, sm, scales
        )
