"""A model and a context of llama.cpp: embeddings or token ids in, logits out, a sequence a slot."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.llamacpp.library import LOG, GpuDevice, load_library
from vila_deploy.backends.llamacpp.memory import OUTPUT_ROWS, PREFILL_TOKENS, padded_length
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import OUT_OF_MEMORY, VilaDeployError

NO_SLOT = 1


@dataclass(frozen=True)
class DecoderOptions:
    """How a model is loaded.

    Args:
        slots: sequences, each with `max_seq_len` positions of its own.
        int8_cache: keys and values in Q8_0, else in float16.
        threads: on the processor.
        gpu: that holds `gpu_layers` layers, the head counted as one; None for the processor alone.
    """

    slots: int
    max_seq_len: int
    int8_cache: bool
    threads: int
    gpu: GpuDevice | None = None
    gpu_layers: int = 0


class LlamaModel:
    """The weights in a GGUF file, mapped into memory.

    Raises:
        VilaDeployError: llama.cpp can't load it.
    """

    def __init__(self, path: Path, options: DecoderOptions):
        self.library = load_library()
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = options.gpu_layers
        # The list of devices ends with null; an empty one keeps everything on the processor.
        handles = [options.gpu.handle] if options.gpu else []
        devices = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        parameters.devices = ctypes.cast(devices, ctypes.c_void_p)
        parameters.split_mode = self.library.LLAMA_SPLIT_MODE_NONE
        self.pointer = self.library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.pointer:
            raise VilaDeployError(
                f"llama.cpp can't load it{LOG.last_problem()}",
                where=path,
                fix="close other programs if memory is short, else build the engine again",
            )

    def close(self) -> None:
        """Free the weights."""
        if self.pointer:
            self.library.llama_model_free(self.pointer)
            self.pointer = None


class LlamaDecoder:
    """The caches of all slots, and the decoder over them; `lengths` counts what each slot holds.

    Args:
        flash_attention: attention in one kernel that never holds all scores; an int8 cache needs
            it.

    Raises:
        VilaDeployError: too little memory.
    """

    def __init__(self, model: LlamaModel, options: DecoderOptions, flash_attention: bool):
        library = self._library = model.library
        self._model, self._options = model, options
        vocabulary = library.llama_model_get_vocab(model.pointer)
        self._vocab_size = library.llama_vocab_n_tokens(vocabulary)
        self.hidden_size = library.llama_model_n_embd(model.pointer)
        parameters = library.llama_context_default_params()
        parameters.n_seq_max = options.slots
        parameters.n_ctx = options.slots * padded_length(options.max_seq_len)
        parameters.n_batch = parameters.n_ubatch = PREFILL_TOKENS
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = OUTPUT_ROWS
        parameters.n_threads = parameters.n_threads_batch = options.threads
        # A part of the cache for each sequence: a pass reads no positions of the others.
        parameters.kv_unified = False
        parameters.flash_attn_type = (
            library.LLAMA_FLASH_ATTN_TYPE_ENABLED
            if flash_attention
            else library.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        if options.int8_cache:
            parameters.type_k = parameters.type_v = library.GGML_TYPE_Q8_0
        self._context = library.llama_init_from_model(model.pointer, parameters)
        if not self._context:
            raise VilaDeployError(
                f"llama.cpp can't allocate {options.slots} caches of {options.max_seq_len} tokens"
                f"{LOG.last_problem()}",
                fix=f"{OUT_OF_MEMORY}, fewer slots or a smaller --max-seq-len",
            )
        self._memory = library.llama_get_memory(self._context)
        self.lengths = [0] * options.slots

    def prefill(self, slot: int, embeds: Floats, logits: bool, all_logits: bool = False) -> Floats:
        """Append [tokens, hidden] to a slot; return logits [vocab], or [tokens, vocab] of all."""
        rows = []
        step = OUTPUT_ROWS if all_logits else PREFILL_TOKENS
        start, begin = self.lengths[slot], 0
        try:
            while begin < len(embeds):
                part = np.ascontiguousarray(embeds[begin : begin + step], np.float32)
                last = begin + len(part) == len(embeds)
                wanted = range(len(part)) if all_logits else [len(part) - 1] * (logits and last)
                rows += self._decode(_Batch(self._library, embeds=part), [slot] * len(part), wanted)
                begin += len(part)
        except BaseException:
            self.keep(slot, start)
            raise
        if all_logits:
            return np.stack(rows)
        return rows[0] if rows else np.empty(0, np.float32)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        """Append a token to each slot; return logits [slots, vocab]."""
        before = [self.lengths[slot] for slot in slots]
        try:
            batch = _Batch(self._library, tokens=np.asarray(tokens, np.int32))
            return np.stack(self._decode(batch, slots, range(len(slots))))
        except BaseException:
            for slot, length in zip(slots, before, strict=True):
                self.keep(slot, length)
            raise

    def keep(self, slot: int, tokens: int) -> None:
        """Forget all but the first `tokens` of a slot."""
        self._library.llama_memory_seq_rm(self._memory, slot, tokens, -1)
        self.lengths[slot] = tokens

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Make `target` hold the first `tokens` of `source`."""
        self.keep(target, 0)
        # Between parts of the cache llama.cpp copies whole sequences only.
        self._library.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.lengths[target] = self.lengths[source]
        self.keep(target, tokens)

    def close(self) -> None:
        """Free the caches, not the model."""
        if self._context:
            self._library.llama_free(self._context)
            self._context = None

    def _decode(self, batch: _Batch, slots: Sequence[int], wanted: Sequence[int]) -> list[Floats]:
        """Append one position a row, in order; return the logits of the rows `wanted`."""
        positions = []
        for slot in slots:
            positions.append(self.lengths[slot])
            self.lengths[slot] += 1
        filled = batch.filled(positions, slots, wanted)
        status = self._library.llama_decode(self._context, filled)
        if status:
            reason = "no room in the cache" if status == NO_SLOT else f"status {status}"
            raise VilaDeployError(
                f"llama.cpp failed: {reason}{LOG.last_problem()}", fix="open the engine again"
            )
        return [self._logits(row) for row in wanted]

    def _logits(self, row: int) -> Floats:
        pointer = self._library.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, shape=(self._vocab_size,)).copy()


