"""A chat template is rendered as transformers does, and can't hold a command up."""

import pytest

from vila_deploy.processing.template_worker import render_within_limits

MESSAGES = [{"role": "user", "content": "é 日 <b>"}, {"role": "assistant", "content": "x"}]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def test_equals_transformers(tmp_path):
    from transformers import AutoTokenizer

    from tests.support.prompt_cases import write_tokenizer

    write_tokenizer(tmp_path, "llama_3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tail = "{% if add_generation_prompt %}{{ bos_token }}<|im_start|>assistant\n{% endif %}"
    for source in (
        CHATML + tail,
        "{%- for m in messages %}\n  {{ m['content'] | trim }}\n{% endfor %}",
    ):
        expected = tokenizer.apply_chat_template(
            MESSAGES, chat_template=source, add_generation_prompt=True, tokenize=False
        )
        tokens = {"bos_token": tokenizer.bos_token}
        assert render_within_limits(source, MESSAGES, tokens) == expected


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10 ** 11 }}",
        "{{ '%999999999d' % 3 }}{{ '%999999999d' % 3 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('no system role') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 / 0 }}",
        "{% if",
        "{% include '/etc/passwd' %}",
    ],
)
def test_what_fails_or_takes_too_much_is_nothing(source):
    assert render_within_limits(source, MESSAGES, {}) is None
