"""Seeded damage to the files of tokenizers, processors and generation settings of a checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.prompt_cases import write_tokenizer
from tests.support.tiny import make_checkpoint

TEMPLATES = ("vicuna_v1", "hermes-2", "llama_3", "qwen2")
TOKENS = ("<s>", "</s>", "<unk>", "the", "[PAD]", "<|im_end|>", "<image>", "ab", "é", " ", "")
PROCESSOR_FILES = ("vision_tower/preprocessor_config.json", "llm/generation_config.json")
# What people and tools write there, right or wrong, besides values of another type.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, -1, 7, 367, 368, 5000, 2**24, 2**31, 2**63, 10**30, 0.5, -1.0,
    1e30, float("nan"), float("inf"), "", "a\x00b", "\ud800", "x" * 5000, "../../x", "bilinear",
    *TOKENS, [], [None], ["<s>"], ["<s>", 3], [0, 2], {}, {"content": "the"}, {"content": 3},
    {"content": "</s>", "lstrip": True, "rstrip": True, "special": False, "single_word": False,
     "normalized": True},
    {"a": "<s>"}, {"height": 28, "width": 14}, {"shortest_edge": 28}, [0.5, 0.5, 0.5],
    "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer", "GPT2",
)  # fmt: skip
KEYS = {
    "tokenizer_config.json": (
        "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens",
        "added_tokens_decoder", "bos_token", "chat_template", "clean_up_tokenization_spaces",
        "eos_token", "extra_special_tokens", "legacy", "model_max_length", "pad_token",
        "padding_side", "sp_model_kwargs", "split_special_tokens", "tokenizer_class",
        "truncation_side", "unk_token", "use_default_system_prompt",
    ),
    "special_tokens_map.json": (
        "additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token",
    ),
    "added_tokens.json": ("[PAD]", "<image>", "the", "<|im_end|>"),
    "generation_config.json": ("bos_token_id", "eos_token_id", "pad_token_id", "do_sample"),
    "preprocessor_config.json": (
        "crop_size", "do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize",
        "image_mean", "image_processor_type", "image_std", "resample", "rescale_factor", "size",
    ),
}  # fmt: skip
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 11 }}", "{% set x = messages %}{{ x.__class__.__mro__ }}", "{{ 1 / 0 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% if", "{{ raise_exception('no') }}",
    "{{ '%999999999d' % 3 }}", "{% include 'x' %}", "\ud800".encode("utf-8", "surrogatepass"),
)  # fmt: skip


def base(root: Path, template: str) -> Path:
    """Make a checkpoint whose tokenizer is of the kind that comes with `template`."""
    qwen2 = template == "qwen2"
    sizes = {"hidden": 64, "intermediate": 64, "vision_hidden": 32, "vision_intermediate": 32}
    make_checkpoint(root, qwen2=qwen2, layers=1, **sizes)
    for file in root.glob("llm/*token*.json"):
        file.unlink()
    write_tokenizer(root / "llm", template)
    return root


def damage(root: Path, rng: random.Random) -> str:
    """Change one to three things in the files of `root`; equal seeds do equal damage."""
    return "; ".join(rng.choice(_DAMAGES)(root, rng) for _ in range(rng.choice((1, 1, 1, 2, 3))))


def _files(root: Path) -> list[Path]:
    kinds = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens*")
    found = {file for kind in kinds for file in root.glob(f"llm/{kind}") if file.is_file()}
    return sorted(found | {root / name for name in PROCESSOR_FILES if (root / name).is_file()})


def _path(root: Path, name: str) -> Path:
    return root / ("vision_tower" if name.startswith("preprocessor") else "llm") / name


def _set_key(root: Path, rng: random.Random) -> str:
    name = rng.choice((*KEYS, "tokenizer_config.json", "preprocessor_config.json"))
    path, key, value = _path(root, name), rng.choice(KEYS[name]), rng.choice(VALUES)
    values = _read(path)
    if rng.random() < 0.1:
        values.pop(key, None)
        what = f"no {key} in {name}"
    else:
        values[key] = value
        what = f"{key} = {str(value)[:40]!r} in {name}"
    path.write_text(json.dumps(values), "utf-8")
    return what


def _add_token(root: Path, rng: random.Random) -> str:
    """Add a token to one of the places where releases have them."""
    content, number = rng.choice(TOKENS), rng.choice((0, 3, 100, 290, 360, 368, 400, 2**24, -1))
    flags = {key: rng.random() < 0.5 for key in
             ("special", "lstrip", "rstrip", "normalized", "single_word")}  # fmt: skip
    path = rng.choice(
        [root / "llm" / name for name in ("added_tokens.json", "tokenizer_config.json")]
    )
    values = _read(path)
    if path.name == "added_tokens.json":
        values[content] = number
    elif isinstance(values.get("added_tokens_decoder", {}), dict):
        values.setdefault("added_tokens_decoder", {})[str(number)] = {"content": content, **flags}
    path.write_text(json.dumps(values), "utf-8")
    return f"{content!r} as {number} {flags if path.name[0] == 't' else ''} in {path.name}"


def _change_library(root: Path, rng: random.Random) -> str:
    """Set a place in tokenizer.json."""
    path = root / "llm" / "tokenizer.json"
    values = holder = _read(path)
    if not values:
        return _set_key(root, rng)
    keys: list[Any] = [key for key in values if key != "model" or rng.random() < 0.3]
    where = []
    while True:
        key = rng.choice(keys)
        where.append(str(key))
        child = holder[key]
        if not isinstance(child, dict | list) or not child or rng.random() < 0.2:
            break
        holder = child
        keys = list(child) if isinstance(child, dict) else list(range(len(child)))
    value = rng.choice(VALUES)
    holder[key] = value
    path.write_text(json.dumps(values), "utf-8")
    return f"{'.'.join(where)[:60]} = {str(value)[:40]!r} in tokenizer.json"


def _change_bytes(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root))
    content = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(content)))
    kind = rng.choice(("flip", "truncate", "delete", "insert", "rubbish", "empty"))
    if kind == "flip" and content:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del content[at:]
    elif kind == "delete":
        del content[at : at + rng.randint(1, 40)]
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.randint(1, 20))
    else:
        content = bytearray(rng.randbytes(300) if kind == "rubbish" else b"")
    path.write_bytes(content)
    return f"{kind} at {at} of {path.name}"


def _remove(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root))
    path.unlink()
    return f"no {path.name}"


def _replace(root: Path, rng: random.Random) -> str:
    path = rng.choice(_files(root))
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
        return f"a folder for {path.name}"
    path.symlink_to(rng.choice(("nothing", path.name, "config.json")))
    return f"a link for {path.name}"


def _template(root: Path, rng: random.Random) -> str:
    source = rng.choice(JINJA)
    path = root / "llm" / "chat_template.jinja"
    if isinstance(source, bytes) or rng.random() < 0.5:
        shutil.rmtree(path, ignore_errors=True)
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
    else:
        path = root / "llm" / "tokenizer_config.json"
        path.write_text(json.dumps({**_read(path), "chat_template": source}), "utf-8")
    return f"chat template {source[:30]!r} in {path.name}"


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        if path.is_dir() or path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        return {}
    return values if isinstance(values, dict) else {}


_DAMAGES: tuple[Callable[[Path, random.Random], str], ...] = (
    *(_set_key,) * 6, *(_add_token,) * 3, *(_change_library,) * 3, *(_change_bytes,) * 3,
    _template, _remove, _replace,
)  # fmt: skip