class _Batch:
    """A llama_batch over numpy arrays, which live as long as this object.

    Args:
        tokens: int32 [rows]; or
        embeds: float32 [rows, hidden], contiguous.
    """

    def __init__(
        self, library: Any, tokens: np.ndarray | None = None, embeds: Floats | None = None
    ):
        self._library, self._tokens, self._embeds = library, tokens, embeds

    def filled(self, positions: Sequence[int], slots: Sequence[int], wanted: Sequence[int]) -> Any:
        """Return the llama_batch with each row's position and slot."""
        count = len(positions)
        self._positions = np.asarray(positions, np.int32)
        self._one = np.ones(count, np.int32)
        self._slots = np.asarray(slots, np.int32)
        addresses = self._slots.ctypes.data + self._slots.itemsize * np.arange(count)
        self._slot_pointers = addresses.astype(np.uintp)
        self._wanted = np.zeros(count, np.int8)
        self._wanted[list(wanted)] = 1
        kinds = dict(self._library.llama_batch._fields_)
        arrays = {
            "token": self._tokens, "embd": self._embeds, "pos": self._positions,
            "n_seq_id": self._one, "seq_id": self._slot_pointers, "logits": self._wanted,
        }  # fmt: skip
        pointers = {
            name: ctypes.cast(array.ctypes.data, kinds[name])
            for name, array in arrays.items()
            if array is not None
        }
        return self._library.llama_batch(n_tokens=count, **pointers)
