"""Compare a checkpoint's tokenizer with the rows of its embedding, before any work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.processing.chat_template import (
    IMAGE_MARKER,
    PROMPT_TEMPLATES,
    choose_template,
    render,
)
from vila_deploy.processing.multimodal_prompt import text_chunks
from vila_deploy.processing.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError, short


def check_vocabulary(folder: Path, config: VilaConfig) -> None:
    """Raise VilaDeployError if prompts need tokens beyond the embedding's rows.

    Added tokens that no prompt needs, as [PAD] of a fine-tune, are taken and named in a line on
    stderr; `check_ids` refuses texts that spell them. A folder without any tokenizer file passes:
    plans need config files only.

    Args:
        folder: of the tokenizer files.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer, rows = load_tokenizer(folder), config.llm.vocab_size
    beyond = tokenizer.tokens_beyond(rows)
    if not beyond:
        return
    template = PROMPT_TEMPLATES[choose_template(config, tokenizer)]
    prompt = render(template, [("a", "b")], f"{IMAGE_MARKER}c")
    ids = {number for chunk in text_chunks(tokenizer, prompt, config.recipe) for number in chunk}
    if ids & beyond.keys() or not beyond.keys() <= tokenizer.added_ids():
        raise VilaDeployError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows}",
            where=folder,
            fix="use the tokenizer files that belong to this checkpoint",
        )
    names = ", ".join(map(short, list(beyond.values())[:4])) + ", …" * (len(beyond) > 4)
    print(
        f"note: {folder}: added tokens beyond the {rows} rows of the embedding: {names}; "
        "texts that spell them are refused",
        file=sys.stderr,
    )


def check_ids(tokenizer: Tokenizer, chunks: Iterable[Sequence[int]], rows: int) -> None:
    """Raise VilaDeployError if a text has tokens beyond the embedding's rows."""
    for chunk in chunks:
        largest = max(chunk, default=0)
        if largest >= rows:
            token = tokenizer.tokens_beyond(rows).get(largest, "")
            raise VilaDeployError(
                f"the text has token {short(token)}, which the model has no embedding of",
                fix="leave it out of the text",
            )
