"""The configs of SGLang's classes for NVILA, in the form that transformers loads."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen2Config, SiglipVisionConfig

SUB_CONFIGS = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}


class NVILAConfig(PretrainedConfig):
    """Config of an LLM, a vision tower, and the ids that stand for images and videos."""

    model_type = "nvila"
    sub_configs = SUB_CONFIGS

    def __init__(self, **kwargs: Any):
        _set_parts(self, kwargs)
        super().__init__(**kwargs)


# No subclass of the other: transformers would give it an __init__ of its own.
class NVILALiteConfig(PretrainedConfig):
    """The same, for NVILA-Lite."""

    model_type = "nvila_lite"
    sub_configs = SUB_CONFIGS

    def __init__(self, **kwargs: Any):
        _set_parts(self, kwargs)
        super().__init__(**kwargs)


def _set_parts(config: PretrainedConfig, values: dict[str, Any]) -> None:
    """Take the sub-configs, which may be dicts, and the token ids out of `values`."""
    for name, kind in SUB_CONFIGS.items():
        value = values.pop(name, None)
        setattr(config, name, value if isinstance(value, kind) else kind(**(value or {})))
    for name in ("image_token_id", "video_token_id"):
        setattr(config, name, values.pop(name, -1))
