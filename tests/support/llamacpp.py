"""llama.cpp's library through llama-cpp-python: tokens and logits of a GGUF file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch

from vila_deploy.utils.arrays import Floats


@contextmanager
def opened(file: Path, vocab_only: bool = False) -> Iterator[Any]:
    """Yield the model in `file`."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = vocab_only
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    assert model, file
    try:
        yield model
    finally:
        llama_cpp.llama_model_free(model)


def tokenize(model: Any, text: str) -> list[int]:
    """Return the ids of `text` without BOS; special tokens written in it are recognised."""
    content, ids = text.encode(), (llama_cpp.llama_token * 1024)()
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    count = llama_cpp.llama_tokenize(vocabulary, content, len(content), ids, 1024, False, True)
    return list(ids)[:count]


def logits(model: Any, ids: Sequence[int]) -> Floats:
    """Return the logits [tokens, vocab] behind every token."""
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(len(ids), 256)
    parameters.n_threads = parameters.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, parameters)
    batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, number in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = number, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    assert llama_cpp.llama_decode(context, batch) == 0
    rows = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(ids), rows))
    copy = found.copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return copy


def quantized_table(table: torch.Tensor, number: int, row_bytes: int) -> torch.Tensor:
    """Return float32 `table` as ggml's reference quantization of type `number` stores it."""
    folder = Path(llama_cpp.llama_cpp._lib._name).parent
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p,
    ]  # fmt: skip
    rows, columns = table.shape
    content = torch.empty(rows, row_bytes, dtype=torch.uint8)
    arguments = (table.data_ptr(), content.data_ptr(), 0, rows, columns, None)
    assert library.ggml_quantize_chunk(number, *arguments) == content.numel()
    return content
