"""A tokenizer's own chat template: recognised by what it writes, or one line that ours is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import invoke
from tests.support.tiny import make_checkpoint
from vila_deploy import quantize
from vila_deploy.builder.resolve import BuildOptions, resolve_build
from vila_deploy.checkpoint.config import load_config
from vila_deploy.harness.subject import open_subject
from vila_deploy.processing.own_template import (
    follow_tokenizer,
    own_template,
    recognize,
    template_note,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = CHATML.replace("<|im_end|>{%", "<|im_end|>\n{%")
# NVlabs/VILA's qwen2.jinja: the system message stands in front where none is given.
QWEN2 = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n" + LINES
# The same text, written with a loop condition and Jinja's white space control.
QWEN2_LOOP = (
    "{%- for m in messages %}{%- if loop.first and m.role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}{%- endif -%}"
    "{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HERMES_2 = "<|im_start|>system\nAnswer the questions.<|im_end|>" + CHATML
VICUNA = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}{% else %}"
    " ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
BROKEN = ("{% for %}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}", "{{ x.y.z }}",
          "{{ ''.__class__.__mro__[1].__subclasses__() }}", "")  # fmt: skip


def checkpoint(folder: Path, template: Any, **variant: Any) -> Path:
    variant = {"qwen2": True, "added_tokens": ("<|im_start|>", "<|im_end|>"), **variant}
    root = make_checkpoint(folder / "c", **variant)
    file = root / "llm" / "tokenizer_config.json"
    values = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**values, "chat_template": template}), "utf-8")
    return root


def note(root: Path) -> str | None:
    return template_note(root / "llm", load_config(root))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (QWEN2, ("qwen2",)),
        (QWEN2_LOOP, ("qwen2",)),
        (HERMES_2, ("hermes-2",)),
        (VICUNA, ("vicuna_v1",)),
        (CHATML, ()),
        (LINES, ()),
        (QWEN2.replace("assistant<", "assistant.<"), ()),
        *((source, ()) for source in BROKEN),
    ],
)
def test_recognised_by_what_it_writes(source: str, names: tuple[str, ...], tmp_path: Path) -> None:
    assert recognize(source, checkpoint(tmp_path, source) / "llm") == names


@pytest.mark.parametrize("source", [QWEN2, QWEN2_LOOP, None])
def test_nothing_is_said_where_both_write_the_same(source: str | None, tmp_path: Path) -> None:
    assert note(checkpoint(tmp_path, source)) is None


@pytest.mark.parametrize("source", [LINES, CHATML, QWEN2.replace("helpful", "kind"), *BROKEN[:5]])
def test_another_template_is_said_in_one_line(source: str, tmp_path: Path) -> None:
    line = note(checkpoint(tmp_path, source))
    assert line is not None
    assert "own chat template is not used, qwen2 is" in line
    assert "\n" not in line


# VILA1.5: a Llama LLM with the added tokens of ChatML gets hermes-2.
OLD = {"qwen2": False}
OTHERS = [(HERMES_2, "hermes-2", "qwen2"), (VICUNA, "vicuna_v1", "qwen2"),
          (HERMES_2.replace("{{ m.role }}", "{{ m['role'] }}"), "hermes-2", "qwen2")]  # fmt: skip


@pytest.mark.parametrize(("source", "found", "default"), OTHERS)
def test_another_of_ours_is_followed_in_the_layout_of_nvila(
    source: str, found: str, default: str, tmp_path: Path
) -> None:
    root = checkpoint(tmp_path, source)
    line = note(root)
    assert line is not None
    assert f"is {found}, which is used instead of {default}; --prompt-template {default}" in line
    assert follow_tokenizer(load_config(root), root / "llm").prompt_template == found
    assert resolve_build(root, BuildOptions(target="cpu")).config.prompt_template == found
    assert open_subject(root).model.prompt == found
    quantize(root, tmp_path / "q", algorithm="rtn")
    assert load_config(tmp_path / "q").prompt_template == found


@pytest.mark.parametrize("name", ["qwen2", "hermes-2", "vicuna_v1"])
def test_a_named_template_is_not_overridden(name: str, tmp_path: Path) -> None:
    root = checkpoint(tmp_path, HERMES_2, root_config={"chat_template": name})
    config = load_config(root)
    assert follow_tokenizer(config, root / "llm") is config
    assert config.prompt_template == name


@pytest.mark.parametrize("source", [QWEN2, LINES, None, *BROKEN[:2]])
def test_nothing_is_followed_where_nothing_else_is_recognised(
    source: str | None, tmp_path: Path
) -> None:
    root = checkpoint(tmp_path, source)
    assert follow_tokenizer(load_config(root), root / "llm").prompt_template is None


@pytest.mark.parametrize(("source", "found"), [(QWEN2, "qwen2"), (VICUNA, "vicuna_v1")])
def test_another_of_ours_is_named_for_vila15(source: str, found: str, tmp_path: Path) -> None:
    root = checkpoint(tmp_path, source, **OLD)
    line = note(root)
    assert line is not None
    assert f"is {found}, but hermes-2 is used; --prompt-template {found} follows" in line
    assert follow_tokenizer(load_config(root), root / "llm").prompt_template is None


def test_a_file_and_lists_are_read(tmp_path: Path) -> None:
    tools = {"name": "tool_use", "template": "x"}
    root = checkpoint(tmp_path, [tools, {"name": "default", "template": QWEN2}])
    assert own_template(root / "llm") == QWEN2
    (root / "llm" / "chat_template.jinja").write_text(HERMES_2, "utf-8")
    assert own_template(root / "llm") == HERMES_2
    for strange in ([tools], 3, {"a": 1}, [1]):
        assert own_template(checkpoint(tmp_path / str(strange), strange) / "llm") is None


@pytest.mark.parametrize("command", ["vila-build-engine", "vila-quantize"])
def test_commands_say_it_once(command: str, tmp_path: Path) -> None:
    flags = ["--plan", *(["--target", "cpu"] if command == "vila-build-engine" else [])]
    root = checkpoint(tmp_path, LINES)
    done = invoke(command, root, *flags)
    assert done.returncode == 0
    assert done.stderr.count("own chat template is not used") == 1
    named = invoke(command, root, *flags, "--prompt-template", "qwen2")
    assert "chat template" not in named.stderr
