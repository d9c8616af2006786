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
    choices, setting = _known_choices(folder), _setting(model, options)
    flash = options.int8_cache or choices.get(setting)
    if flash is None:
        flash = _measure(model, options)
        _remember(folder, choices | {setting: flash})
    return LlamaDecoder(model, options, flash)


def _measure(model: LlamaModel, options: DecoderOptions) -> bool:
    return _seconds(model, options, True) <= _seconds(model, options, False)


def _seconds(model: LlamaModel, options: DecoderOptions, flash: bool) -> float:
    """Return how long a prompt and an answer in every slot take, from a few steps of each."""
    slots = range(options.slots)
    decoder = LlamaDecoder(model, options, flash)
    try:
        tokens = max(1, min(PROMPT_TOKENS, options.max_seq_len - STEPS - 2))
        embeds = np.zeros((tokens, decoder.hidden_size), np.float32)
        # Weights are read from the disk by the first pass.
        decoder.decode([0], [0])
        start = time.perf_counter()
        decoder.prefill(0, embeds, logits=True)
        prompt = time.perf_counter() - start
        for slot in slots[1:]:
            decoder.copy(0, slot, tokens)
        steps = STEPS if tokens > STEPS else 1
        start = time.perf_counter()
        for _ in range(steps):
            decoder.decode(slots, [0] * len(slots))
        step = (time.perf_counter() - start) / steps
        return len(slots) * prompt + step * ANSWER_TOKENS
    finally:
        decoder.close()


def _setting(model: LlamaModel, options: DecoderOptions) -> str:
    """Return what the choice depends on, beside the engine."""
    gpu = options.gpu.title if options.gpu else "processor"
    version = model.library.__version__
    return (
        f"llama-cpp-python {version}, {gpu}, {options.gpu_layers}, {options.threads} threads, "
        f"{options.slots} slots"
    )


def _known_choices(folder: Path) -> dict[str, bool]:
    """Return whether flash attention was the faster one, by setting; nothing of a damaged file."""
    try:
        choices = json.loads((folder / files.ATTENTION_CHOICE).read_text("utf-8"))
        return {setting: choice for setting, choice in choices.items() if isinstance(choice, bool)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _remember(folder: Path, choices: dict[str, bool]) -> None:
    path = folder / files.ATTENTION_CHOICE
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(canonical_json(choices), "utf-8")
        partial.replace(path)
    except OSError:
        # A folder that can't be written, or a full disk: the next session measures again.
        partial.unlink(missing_ok=True)
