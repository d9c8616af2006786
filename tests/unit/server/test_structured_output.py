"""Masks of llguidance over our tokenizers; answers are checked with Python's own json module."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import pytest

from tests.support.paths import TINY_VILA
from vila_deploy.processing.tokenizer import Tokenizer, load_tokenizer
from vila_deploy.server.errors import ApiError
from vila_deploy.server.structured_output import MAX_SCHEMA_CHARACTERS, StructuredOutput

SPARE = 7  # rows of the embedding table behind the vocabulary
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(TINY_VILA / "llm")


@pytest.fixture(scope="module")
def output(tokenizer: Tokenizer) -> StructuredOutput:
    return StructuredOutput(tokenizer, tokenizer.vocab_size + SPARE, [2])


def draw(output: StructuredOutput, schema: dict[str, Any], rng: random.Random) -> list[int]:
    """Return tokens drawn from those that may come next, until the stop token."""
    constraint, tokens = output.constraint(json.dumps(schema)), [0]
    while tokens[-1] != 2 and len(tokens) < 400:
        (allowed,) = constraint.allowed().nonzero()
        tokens.append(2 if 2 in allowed else int(rng.choice(allowed)))
        constraint.accept(tokens[-1])
    return tokens[1:]


def test_any_allowed_way_is_json_of_the_schema(
    output: StructuredOutput, tokenizer: Tokenizer
) -> None:
    rng = random.Random(0)
    for _ in range(20):
        tokens = draw(output, PERSON, rng)
        assert tokens[-1] == 2
        value = json.loads(tokenizer.decode(tokens))
        assert set(value) == {"name", "age", "tags"}
        assert len(value["name"]) <= 4
        assert 0 <= value["age"] <= 99
        assert set(value["tags"]) <= {"a", "b"}


def test_no_special_or_spare_token_is_allowed(output: StructuredOutput) -> None:
    allowed = output.constraint('{"type": "object"}').allowed()
    assert allowed.dtype == bool
    assert not allowed[:3].any()
    assert not allowed[-SPARE:].any()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "bogus"}, "is not valid or too large"),
        ({"type": "string", "pattern": "((((("}, "has a pattern"),
        ({"unevaluatedProperties": {}}, "unevaluatedProperties, which is not supported"),
        ({"$ref": "http://127.0.0.1/x"}, "refers to another document"),
        ({"$ref": "file:///etc/passwd"}, "refers to another document"),
        ({"$ref": "#"}, "too costly"),
        ({"enum": []}, "is not valid"),
        ({"x-guidance": {"lenient": True}}, "x-guidance"),
        ({"title": "x" * MAX_SCHEMA_CHARACTERS}, "characters"),
    ],
)
def test_wrong_schemas_are_refused_in_our_words(
    output: StructuredOutput, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApiError) as caught:
        output.constraint(json.dumps(schema))
    assert message in str(caught.value)
    assert caught.value.code == "invalid_json_schema"
    assert caught.value.param == "response_format.json_schema.schema"
    assert "error" not in str(caught.value)


def nested(depth: int) -> dict[str, Any]:
    deep: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        deep = {"type": "array", "items": deep, "minItems": 1}
    return deep


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "schema",
    [
        nested(200),
        {"type": "array", "minItems": 10**9, "items": {"type": "array", "minItems": 10**9}},
        {"type": "string", "pattern": "(a{1,9999}){1,9999}(b{1,9999}){1,9999}"},
        {"type": "string", "pattern": "^(x+x+)+y$"},
        {"anyOf": [{"type": "string", "pattern": f".*{n}.*"} for n in range(300)]},
        {"type": "object", "properties": {f"k{n}": {"type": "string"} for n in range(2000)}},
    ],
    ids=["deep", "long", "repeats", "backtracking", "many patterns", "many keys"],
)
def test_costly_schemas_are_refused_or_cost_little(
    output: StructuredOutput, schema: dict[str, Any]
) -> None:
    with contextlib.suppress(ApiError):
        assert len(draw(output, schema, random.Random(0))) > 1
