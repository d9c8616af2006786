"""Run an engine: images through our ONNX graphs, tokens through llama.cpp's decoder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from vila_deploy.backends.llamacpp import files
from vila_deploy.backends.llamacpp.attention import open_decoder
from vila_deploy.backends.llamacpp.decoder import DecoderOptions, LlamaModel
from vila_deploy.backends.llamacpp.embedding import EmbeddingTable
from vila_deploy.backends.llamacpp.gpu_layers import resolve_gpu_layers
from vila_deploy.backends.llamacpp.library import find_gpu, load_library
from vila_deploy.backends.llamacpp.memory import PREFILL_TOKENS
from vila_deploy.backends.onnxruntime.image_encoder import ImageEncoder
from vila_deploy.backends.onnxruntime.session import ONE_THREAD_BYTES, threads_to_use
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.sampling import SamplingParams
from vila_deploy.engine.session import check_keep, check_room, check_slots
from vila_deploy.engine.target import get_target
from vila_deploy.formats.module_dtypes import INT8
from vila_deploy.utils.arrays import Floats


class LlamaCppSession:
    """Implements `vila_deploy.engine.session.Session`; copies slots, encodes tile by tile.

    Raises:
        VilaDeployError: llama-cpp-python is missing or too old, lacks the target's GPU, or memory
            is short.
    """

    prefill_chunk = PREFILL_TOKENS

    def __init__(self, folder: Path, manifest: Manifest, slots: int = 1):
        load_library()
        self.slots, self.max_seq_len = slots, manifest.limits.max_seq_len
        llm = folder / files.LLM
        small = manifest.weight_bytes_per_token < ONE_THREAD_BYTES
        threads = 1 if small else threads_to_use()
        gpu = find_gpu(get_target(manifest.target))
        options = DecoderOptions(
            slots,
            self.max_seq_len,
            int8_cache=manifest.module_precision.kv_cache == INT8,
            threads=threads,
            gpu=gpu,
            gpu_layers=resolve_gpu_layers(llm / files.MODEL, manifest, slots, gpu),
        )
        self._table = EmbeddingTable(llm / files.MODEL)
        self._images = ImageEncoder(folder, manifest.model.tiling, threads)
        self._model = LlamaModel(llm / files.MODEL, options)
        self._decoder = open_decoder(llm, self._model, options)

    def length(self, slot: int) -> int:
        check_slots(self, [slot])
        return self._decoder.lengths[slot]

    def keep(self, slot: int, tokens: int) -> None:
        check_keep(self, slot, tokens)
        self._decoder.keep(slot, tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        check_slots(self, [source, target])
        check_keep(self, source, tokens)
        self._decoder.copy(source, target, tokens)

    def prefill(
        self, slot: int, embeds: Floats, all_logits: bool = False, more: bool = False
    ) -> Floats:
        check_room(self.length(slot), len(embeds), self.max_seq_len)
        return self._decoder.prefill(slot, embeds, logits=not more, all_logits=all_logits)

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> Floats:
        check_slots(self, slots)
        if len(slots) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens for {len(slots)} slots")
        for slot in slots:
            check_room(self._decoder.lengths[slot], 1, self.max_seq_len)
        return self._decoder.decode(slots, tokens)

    def stream(
        self, slot: int, stop_token_ids: Collection[int], sampling: SamplingParams
    ) -> Iterator[int] | None:
        check_slots(self, [slot])
        return None

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        return self._images.encode_images(pixels, grid)

    def encode_tiles(self, pixels: Floats) -> Floats:
        return self._images.encode_tiles(pixels)

    def merge_tiles(self, features: Floats, grid: tuple[int, int] | None) -> Floats:
        return self._images.merge_tiles(features, grid)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table.rows(np.asarray(tokens, np.int64))

    def close(self) -> None:
        """Free caches, weights and graphs."""
        for name in ("_decoder", "_model"):
            held = self.__dict__.pop(name, None)
            if held is not None:
                held.close()
        for name in ("_table", "_images"):
            self.__dict__.pop(name, None)
