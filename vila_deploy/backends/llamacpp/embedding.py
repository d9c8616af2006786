"""The embedding table in a GGUF file, mapped into memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vila_deploy.checkpoint.gguf_layout import ENDS
from vila_deploy.checkpoint.llm_config import EMBEDDING
from vila_deploy.formats.gguf_file import read_header
from vila_deploy.utils.arrays import Floats


class EmbeddingTable:
    """Rows of the float16 table in the GGUF file of an engine."""

    def __init__(self, path: Path):
        header = read_header(path)
        tensor = header.tensors[ENDS[EMBEDDING]]
        offset = header.start + tensor.begin
        self._table = np.memmap(path, np.float16, "r", offset, tensor.shape)

    def rows(self, tokens: NDArray[np.int64]) -> Floats:
        """Return the embeddings [tokens, hidden] of token ids."""
        return self._table[tokens].astype(np.float32)
