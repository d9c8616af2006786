"""Read adapter_config.json of a LoRA adapter, as peft saves it: ranks, scaling, what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vila_deploy.checkpoint.folder_layout import ADAPTER_CONFIG
from vila_deploy.utils.errors import VilaDeployError, short
from vila_deploy.utils.fields import Fields

MAX_PATTERNS, MATCH_SECONDS = 4096, 0.3
# Keys of peft's LoraConfig that say how an adapter was trained; the tensors say what it changes.
NO_EFFECT = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "lora_dropout", "bias",
    "modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "eva_config",
    "qalora_group_size", "loftq_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
    # peft ignores it for nn.Linear, which all linears of VILA are.
    "fan_in_fan_out",
})  # fmt: skip
HONOURED = frozenset({
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "init_lora_weights",
})  # fmt: skip
# Initializations of A and B alone; others, such as pissa, change the base's weights as well.
PLAIN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
FIX = "merge it with peft's merge_and_unload first, and give the merged checkpoint"


@dataclass(frozen=True)
class LoraConfig:
    """The parts of peft's LoraConfig that a merge needs.

    Args:
        rank_pattern, alpha_pattern: regular expressions of module names, and the values there.
        rank_stabilized: scaling by alpha / √rank instead of alpha / rank.
        dora: each output channel has a trained magnitude.
        base: the name of the model that it was trained on, if it says so.
    """

    source: Path
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilized: bool
    dora: bool
    base: str | None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's A and B."""
        key = self._pattern(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling(self, module: str) -> float:
        """Return the factor of B·A in a module's weight."""
        key, rank = self._pattern(self.alpha_pattern, module), self.rank_of(module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def _pattern(self, patterns: Mapping[str, object], module: str) -> str | None:
        """Return the first key that matches the end of a module's name, as peft chooses it."""
        import regex

        for key in patterns:
            try:
                # Python's own re has no time limit, and a pattern can take for ever.
                if regex.match(rf"(.*\.)?({key})$", module, timeout=MATCH_SECONDS):
                    return key
            except (regex.error, TimeoutError) as error:
                what = "takes too long" if isinstance(error, TimeoutError) else str(error)
                raise VilaDeployError(
                    f"pattern {short(key)} can't be used ({what})", where=self.source, fix=FIX
                ) from error
        return None


def load_lora_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json in `folder`.

    Raises:
        VilaDeployError: it is missing or no JSON, another kind of adapter than LoRA, or has a
            setting that a merge here does not follow.
    """
    fields = Fields.from_file(folder / ADAPTER_CONFIG)
    kind = fields.text("peft_type", "LORA")
    if kind != "LORA":
        raise fields.error("peft_type", f"is {short(kind)}, only LORA is merged", FIX)
    init = fields.values.get("init_lora_weights", True)
    if not any(init is plain or init == plain for plain in PLAIN_INITIALIZATIONS):
        what = f"{short(init)} changes the base's weights too, which is not followed here"
        raise fields.error("init_lora_weights", what, FIX)
    for key, value in fields.values.items():
        if key not in NO_EFFECT | HONOURED and value not in (None, False, "", [], {}):
            raise fields.error(short(key), f"{short(value)} is not followed here", FIX)
    patterns = {key: _patterns(fields, key) for key in ("rank_pattern", "alpha_pattern")}
    ranks, alphas = patterns.values()
    base = fields.values.get("base_model_name_or_path")
    return LoraConfig(
        source=fields.source,
        rank=fields.integer("r", 8, high=1 << 16),
        alpha=fields.number("lora_alpha", 8),
        rank_pattern={key: ranks.integer(key, high=1 << 16) for key in ranks.values},
        alpha_pattern={key: alphas.number(key) for key in alphas.values},
        rank_stabilized=fields.boolean("use_rslora", False),
        dora=fields.boolean("use_dora", False),
        base=base if isinstance(base, str) and base else None,
    )


def _patterns(fields: Fields, key: str) -> Fields:
    if key not in fields:
        return Fields({}, fields.source)
    patterns = fields.child(key)
    if len(patterns.values) > MAX_PATTERNS:
        raise fields.error(key, f"has more than {MAX_PATTERNS} patterns", FIX)
    return patterns
