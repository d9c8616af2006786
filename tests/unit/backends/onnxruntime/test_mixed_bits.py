"""CPU engines whose linears have several numbers of bits, beside the effective weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.support.conversions import effective_weights
from tests.support.mixed_bits import make_mixed_checkpoint
from vila_deploy.builder import build_engine
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.model.llm import LanguageModel
from vila_deploy.runtime.open_engine import open_engine

CASES: dict[str, tuple[str, bool, str, dict[str, Any]]] = {
    "4 and 8, zero points": ("compressed-tensors", False, "int8x2", {}),
    "4 and 8, symmetric, biases": ("compressed-tensors", True, "int8x2", {"qwen2": True}),
    "4, 5 and 8, zero points, biases": ("gguf", False, "int8x2", {"qwen2": True, "kv_heads": 2}),
    "4, 5 and 8, symmetric": ("gguf", True, "fp32", {}),
}
# Largest difference of logits, as a share of their spread; as of linears in 4 bits alone.
TOLERANCES = {"fp32": 5e-5, "int8x2": 1e-3}


class Dense:
    """A WeightSource of float weights by name."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        self._weights = weights

    def tensor(self, name: str) -> torch.Tensor:
        return self._weights[name]

    def linear(self, prefix: str) -> torch.Tensor:
        return self._weights[f"{prefix}.weight"]


def accuracy_levels(engine: Path) -> list[int]:
    """`accuracy_level` of each product with 8-bit weights in all graphs of the language model."""
    found = []
    for file in (engine / "llm").glob("*.onnx"):
        for node in onnx.load(file, load_external_data=False).graph.node:
            values = {attribute.name: attribute.i for attribute in node.attribute}
            if node.op_type == "MatMulNBits" and values["bits"] == 8:
                found.append(values["accuracy_level"])
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_the_effective_weights(case: str, tmp_path: Path) -> None:
    format, symmetric, activations, changes = CASES[case]
    root, out = make_mixed_checkpoint(tmp_path, format, symmetric, **changes), tmp_path / "engine"
    checkpoint = open_checkpoint(root)
    reference = LanguageModel(checkpoint.config.llm, Dense(effective_weights(checkpoint)))
    build_engine(root, out, "cpu", activations=activations, vision="fp16", lm_head="fp16")
    prompt, following = range(20, 60), [7, 30, 31, 32]
    assert set(accuracy_levels(out)) == {4}, "others dequantize all 8-bit weights at every step"
    with open_engine(out) as engine:
        session = engine.session
        embeds = session.embed_tokens([*prompt, *following])
        found = [session.prefill(0, embeds[: len(prompt)])]
        found += [session.decode([0], [token])[0] for token in following]
    expected = reference(torch.from_numpy(embeds)).numpy()[len(prompt) - 1 :]
    differences = np.abs(np.stack(found) - expected).max(axis=1)
    assert max(differences / expected.std(axis=1)) < TOLERANCES[activations]
