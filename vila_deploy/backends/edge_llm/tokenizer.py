"""Write a tokenizer as TensorRT-Edge-LLM's C++ runtime reads it: one tokenizer.json.

Of that file the runtime (cpp/tokenizer/tokenizer.cpp; 0.11) follows vocabulary, merges, byte
fallback, added tokens, splits and normalizers that replace. It puts neither BOS nor a space before
a text: the chat template begins with them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from vila_deploy.backends.edge_llm import files
from vila_deploy.processing.chat_template import PromptTemplate, render
from vila_deploy.processing.sentencepiece_model import SentencePieceTokenizer
from vila_deploy.processing.tokenizer import PROBES, JsonTokenizer, Tokenizer, load_tokenizer
from vila_deploy.utils.errors import VilaDeployError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

SPACE = "\u2581"


def write_tokenizer(folder: Path, source: Path, template: PromptTemplate) -> str:
    """Copy the files of `source` and write tokenizer.json; return what begins every prompt.

    Raises:
        VilaDeployError: prompts would become other tokens than those of `source`.
    """
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, folder / file.name)
    expected = load_tokenizer(source)
    if isinstance(expected, SentencePieceTokenizer):
        library = from_sentencepiece(expected)
    else:
        assert isinstance(expected, JsonTokenizer)
        library = expected.library
    library.save(str(folder / files.TOKENIZER))
    prefix, found = prompt_prefix(expected), JsonTokenizer(folder / files.TOKENIZER)
    for text in PROBES:
        prompt = render(template, [(text, text)], text)
        if found.encode(prefix + prompt) != expected.bos_ids + expected.encode(prompt):
            raise VilaDeployError(
                f"TensorRT-Edge-LLM reads {files.TOKENIZER} only, and one made of these files "
                "would give prompts other tokens",
                where=source,
                fix="use --backend tensorrt",
            )
    return prefix


def prompt_prefix(tokenizer: Tokenizer) -> str:
    """Return the text of what `tokenizer` puts before a text by itself: BOS, a space."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        bos = [tokenizer.added_texts[number] for number in tokenizer.bos_ids]
        return "".join([*bos, " "])
    assert isinstance(tokenizer, JsonTokenizer)
    return "".join(tokenizer.library.id_to_token(number) or "" for number in tokenizer.bos_ids)


def from_sentencepiece(tokenizer: SentencePieceTokenizer) -> Library:
    """Return a BPE model of its pieces; it puts no space before a text."""
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    model = tokenizer.library
    pieces = {model.id_to_piece(number): number for number in range(model.vocab_size())}
    merges = {p: _merges(p, pieces) for p, number in pieces.items() if _is_text(tokenizer, number)}
    # Those of the best score first; a piece of two ways takes the one of earlier pieces.
    by_score = sorted(merges, key=lambda piece: -model.get_score(pieces[piece]))
    bpe = models.BPE(
        vocab=pieces,
        merges=[pair for piece in by_score for pair in merges[piece]],
        unk_token=model.id_to_piece(model.unk_id()),
        fuse_unk=True,
        byte_fallback=True,
    )
    library = Library(bpe)
    library.normalizer = normalizers.Replace(" ", SPACE)
    library.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    user_defined = [piece for piece, pairs in merges.items() if len(piece) > 1 and not pairs]
    added = {pieces[piece]: piece for piece in user_defined} | tokenizer.added_texts
    for number, text in sorted(added.items()):
        special = tokenizer.token_bytes(number) is None
        library.add_tokens([AddedToken(text, normalized=False, special=special)])
    return library


def _merges(piece: str, pieces: dict[str, int]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that `piece` is made of; none for one that the user defined."""
    cuts = ((piece[:index], piece[index:]) for index in range(1, len(piece)))
    pairs = [pair for pair in cuts if pair[0] in pieces and pair[1] in pieces]
    return sorted(pairs, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))


def _is_text(tokenizer: SentencePieceTokenizer, number: int) -> bool:
    model = tokenizer.library
    kinds = (model.is_byte, model.is_control, model.is_unknown, model.is_unused)
    return not any(kind(number) for kind in kinds)
