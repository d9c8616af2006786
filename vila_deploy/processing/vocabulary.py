"""Compare a checkpoint's tokenizer with the rows of its embedding, before any work."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.processing.tokenizer import TOKENIZER_FILES, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Raise VilaDeployError if the tokenizer in `folder` has ids beyond the embedding's rows.

    A folder without any tokenizer file passes: plans need config files only.

    Args:
        folder: of the tokenizer files.
        vocab_size: rows of the embedding.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokens = load_tokenizer(folder).vocab_size
    if tokens > vocab_size:
        raise VilaDeployError(
            f"the tokenizer has {tokens} tokens, the model {vocab_size}",
            where=folder,
            fix="use the tokenizer files that belong to this checkpoint; tokens that were added "
            "without training, such as [PAD], can be removed from them",
        )
