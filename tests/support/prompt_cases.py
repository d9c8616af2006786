"""Conversations and small tokenizers for comparing prompts with the original code's.

Imported by the test and by whoever records tests/golden/prompts.json again: see "recipe" there.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

TEXT = (
    "what is the colour of this picture describe it please why two dogs on a red sofa "
    "count them all été 日本 naïve 3.14 10% e-mail don't I'm C++ (left) [right] x_1 😀"
)
WORDS = TEXT.split()
MERGES = ["t h", "th e", "Ġ the", "i n", "Ġ i", "e r", "o n", "r e", "Ġ a", "U S", "E R", "US ER"]
SPM_PIECES = ["▁t", "th", "he", "▁the", "in", "▁a", "er", "on", "re", "US", "ER", "USER", "▁USER"]
LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
           "<|eot_id|>"]  # fmt: skip
QWEN2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Turn = tuple[int, str, str]


def conversations(count: int = 30) -> list[list[Turn]]:
    """Each 1 to 3 turns of (images, question, answer); the last answer is still to be given."""
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        turns = []
        for turn in range(1 + seed % 3):
            images = rng.choice((0, 1, 1, 2, 3)) if turn == 0 else rng.choice((0, 0, 1))
            question, answer = (_text(rng, rng.randint(1, 12)) for _ in range(2))
            turns.append((images, question, answer))
        made.append(turns)
    return made


def _text(rng: random.Random, words: int) -> str:
    separators = (" ", " ", " ", "  ", "\n", ", ", ".\n\n", "\t")
    text = rng.choice(WORDS)
    for _ in range(words - 1):
        text += rng.choice(separators) + rng.choice(WORDS)
    return text + rng.choice(("", "?", ".", "!"))


def write_tokenizer(folder: Path, template: str) -> None:
    """The kind of tokenizer files that the model of `template` comes with, with a small vocabulary.

    vicuna_v1: Llama-2's tokenizer.model. hermes-2: Yi's, where <|im_start|> is a piece and
    <|im_end|> an added token, without BOS. llama_3: byte-level tokenizer.json with BOS, and with
    ", no BOS" without it, as Meta's was until "Update post-processor to add bos" (2024-04-23).
    qwen2: vocab.json and merges.txt.
    """
    if template in ("vicuna_v1", "hermes-2"):
        _write_sentencepiece(folder, yi=template == "hermes-2")
    elif template == "qwen2":
        _write_qwen2(folder)
    else:
        _write_llama_3(folder, adds_bos=not template.endswith("no BOS"))


def _write_sentencepiece(folder: Path, yi: bool) -> None:
    from sentencepiece import sentencepiece_model_pb2 as pb

    names = ["<|startoftext|>", "<|endoftext|>"] if yi else ["<s>", "</s>"]
    model = pb.ModelProto()
    kind = pb.ModelProto.SentencePiece

    def add(piece: str, score: float, type_: int) -> None:
        model.pieces.add(piece=piece, score=score, type=type_)

    add("<unk>", 0, kind.UNKNOWN)
    for name in names:
        add(name, 0, kind.CONTROL)
    for name in ["<|im_start|>", "<|im_end|>"] if yi else []:
        add(name, 0, kind.USER_DEFINED)
    for byte in range(256):
        add(f"<0x{byte:02X}>", 0, kind.BYTE)
    for rank, piece in enumerate(SPM_PIECES):
        add(piece, -rank, kind.NORMAL)
    for rank, char in enumerate(["▁", *map(chr, range(33, 127)), "é"]):
        add(char, -len(SPM_PIECES) - rank, kind.NORMAL)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback = pb.TrainerSpec.BPE, True
    trainer.vocab_size = len(model.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id = 0, 1, 2
    trainer.bos_piece, trainer.eos_piece = names
    normalizer.name, normalizer.remove_extra_whitespaces = "identity", False
    normalizer.add_dummy_prefix, normalizer.escape_whitespaces = True, True
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": not yi,
        "bos_token": names[0],
        "eos_token": "<|im_end|>" if yi else names[1],
        "unk_token": "<unk>",
    }
    if yi:
        added = {0: "<unk>", 1: names[0], 2: names[1], 4: "<|im_end|>"}
        config["added_tokens_decoder"] = {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in added.items()
        }
    _write_json(folder / "tokenizer_config.json", config)


def _byte_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    from tokenizers import pre_tokenizers

    merges = [(left, right) for left, right in map(str.split, MERGES)]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def _write_llama_3(folder: Path, adds_bos: bool) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    vocab, merges = _byte_vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in LLAMA_3])
    bos = LLAMA_3[0]
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos}
    _write_json(folder / "tokenizer_config.json", {**settings, "eos_token": LLAMA_3[1]})


def _write_qwen2(folder: Path) -> None:
    vocab, merges = _byte_vocabulary()
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    _write_json(
        folder / "added_tokens.json", {token: len(vocab) + i for i, token in enumerate(QWEN2)}
    )
    settings = {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": False, "bos_token": None}
    _write_json(
        folder / "tokenizer_config.json",
        {**settings, "eos_token": "<|im_end|>", "unk_token": None, "pad_token": "<|endoftext|>"},
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")
