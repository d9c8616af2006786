"""Run an engine folder in TensorRT-LLM's C++ runtime, on one GPU or on several."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.executor import LlmExecutor
from vila_deploy.backends.tensorrt_llm.generation import Generation
from vila_deploy.backends.tensorrt_llm.releases import release_for
from vila_deploy.backends.tensorrt_llm.sequence import PromptSequence
from vila_deploy.backends.tensorrt_llm.vision_engine import VisionEngine
from vila_deploy.engine.manifest import Manifest
from vila_deploy.engine.target import get_target
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.own_stdout import imports_print_to_stderr, libraries_print_to_stderr


class TensorrtLlmSession:
    """Run an engine folder; implements `vila_deploy.engine.session.SequenceSession`.

    `max_seq_len` is one less than the engine's, which also counts the token after the last pass.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        limits, target = manifest.limits, get_target(manifest.target)
        config = Fields.from_file(folder / files.LLM / files.CONFIG).child("pretrained_config")
        ranks = config.child("mapping").integer("world_size", 1, high=1024)
        self._release = release_for(target.compute_capability, target.name)
        self.max_seq_len, self._max_input_len = limits.max_seq_len - 1, limits.max_input_len
        self._vocab_size = manifest.model.vocab_size
        self._table = np.load(folder / files.EMBEDDING, mmap_mode="r")
        # The engine's own vocabulary, padded; ids behind it are rows of the prompt table.
        first_row_id = config.integer("vocab_size", 1)
        self._sequence = PromptSequence(first_row_id, manifest.model.hidden_size)
        self._generation: Generation | None = None
        with ExitStack() as stack:
            # Its C++ code and its Python code print to stdout, where the answer goes.
            stack.enter_context(libraries_print_to_stderr())
            package, api, torch = import_tensorrt_llm()
            try:
                self._vision = VisionEngine(package, torch, folder, self._release)
                self._llm = LlmExecutor(package, api, torch, folder, limits, self._release, ranks)
            except RuntimeError as error:
                raise _not_opened(folder, error) from error
            self._own_stdout = stack.pop_all()

    @property
    def position(self) -> int:
        return len(self._sequence)

    def encode_images(self, pixels: Floats, grid: tuple[int, int] | None = None) -> Floats:
        """Return features [images, tokens, hidden] of [images, 3, size, size]."""
        self._end_generation()
        return self._vision.run(pixels)

    def embed_tokens(self, tokens: Sequence[int]) -> Floats:
        return self._table[np.asarray(tokens, np.int64)].astype(np.float32)

    def prefill(self, embeds: Floats) -> Floats:
        """Append [tokens, hidden]; return logits of the last token [vocab].

        Earlier tokens are looked up in the runtime's cache, or computed again by 0.12.
        """
        self._end_generation()
        kept = len(self._sequence)
        self._sequence.append_embeds(embeds)
        try:
            return self._begin()
        except VilaDeployError:
            self.truncate(kept)
            raise

    def decode(self, token: int) -> Floats:
        logits = None if self._generation is None else self._generation.next(token)
        self._sequence.append_token(token)
        if logits is not None:
            return self._without_padding(logits)
        self._end_generation()
        return self._begin()

    def truncate(self, tokens: int) -> None:
        self._end_generation()
        self._sequence.truncate(tokens)

    def close(self) -> None:
        """Free the engines and end the workers."""
        self._end_generation()
        self._llm.close()
        self._own_stdout.close()

    def _begin(self) -> Floats:
        """Start a request for the whole sequence and return its first logits."""
        self._check_length()
        self._generation = self._llm.begin(self._sequence)
        return self._without_padding(self._generation.first())

    def _check_length(self) -> None:
        """Raise for more than the engine takes: rows of its prompt table, in 0.12 all tokens."""
        reuses = self._release.reuses_cache
        count = len(self._sequence.table) if reuses else len(self._sequence)
        if count > self._max_input_len:
            raise VilaDeployError(
                f"{count} tokens are more than the {self._max_input_len} that this engine "
                "takes at once",
                fix="ask for less, or build it with a larger --max-input-len",
            )

    def _end_generation(self) -> None:
        generation, self._generation = self._generation, None
        if generation is not None:
            generation.end()

    def _without_padding(self, logits: Floats) -> Floats:
        """Return the logits of the model's own vocabulary; the engine pads it."""
        return logits[: self._vocab_size]


def import_tensorrt_llm() -> tuple[Any, Any, Any]:
    """Import and return tensorrt_llm, its executor's bindings, and torch.

    Raises:
        VilaDeployError: it is missing, or its libraries don't load.
    """
    try:
        with imports_print_to_stderr():
            import tensorrt_llm
            import tensorrt_llm._utils
            import tensorrt_llm.runtime
            import torch
            from tensorrt_llm.bindings import executor
    except Exception as error:  # a half-installed TensorRT-LLM raises what its libraries raise
        first_line = str(error).partition("\n")[0]
        raise VilaDeployError(
            f"TensorRT-LLM can't be loaded ({first_line[:200]})",
            fix="install the version that built the engine; manifest.json names it",
        ) from error
    return tensorrt_llm, executor, torch


def _not_opened(folder: Path, error: RuntimeError) -> VilaDeployError:
    first_line = str(error).partition("\n")[0]
    return VilaDeployError(
        f"TensorRT-LLM can't open it ({first_line[:200]})",
        where=folder,
        fix="close other programs on this GPU, or build it again with the installed version",
    )
