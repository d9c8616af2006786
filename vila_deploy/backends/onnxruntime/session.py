"""Run an engine on the CPU; numpy only, all buffers bound once so that a step copies no cache."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.decoder import BoundGraph, CacheRows
from vila_deploy.backends.onnxruntime.image_encoder import ImageEncoder
from vila_deploy.backends.onnxruntime.inference import NO_PREPACKING, load_graph
from vila_deploy.backends.onnxruntime.memory import PREFILL_TOKENS
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import check_keep, check_room, check_slots, chunk_size
from vila_deploy.formats.module_dtypes import FP16, INT8, INT8X2
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.estimates import available_memory_bytes

# With fewer bytes of weights a step, threads wait for each other longer than they compute.
ONE_THREAD_BYTES = 16 << 20


class OnnxRuntimeSession:
    """Run an engine folder; implements `vila_deploy.engine.session.Session`.

    `rows` holds the caches of all slots. Engines built before a pass could take several rows have
    one slot, whatever is asked.

    With two int8 terms a pass has 1, 2, 4, 8, … rows, some of them idle, for which kernels add in
    the same order: what a slot answers does not depend on the others, bit for bit.

    Args:
        slots: sequences to hold, 2 * layers * kv_heads * head_dim values a token, of 4 bytes, or
            1 in an int8 cache. The memory of several is taken at once, that of one when its tokens
            come.

    Raises:
        VilaDeployError: there is no memory for so many slots.
    """

    prefill_chunk = PREFILL_TOKENS

    def __init__(self, folder: Path, manifest: Manifest, slots: int = 1):
        model, limits = manifest.model, manifest.limits
        self.max_seq_len = limits.max_seq_len
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        small = manifest.weight_bytes_per_token < ONE_THREAD_BYTES
        threads = 1 if small else threads_to_use()
        self._images = ImageEncoder(folder, model.tiling, threads)
        llm = folder / files.LLM
        # Repacking float32 weights would only slow down decoding; quantized ones need it.
        repack = {manifest.precision, manifest.module_precision.lm_head} != {FP16}
        options = {} if repack else NO_PREPACKING
        self._decoder = load_graph(llm / files.GRAPH, threads=threads, options=options)
        # Where there are two graphs, only the one for a single token of each row returns logits.
        self._prefill = self._decoder
        if (llm / files.PREFILL_GRAPH).exists():
            self._prefill = load_graph(llm / files.PREFILL_GRAPH, threads=threads)
        self.slots = slots if _takes_several_rows(self._decoder) else 1
        self._pad_rows = manifest.activations == INT8X2
        rows = self._rows_of_pass(self.slots)
        shape = (model.num_layers, model.num_kv_heads, limits.max_seq_len, model.head_dim)
        int8 = manifest.module_precision.kv_cache == INT8
        if self.slots > 1:
            _check_memory(rows * 2 * math.prod(shape) * (1 if int8 else 4), self.slots, folder)
        self.rows = CacheRows(self.slots, rows, shape, np.int8 if int8 else np.float32)
        self._logits = np.empty((rows, model.vocab_size), np.float32)
        self._embeds = np.zeros((rows, 1, model.hidden_size), np.float32)
        self._bound: dict[tuple[bool, int, int], BoundGraph] = {}

    def length(self, slot: int) -> int:
        check_slots(self, [slot])
        return self.rows.lengths[slot]

    def keep(self, slot: int, tokens: int) -> None:
        check_keep(self, slot, tokens)
        self.rows.lengths[slot] = tokens

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        return self._images.encode_images(pixels, grid)

    def encode_tiles(self, pixels: Floats) -> Floats:
        return self._images.encode_tiles(pixels)

    def merge_tiles(self, features: Floats, grid: tuple[int, int] | None) -> Floats:
        return self._images.merge_tiles(features, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        if all_logits:
            return np.stack([self._pass([slot], embed[None])[0] for embed in embeds])
        two_graphs = self._prefill is not self._decoder
        # Where there are two graphs, the last token goes through the one that returns logits.
        many = len(embeds) - (two_graphs and not more)
        start = 0
        while start < many:
            count = chunk_size(many - start, PREFILL_TOKENS)
            self._append(slot, embeds[start : start + count])
            start += count
        if more:
            return np.empty(0, np.float32)
        if two_graphs:
            return self._pass([slot], embeds[-1:])[0]
        return self._logits[self.rows.row(slot)].copy()

    def _append(self, slot: int, embeds: Floats) -> None:
        """Append a chunk [tokens, hidden] to `slot`; its last logits, if any, stand in its row."""
        held, count = self.rows.lengths[slot], len(embeds)
        if self._prefill is not self._decoder and count == 1 and held + 2 <= self.max_seq_len:
            # A second token that is overwritten later: kernels add in another order for a lone one.
            embeds = np.concatenate([embeds, embeds])
        bound = self._bind(self.rows.row(slot), 1, prefill=True)
        bound.bind_embeds(embeds[None])
        bound.run([held + len(embeds)])
        self.rows.lengths[slot] = held + count

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        check_slots(self, slots)
        if len(slots) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for {len(slots)} slots")
        for slot in slots:
            check_room(self.rows.lengths[slot], 1, self.max_seq_len)
        return self._pass(slots, self.embed_tokens(tokens))

    def copy(self, source: int, target: int, tokens: int) -> None:
        check_slots(self, [source, target])
        check_keep(self, source, tokens)
        self.rows.copy(source, target, tokens)

    def stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int] | None:
        check_slots(self, [slot])
        return None

    def close(self) -> None:
        """Free the models and the cache."""
        for name in ("_images", "_decoder", "_prefill", "_table", "_bound", "rows"):
            self.__dict__.pop(name, None)

    def _pass(self, slots: Sequence[int], embeds: Floats) -> Floats:
        """Append one embedding [slots, hidden] to each slot; return logits [slots, vocab]."""
        count = self._rows_of_pass(len(slots))
        start = self.rows.gather(slots, count)
        places = [self.rows.row(slot) - start for slot in slots]
        totals = [1] * count
        for slot, place in zip(slots, places, strict=True):
            totals[place] = self.rows.lengths[slot] + 1
        self._embeds[start : start + count] = 0
        self._embeds[[start + place for place in places], 0] = embeds
        # An idle row computes a token at its first position, which is put back afterwards.
        idle = [start + place for place in range(count) if place not in places]
        idle = [row for row in idle if self.rows.slot(row) is not None]
        saved = self.rows.first_positions(idle) if idle else []
        try:
            self._bind(start, count).run(totals)
        finally:
            if idle:
                self.rows.restore_first_positions(idle, saved)
        for slot in slots:
            self.rows.lengths[slot] += 1
        return self._logits[[start + place for place in places]]

    def _rows_of_pass(self, slots: int) -> int:
        return 1 << (slots - 1).bit_length() if self._pad_rows else slots

    def _bind(self, start: int, count: int, prefill: bool = False) -> BoundGraph:
        """Return a graph over rows of the cache, for a prompt or for one token of each row."""
        key = (prefill, start, count)
        if key not in self._bound:
            graph = self._prefill if prefill else self._decoder
            logits = None if graph is not self._decoder else self._logits[start : start + count]
            bound = BoundGraph(graph, self.rows.window(start, count), logits)
            if not prefill:
                bound.bind_embeds(self._embeds[start : start + count])
            self._bound[key] = bound
        return self._bound[key]


def _check_memory(needed_bytes: int, slots: int, folder: Path) -> None:
    available = available_memory_bytes()
    if needed_bytes > available:
        raise VilaDeployError(
            f"the key/value cache of {slots} slots takes {needed_bytes / 1e9:.1f} GB, "
            f"{available / 1e9:.1f} GB are free",
            where=folder,
            fix="ask for fewer slots, or build the engine with a smaller --max-seq-len",
        )


def _takes_several_rows(decoder: onnxruntime.InferenceSession) -> bool:
    embeds = next(value for value in decoder.get_inputs() if value.name == "inputs_embeds")
    return not isinstance(embeds.shape[0], int)


def threads_to_use() -> int:
    """Return one thread a core, or OMP_NUM_THREADS if that is fewer, as numeric libraries do."""
    limit = os.environ.get("OMP_NUM_THREADS", "")
    cores = physical_cores()
    return min(cores, int(limit)) if limit.isdigit() and int(limit) else cores


def physical_cores() -> int:
    """Return how many cores this process may use, hyper-threads of a core counted once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)
