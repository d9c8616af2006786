"""The reference model against transformers' whole models, and its parts against plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from tests.support.paths import GOLDEN
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.variants import PROJECTOR_TYPES
from vila_deploy.model import llm as llm_module
from vila_deploy.model.projector import Downsample, Projector
from vila_deploy.model.vila import ReferenceSession


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("qwen2", [False, True])
def test_logits_equal_transformers(tmp_path: Path, kv_heads: int, qwen2: bool) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", kv_heads=kv_heads, qwen2=qwen2))
    config = checkpoint.config.llm
    kind = Qwen2ForCausalLM if qwen2 else LlamaForCausalLM
    model = kind(llm_module.transformers_config(config)).eval()
    assert qwen2 == ("model.layers.1.self_attn.k_proj.bias" in model.state_dict())
    state = {n: checkpoint.llm.tensor(n).float() for n in model.state_dict()}
    model.load_state_dict(state)
    tokens = torch.randint(3, config.vocab_size, (1, 20))
    with torch.inference_mode():
        expected = model(tokens).logits[0].numpy()

    session = ReferenceSession(checkpoint)
    embeds = session.embed_tokens(tokens[0].tolist())
    at_once = session.prefill(embeds)
    np.testing.assert_allclose(at_once, expected[-1], atol=1e-4)

    session.truncate(0)
    stepwise = [session.prefill(embeds[:7]), session.prefill(embeds[7:12])]
    stepwise += [session.decode(token) for token in tokens[0, 12:].tolist()]
    np.testing.assert_allclose(stepwise[0], expected[6], atol=1e-4)
    np.testing.assert_allclose(stepwise[-1], expected[-1], atol=1e-4)
    assert session.position == 20


def test_vision_selects_the_second_last_hidden_state(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", vision_layers=4))
    vision = json.loads((checkpoint.root / "vision_tower" / "config.json").read_text())
    config = SiglipVisionConfig(**vision, vision_use_head=False)
    tower = SiglipVisionModel(config).eval()
    names = {n: n if n.startswith("vision_model.") else f"vision_model.{n}"
             for n in tower.state_dict()}  # fmt: skip
    tower.load_state_dict({n: checkpoint.vision.tensor(d).float() for n, d in names.items()})
    pixels = torch.randn(2, 3, 42, 42)
    with torch.inference_mode():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-2]
    session = ReferenceSession(checkpoint)
    expected = session.vision.projector(hidden).numpy()
    np.testing.assert_allclose(session.encode_images(pixels.numpy()), expected, atol=1e-4)


def test_unused_tower_layers_need_not_exist(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "c")
    pixels = np.random.default_rng(0).normal(size=(1, 3, 42, 42)).astype(np.float32)
    whole = ReferenceSession(open_checkpoint(root)).encode_images(pixels)
    file = root / "vision_tower" / "model.safetensors"
    used = {n: t for n, t in load_file(file).items() if "embeddings" in n or ".layers." in n}
    last = [n for n in used if ".layers.2." in n]
    assert last
    save_file({n: t for n, t in used.items() if n not in last}, file)
    np.testing.assert_array_equal(
        ReferenceSession(open_checkpoint(root)).encode_images(pixels), whole
    )


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("side", [4, 5])
@pytest.mark.parametrize("window", [2, 3])
def test_downsample_equals_plain_loops(side: int, order: str, window: int) -> None:
    features = torch.randn(1, side * side, 3)
    out = -(-side // window)
    padded = torch.zeros(out * window, out * window, 3)
    padded[:side, :side] = features[0].view(side, side, 3)
    cells = [(r, c) for r in range(out) for c in range(out)]
    if order == "column":
        cells = [(r, c) for c in range(out) for r in range(out)]
    expected = torch.stack(
        [
            torch.cat([
                padded[r * window + i, c * window + j] for i in range(window) for j in range(window)
            ])
            for r, c in cells
        ]
    )  # fmt: skip
    torch.testing.assert_close(Downsample(window, order)(features)[0], expected)


@pytest.mark.parametrize("case", ["column-4", "column-5", "row-4", "row-5"])
def test_downsample_equals_the_original(case: str) -> None:
    """Golden numbers: see "recipe" in the file."""
    order, side = case.split("-")
    count = int(side) ** 2
    tokens = Downsample(2, order)(torch.arange(1.0, 2 * count + 1).view(1, count, 2))
    expected = json.loads((GOLDEN / "mlp_downsample.json").read_text())["tokens"][case]
    assert tokens[0].int().tolist() == expected


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "projectors.json").read_text("utf-8"))["tokens"]
)
def test_projector_equals_the_original(case: str) -> None:
    """Golden numbers: see "recipe" in the file."""
    name, order = case.split(", ")
    kind = PROJECTOR_TYPES[name]
    projector = Projector(4, 6, kind, order)
    on_disk = {
        f"{kind.prefix(int(i))}.{rest}": (i, rest)
        for i, _, rest in (name.partition(".") for name in projector.state_dict())
    }
    random = np.random.RandomState(7)
    for name in sorted(on_disk):
        index, rest = on_disk[name]
        parameter = projector.get_submodule(index).get_parameter(rest)
        parameter.data = torch.from_numpy(random.standard_normal(tuple(parameter.shape))).float()
    features = np.random.RandomState(8).standard_normal((1, 25, 4))
    with torch.inference_mode():
        tokens = projector(torch.from_numpy(features).float())[0]
    expected = json.loads((GOLDEN / "projectors.json").read_text("utf-8"))["tokens"][case]
    np.testing.assert_allclose(tokens.numpy(), np.array(expected), atol=1e-5)


def test_quantized_checkpoint_uses_its_dequantized_weights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path / "c", quantized=True))
    layer = llm_module.load_decoder_layer(checkpoint.config.llm, checkpoint.llm, 1)
    stored = checkpoint.llm.linear("model.layers.1.mlp.down_proj")
    group = stored.group_size
    weight = layer.mlp.down_proj.weight
    for row, column in ((0, 0), (5, group), (17, 2 * group - 1)):
        level = int(stored.q[row, column]) - int(stored.zero[row, column // group])
        assert float(weight[row, column]) == level * float(stored.scale[row, column // group])
