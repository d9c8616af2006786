"""Fields of OpenAI's API: which are supported, accepted without effect, or refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from vila_deploy.server.errors import ApiError
from vila_deploy.utils.errors import short
from vila_deploy.utils.fields import Fields

GENERATION_FIELDS = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "seed",
        "stop",
        "logprobs",
        "response_format",
        "ignore_eos",
    }
)
CHAT_FIELDS = GENERATION_FIELDS | {"messages", "max_completion_tokens", "top_logprobs"}
COMPLETION_FIELDS = GENERATION_FIELDS | {"prompt"}
# They say who asks, for what, and how it is billed and kept: no answer depends on them.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
        "chat_id",
        "session_id",
        "conversation_id",
        "message_id",
        "id",
        "background_tasks",
        "cache_salt",
        "priority",
        "request_id",
    }
)
# What offers the model tools, without asking for one: it may always answer in words.
TOOL_OFFERS = frozenset({"tools", "functions"})
# Fields that would change the answer, and the values at which they don't.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repeat_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "suffix": ("",),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "use_beam_search": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    # Written into every request by vllm-router, which knows the fields of other servers.
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "separate_reasoning": (True, False),
    "stream_reasoning": (True, False),
    "include_reasoning": (True, False),
}


class RequestFields(Fields):
    """A JSON object of a request; what is wrong with a key becomes an ApiError that names it."""

    def __init__(self, values: dict[str, Any], source: Path = Path("request"), prefix: str = ""):
        super().__init__(values, source, prefix)

    def error(self, key: str, what: str, fix: str | None = None) -> ApiError:
        if what == "is missing":
            fix = "add it"
        return ApiError(what, param=f"{self.prefix}{key}", fix=fix)

    def check_known(self, known: Collection[str], ignore_tools: bool = False) -> None:
        """Raise ApiError for a field with a value that would change the answer, and can't here.

        Args:
            ignore_tools: accept an offer of tools, which the model then doesn't hear of.
        """
        ignored = IGNORED | TOOL_OFFERS if ignore_tools else IGNORED
        for key, value in self.values.items():
            if value is None or key in known or key in ignored:
                continue
            if key not in NEUTRAL:
                raise self.error(short(key).strip("'"), "is no field of this API", "remove it")
            if not any(_same(value, neutral) for neutral in NEUTRAL[key]):
                fix = f"remove it or give {' or '.join(short(item) for item in NEUTRAL[key])}"
                if key in TOOL_OFFERS:
                    fix = "remove it, or start the server with --ignore-tools"
                raise self.error(key, f"{short(value)} is not supported", fix)


def _same(value: Any, neutral: Any) -> bool:
    """Compare with JSON's types: 0 and 0.0 are one number, false is none."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
