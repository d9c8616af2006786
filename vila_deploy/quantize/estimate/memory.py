"""Predict the peak memory of each step of a quantization from the shapes alone.

Counted are the tensors that are alive together where they are most; small ones (norms, tables of
scales, indices) are left out. benchmarks/quantization/memory.py compares it with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.tensor_schema import (
    parameters,
    projector_tensor_specs,
    tower_tensor_specs,
)
from vila_deploy.quantize.algorithms import learned_scales
from vila_deploy.utils.limits import (
    CHUNK_TOKENS,
    HEAD_ROWS,
    LOGIT_ROWS,
    MAX_TOKENS,
    ROWS_AT_A_TIME,
    SOLVE_BYTES,
    SPILL_BYTES,
    TILE_ROWS,
)

# Python, torch and transformers on a tiny model, as measured on Linux.
PROGRAM_BYTES = 320 << 20
FLOAT32, FLOAT16 = 4, 2
# Matrices as large as the sampled rows that the gradient of the learned scales takes.
LEARNED_COPIES = 7


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory in bytes of the steps that quantize a model with groups of `group_size`.

    Args:
        pending: bytes of rounded linears that wait for their shard to be full.
    """

    config: VilaConfig
    group_size: int
    pending: int

    @property
    def layer(self) -> int:
        """Bytes of a decoder layer's linears in float32."""
        return FLOAT32 * sum(self._sizes)

    @property
    def rounded_layer(self) -> int:
        """Bytes of the same as quantized values of a byte each."""
        return sum(self._sizes)

    @property
    def largest(self) -> int:
        """Bytes of the largest linear in float32."""
        return FLOAT32 * max(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [rows * columns for rows, columns in self.config.llm.linears.values()]

    def write_tables(self) -> int:
        """Return the peak of checking embedding and head; float16 ones stay in their file."""
        table = self.config.llm.vocab_size * self.config.llm.hidden_size
        return PROGRAM_BYTES + 2 * FLOAT16 * table

    def encode(self, tokens: int, tiles: int) -> int:
        """Return the peak of encoding images and embedding tokens."""
        vision, hidden = self.config.vision, self.config.llm.hidden_size
        parts = (
            parameters(tower_tensor_specs(self.config)),
            parameters(projector_tensor_specs(self.config)),
        )
        # Inner activations of the feed-forward block before and after, and attention's inputs.
        inner = tiles * vision.positions * (2 * vision.intermediate_size + 6 * vision.hidden_size)
        images = FLOAT32 * (sum(parts) + inner) if tiles else 0
        return PROGRAM_BYTES + self.pending + images + 2 * tokens * hidden * FLOAT32

    def measure_tower(self, tiles: int) -> int:
        """Return the peak of the gradient's way back through the tower, a layer at a time."""
        vision, layers = self.config.vision, self.config.vision_layers_used
        weights = parameters(tower_tensor_specs(self.config))
        weights += parameters(projector_tensor_specs(self.config))
        within = 3 * (2 * vision.intermediate_size + 6 * vision.hidden_size)
        values = tiles * vision.positions * (layers * vision.hidden_size + within)
        # The weights of a layer and their gradients beside all weights.
        gradients = 2 * vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
        return PROGRAM_BYTES + FLOAT32 * (weights + values + gradients)

    def round_to_nearest(self) -> int:
        """Return the peak of RTN: a linear, two copies, and the layer's quantized linears."""
        return PROGRAM_BYTES + self.pending + 3 * self.largest + self.rounded_layer

    def awq(self, tokens: int) -> int:
        """Return the peak of AWQ: original, changed and tried weights, all activations."""
        activations = 5 * tokens * self.config.llm.hidden_size * FLOAT32
        return PROGRAM_BYTES + self.pending + 3 * self.layer + activations

    def measure_sensitivities(self, tokens: int) -> int:
        """Return the peak of the gradient's way back through a layer, with all Hessians."""
        llm = self.config.llm
        hidden, inner, heads = llm.hidden_size, llm.intermediate_size, llm.num_heads * llm.head_dim
        states = (llm.num_layers + 3) * _held(tokens, hidden)
        hessians = 2 * _square(hidden) + _square(heads) + 3 * _square(inner)
        through = 2 * FLOAT32 * MAX_TOKENS * (8 * hidden + 4 * heads + 6 * inner)
        head = FLOAT32 * llm.vocab_size * (hidden + 3 * LOGIT_ROWS)
        within = max(hessians + through + self.layer, head)
        return PROGRAM_BYTES + states + within

    def awq_gptq(self, tokens: int) -> int:
        """Return the peak of the default algorithm with `tokens` of calibration data."""
        llm = self.config.llm
        hidden, inner = llm.hidden_size, llm.intermediate_size
        heads = llm.num_heads * llm.head_dim
        keys = llm.num_kv_heads * llm.head_dim
        held = {width: _held(tokens, width) for width in (hidden, heads, inner)}
        into_heads, into_inner = _square(heads), _square(inner)
        # Both Hessians, then the factor of the larger one being made; activations of a chunk.
        making = 2 * into_inner + self._learning(inner)
        exact = held[hidden] + into_heads + into_inner
        exact += max(_through_a_layer(tokens, hidden, heads, inner), making)
        rounded = 0
        needed = [exact]
        for columns, rows in ((hidden, (heads, keys, keys)), (hidden, (inner, inner))):
            stacked = FLOAT32 * sum(rows) * columns + self._learning(columns)
            rounding = max(self._gptq(columns, count) for count in rows)
            needed.append(rounded + 2 * _square(columns) + max(stacked, rounding))
            rounded += sum(rows) * columns
            if columns == hidden and rows[0] == heads and len(rows) == 3:
                states = held[hidden] + held[heads]
                needed.append(rounded + states + self._correct(heads, hidden))
                rounded += heads * hidden
        needed.append(rounded + held[inner] + self._correct(inner, hidden))
        base = PROGRAM_BYTES + self.pending + self.layer + 2 * held[hidden]
        return base + max(needed)

    def evaluate(self, tokens: int, image_tokens: int) -> int:
        """Return the peak of both models on held-out data, a layer at a time, then their logits."""
        llm = self.config.llm
        states = (2 * tokens + image_tokens) * llm.hidden_size * FLOAT32
        chunk = min(tokens, CHUNK_TOKENS) * FLOAT32
        through = chunk * (4 * llm.hidden_size + 2 * llm.intermediate_size)
        layer = self.layer + max(2 * self.largest, through)
        logits = 3 * LOGIT_ROWS * llm.vocab_size + HEAD_ROWS * llm.hidden_size
        final = 2 * tokens * llm.hidden_size * FLOAT32 + FLOAT32 * logits
        return PROGRAM_BYTES + states + max(layer, final)

    def _learning(self, columns: int) -> int:
        return learned_scales.ROWS * columns * FLOAT32 * LEARNED_COPIES

    def _correct(self, columns: int, rows: int) -> int:
        """Return the peak of a linear with targets: Hessian factored, weight corrected, rounded."""
        linear = rows * columns * FLOAT32
        rounding = linear + max(2 * linear, self._gptq(columns, rows))
        return linear + max(3 * _square(columns), 2 * _square(columns) + rounding)

    def _gptq(self, columns: int, rows: int) -> int:
        """Return the peak of GPTQ on [rows, columns], besides the Hessian and its factor."""
        block = min(rows, ROWS_AT_A_TIME) * columns * FLOAT32
        groups = columns // self.group_size
        equations = 8 * groups * groups
        solved_rows = max(1, min(TILE_ROWS, SOLVE_BYTES // equations))
        # Weight, its product with the Hessian, quantized values; then new ones and their errors, or
        # a few rows' equations: in float32 and float64, solved.
        refitting = 3 * block + solved_rows * (3 * columns * FLOAT32 + 4 * equations)
        # Afterwards the weight is compared with the one that is stored.
        comparing = 3 * rows * columns * FLOAT32
        return max(5 * block, refitting, comparing) + rows * columns


def _through_a_layer(tokens: int, hidden: int, heads: int, inner: int) -> int:
    """Return the activations of a chunk in attention or in the feed-forward block."""
    # A chunk ends with the sequence that fills it. Attention and its way back take 13 of heads.
    chunk = min(tokens, CHUNK_TOKENS + MAX_TOKENS) * FLOAT32
    return chunk * max(14 * heads, 5 * inner + 3 * hidden)


def _square(columns: int) -> int:
    """Return the size of a Hessian of so many channels."""
    return columns * columns * FLOAT32


def spilled(config: VilaConfig, tokens: int) -> int:
    """Return the most bytes of activations that the default algorithm has in files at once."""
    llm = config.llm
    heads = llm.num_heads * llm.head_dim

    def in_file(width: int) -> int:
        return tokens * width * FLOAT32 - _held(tokens, width)

    states = in_file(llm.hidden_size)
    # fp and quantized; then those between the blocks and o_proj's inputs, or down_proj's inputs.
    return 2 * states + max(states + in_file(heads), in_file(llm.intermediate_size))


def _held(tokens: int, width: int) -> int:
    """Return the bytes of an activation of all tokens in memory; 0 if it lies in a file."""
    size = tokens * width * FLOAT32
    return size if size <= SPILL_BYTES else 0
