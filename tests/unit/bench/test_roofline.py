"""Bytes of a step and rooflines of the four language models, against figures computed by hand."""

from __future__ import annotations

import pytest

from vila_deploy.bench.roofline import DEVICES, cache_bytes_per_token, roofline, step_bytes
from vila_deploy.checkpoint.presets import preset
from vila_deploy.engine.target import get_target

# Computed by hand from the linears' parameters: GB a step in fp16 and in W4 with the head in fp16.
STEP_GB = {
    "VILA1.5-3b": (5.239, 1.483),
    "Llama-3-VILA1.5-8B": (15.010, 4.677),
    "VILA1.5-13b": (25.704, 6.920),
    "VILA1.5-40b": (67.860, 18.308),
}
# Tokens/s, fp16 and W4, at the published bandwidth of each device without cached tokens.
TOKENS_PER_S = {
    ("VILA1.5-3b", "a100"): (297, 1049),
    ("VILA1.5-3b", "rtx4090"): (192, 680),
    ("VILA1.5-3b", "orin"): (39.1, 138),
    ("VILA1.5-3b", "h100"): (639, 2260),
    ("VILA1.5-3b", "h200"): (916, 3238),
    ("Llama-3-VILA1.5-8B", "a100"): (104, 332),
    ("Llama-3-VILA1.5-8B", "rtx4090"): (67.2, 215),
    ("Llama-3-VILA1.5-8B", "orin"): (13.6, 43.8),
    ("Llama-3-VILA1.5-8B", "h100"): (223, 716),
    ("Llama-3-VILA1.5-8B", "h200"): (320, 1026),
    ("VILA1.5-13b", "a100"): (60.5, 225),
    ("VILA1.5-13b", "rtx4090"): (39.2, 146),
    ("VILA1.5-13b", "orin"): (8.0, 29.6),
    ("VILA1.5-13b", "h100"): (130, 484),
    ("VILA1.5-13b", "h200"): (187, 694),
    ("VILA1.5-40b", "a100"): (22.9, 84.9),
    ("VILA1.5-40b", "rtx4090"): (14.9, 55.1),
    ("VILA1.5-40b", "orin"): (3.0, 11.2),
    ("VILA1.5-40b", "h100"): (49.4, 183),
    ("VILA1.5-40b", "h200"): (70.7, 262),
}


@pytest.mark.parametrize("model", STEP_GB)
def test_bytes_of_a_step(model: str) -> None:
    for precision, gigabytes in zip(("fp16", "int4"), STEP_GB[model], strict=True):
        assert step_bytes(preset(model, precision), precision) == pytest.approx(
            gigabytes * 1e9, rel=0.001
        )


@pytest.mark.parametrize(("model", "device"), TOKENS_PER_S)
def test_tokens_per_second(model: str, device: str) -> None:
    fp16, int4 = TOKENS_PER_S[model, device]
    # Printed with three digits, Orin's with two.
    assert roofline(model, "fp16", device) == pytest.approx(fp16, rel=0.015 if fp16 < 10 else 0.01)
    assert roofline(model, "int4", device) == pytest.approx(int4, rel=0.01)


def test_the_cache_counts() -> None:
    """The 3B model has 320 KiB a token, 168 MB at 512; an H100 gives 2030 tokens/s there."""
    config = preset("VILA1.5-3b", "int4")
    assert cache_bytes_per_token(config.llm) == 320 << 10
    assert cache_bytes_per_token(config.llm, 32) == 640 << 10
    more = step_bytes(config, "int4", 512) - step_bytes(config, "int4")
    assert more == 512 * (320 << 10)
    assert roofline("VILA1.5-3b", "int4", "h100", 512) == pytest.approx(2030, rel=0.01)


def test_every_device_has_a_published_bandwidth() -> None:
    assert all(get_target(device).bandwidth_bytes_per_s for device in DEVICES)
