"""Restrict answers to JSON of a schema: llguidance says which tokens may come next."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vila_deploy.processing.tokenizer import Tokenizer
from vila_deploy.server.errors import ApiError
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.extras import install_extra

if TYPE_CHECKING:
    from llguidance import LLMatcher

SCHEMA_PARAM = "response_format.json_schema.schema"
MAX_SCHEMA_CHARACTERS = 64 * 1024
# Of one line, with a space behind colons and commas: a model can't go on with spaces forever.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# What a schema may cost, in llguidance's units: milliseconds a token and 20 MB at most.
LIMITS: dict[str, Any] = {
    "max_grammar_size": 50_000,
    "max_lexer_states": 20_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "verbose_errors": False,
}


class StructuredOutput:
    """Makes constraints for one model.

    Raises:
        VilaDeployError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: Collection[int]):
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise VilaDeployError(
                "JSON answers need llguidance", fix=install_extra("serve")
            ) from None
        self._vocab_size = vocab_size
        stops = sorted(stop_token_ids)
        vocabulary: Any = _Vocabulary(tokenizer, vocab_size, stops[0])
        self._tokenizer = LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=stops)

    def constraint(self, schema: str) -> JsonConstraint:
        """Return what lets an answer be JSON of `schema`, a JSON text, and nothing else.

        Raises:
            ApiError: a schema that is wrong, too large, or has what is not supported.
        """
        from llguidance import LLMatcher, LLParserLimits

        if len(schema) > MAX_SCHEMA_CHARACTERS:
            raise _wrong(f"has more than {MAX_SCHEMA_CHARACTERS} characters", "make it smaller")
        if '"x-guidance"' in schema:
            raise _wrong("has the key x-guidance", "remove it")
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
        except ValueError:
            raise _wrong("is no JSON schema") from None
        limits = LLParserLimits(**LIMITS)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise _wrong(*_explain(matcher.get_error(), schema))
        constraint = JsonConstraint(matcher, self._vocab_size)
        if matcher.is_stopped() or not constraint.allowed().any():
            raise _wrong("can be met by no answer")
        return constraint


class JsonConstraint:
    """A TokenConstraint over a matcher of llguidance."""

    def __init__(self, matcher: LLMatcher, vocab_size: int):
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        return mask.view(np.bool_)

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _wrong("became too costly to follow", "make it simpler")


class _Vocabulary:
    """What llguidance asks of a tokenizer that isn't one of its own."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_token_id: int):
        tokens = [tokenizer.token_bytes(number) for number in range(vocab_size)]
        self.tokens = [token or b"" for token in tokens]
        self.special_token_ids = [number for number, token in enumerate(tokens) if token is None]
        self.eos_token_id = stop_token_id
        self.bos_token_id: int | None = None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _wrong(what: str, fix: str | None = None) -> ApiError:
    return ApiError(what, param=SCHEMA_PARAM, code="invalid_json_schema", fix=fix)


def _explain(reason: str, schema: str) -> tuple[str, str]:
    """Return in our words why llguidance refuses a schema, and what to do."""
    quoted = [word for word in reason.split('"')[1::2] if f'"{word}"' in schema]
    if reason.startswith("Unimplemented keys") and quoted:
        return f"has the keyword {quoted[0]}, which is not supported", "remove it"
    if "regex" in reason.lower():
        return "has a pattern that is no regular expression or too costly", "make it simpler"
    if "not present in a registry" in reason:
        return "refers to another document", "put it under $defs"
    return "is not valid or too large", "make it simpler"
