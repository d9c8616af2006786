"""Which attention is faster here: llama.cpp's flash attention or its plain one."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from vila_deploy.backends.llamacpp import files
from vila_deploy.backends.llamacpp.decoder import DecoderOptions, LlamaDecoder, LlamaModel
from vila_deploy.utils.files import canonical_json

PROMPT_TOKENS, STEPS = 256, 4
# What a short answer takes beside its prompt.
ANSWER_TOKENS = 64


def open_decoder(folder: Path, model: LlamaModel, options: DecoderOptions) -> LlamaDecoder:
    """Return a decoder with the faster attention, which the first one in `folder` measures."""
    # llama.cpp has a quantized cache with flash attention only.
    flash = options.int8_cache or _known_choice(folder, model, options)
    if flash is None:
        flash = _measure(model, options)
        _remember(folder, model, options, flash)
    return LlamaDecoder(model, options, flash)


def _measure(model: LlamaModel, options: DecoderOptions) -> bool:
    return _seconds(model, options, True) <= _seconds(model, options, False)


def _seconds(model: LlamaModel, options: DecoderOptions, flash: bool) -> float:
    """Return how long a prompt and an answer take, from a few steps of each."""
    alone = DecoderOptions(**{**vars(options), "slots": 1})
    decoder = LlamaDecoder(model, alone, flash)
    try:
        tokens = max(1, min(PROMPT_TOKENS, alone.max_seq_len - STEPS - 2))
        embeds = np.zeros((tokens, decoder.hidden_size), np.float32)
        # Weights are read from the disk by the first pass.
        decoder.decode([0], [0])
        start = time.perf_counter()
        decoder.prefill(0, embeds, logits=True)
        prompt = time.perf_counter() - start
        start = time.perf_counter()
        for _ in range(STEPS if tokens > STEPS else 1):
            decoder.decode([0], [0])
        return prompt + (time.perf_counter() - start) / STEPS * ANSWER_TOKENS
    finally:
        decoder.close()


def _setting(model: LlamaModel, options: DecoderOptions) -> str:
    """Return what the choice depends on, beside the engine."""
    gpu = options.gpu.title if options.gpu else "processor"
    version = model.library.__version__
    return f"llama-cpp-python {version}, {gpu}, {options.gpu_layers}, {options.threads} threads"


def _known_choice(folder: Path, model: LlamaModel, options: DecoderOptions) -> bool | None:
    try:
        choices = json.loads((folder / files.ATTENTION_CHOICE).read_text("utf-8"))
        choice = choices.get(_setting(model, options))
    except (OSError, ValueError, AttributeError):
        return None
    return choice if isinstance(choice, bool) else None


def _remember(folder: Path, model: LlamaModel, options: DecoderOptions, flash: bool) -> None:
    path = folder / files.ATTENTION_CHOICE
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(canonical_json({_setting(model, options): flash}), "utf-8")
        partial.replace(path)
    except OSError:
        # A folder that can't be written, or a full disk: the next session measures again.
        partial.unlink(missing_ok=True)
