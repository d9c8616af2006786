"""A LoRA adapter is merged as peft merges it, or refused in one line before any work."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.lora_cases import PART_PREFIXES, make_adapter, tensors
from tests.support.paths import TINY_VILA
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.lora import open_adapter
from vila_deploy.checkpoint.lora_config import HONOURED, NO_EFFECT
from vila_deploy.checkpoint.tensor_schema import unused_tensor
from vila_deploy.utils.errors import VilaDeployError

peft = pytest.importorskip("peft", reason="peft is not installed")
SMALL = {"hidden": 64, "intermediate": 64, "vision_hidden": 32, "vision_intermediate": 32}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLM = "base_model.model.llm"
# Of peft's LoraConfig, where it is not what a plain LoRA has.
REFUSED = {
    "megatron_config", "trainable_token_indices", "velora_config", "alora_invocation_tokens",
    "use_qalora", "monteclora_config", "layer_replication", "lora_bias", "target_parameters",
    "use_bdlora", "arrow_config", "kasa_config",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("base") / "tiny", layers=2, **SMALL)


CASES = {
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all linears": {"target_modules": "all-linear", "r": 2},
    "regex": {"target_modules": r"llm\.model\.layers\.[01]\.mlp\..*_proj", "r": 3},
    "patterns": {
        "target_modules": [*ATTENTION, "down_proj"],
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 8},
        "alpha_pattern": {r"^llm\.model\.layers\.0\.self_attn\.k_proj": 32, "o_proj": 1},
    },
    "rslora with patterns": {
        "target_modules": ATTENTION,
        "use_rslora": True,
        "rank_pattern": {"v_proj": 16},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"target_modules": ATTENTION, "use_dora": True, "r": 4},
    "dora of tower and llm": {"target_modules": ["q_proj", "fc1"], "use_dora": True},
    "tower and projector": {"target_modules": r"vision_tower\..*fc2|mm_projector\.layers\.[24]"},
    "one layer, transposed, excluded": {
        "target_modules": ["q_proj", "k_proj"],
        "layers_to_transform": [1],
        "fan_in_fan_out": True,
        "exclude_modules": ["k_proj"],
    },
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of adapted linears": {"target_modules": ["fc1"], "bias": "lora_only"},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "up_proj"], "r": 3},
    "head": {"target_modules": ["lm_head"], "init_lora_weights": "gaussian"},
    "projector in full": {"target_modules": ["q_proj"], "trained_in_full": "mm_projector"},
    "norms in full": {"target_modules": ["q_proj"], "trained_in_full": "norm"},
    "language model alone": {"target_modules": ATTENTION, "prefix": "llm."},
    "pickled": {"target_modules": ATTENTION, "safe": False},
}


def used(config, values):
    """Leave out what lies behind the selected hidden state of the tower, which stays as it was."""
    tower = PART_PREFIXES["vision"]
    return {
        name: value
        for name, value in values.items()
        if not (name.startswith(tower) and unused_tensor(config, name.removeprefix(tower)))
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_the_merge_of_peft(base, tmp_path, name):
    checkpoint = open_checkpoint(base)
    before = {name: tensor.clone() for name, tensor in tensors(checkpoint).items()}
    expected = make_adapter(checkpoint, tmp_path / "adapter", **CASES[name])
    adapter = open_adapter(tmp_path / "adapter", checkpoint.config)
    adapter.merge_into(checkpoint)
    merged, changed = tensors(checkpoint), 0
    for tensor, value in used(checkpoint.config, expected).items():
        assert merged[tensor].dtype == before[tensor].dtype
        # One step of float16: sums come in another order, and peft rounds some before it adds.
        step = 2**-10 * torch.maximum(before[tensor].float().abs(), value.float().abs())
        assert ((merged[tensor].float() - value.float()).abs() <= step + 2**-17).all(), tensor
        changed += not torch.equal(value, before[tensor])
    report = adapter.to_json()
    assert 0 < changed <= report["merged"] + report["replaced"]
    # Nothing is written into the mapped file of the base.
    assert all(torch.equal(v, before[n]) for n, v in tensors(open_checkpoint(base)).items())


def test_tiny_vila(tmp_path):
    checkpoint = open_checkpoint(TINY_VILA)
    before = {name: tensor.float() for name, tensor in tensors(checkpoint).items()}
    config = {
        "target_modules": ["q_proj", "v_proj", "down_proj", "fc1"],
        "modules_to_save": ["lm_head"],
        "rank_pattern": {"down_proj": 4},
        "alpha_pattern": {"v_proj": 32},
    }
    if checkpoint.config.llm.tie_word_embeddings:
        del config["modules_to_save"]
    expected = make_adapter(checkpoint, tmp_path, trained_in_full="mm_projector", **config)
    open_adapter(tmp_path, checkpoint.config).merge_into(checkpoint)
    merged = tensors(checkpoint)
    for name, value in used(checkpoint.config, expected).items():
        step = 2**-10 * torch.maximum(before[name].abs(), value.float().abs())
        assert ((merged[name].float() - value.float()).abs() <= step + 2**-17).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_dtypes(tmp_path, dtype):
    root = make_checkpoint(tmp_path / "tiny", layers=1, dtype=dtype, **SMALL)
    checkpoint = open_checkpoint(root)
    expected = make_adapter(checkpoint, tmp_path / "adapter", target_modules=ATTENTION)
    open_adapter(tmp_path / "adapter", checkpoint.config).merge_into(checkpoint)
    step = torch.finfo(dtype).eps
    merged = tensors(checkpoint)
    for name, value in used(checkpoint.config, expected).items():
        torch.testing.assert_close(merged[name], value, rtol=4 * step, atol=step / 16)


def test_every_key_of_peft_has_its_class():
    keys = {field.name for field in fields(peft.LoraConfig)} - {"runtime_config"}
    assert keys - NO_EFFECT - HONOURED == REFUSED & keys
    assert not NO_EFFECT & HONOURED


def edit(key, value):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return change


def edit_tensors(change):
    def edit_file(folder):
        file = folder / "adapter_model.safetensors"
        values = load_file(file)
        change(values)
        save_file(values, file)

    return edit_file


def first(values, part):
    return next(name for name in sorted(values) if part in name)


DAMAGES = {
    "no folder": (lambda f: f.rename(f.with_name("other")), "no such folder; give the adapter's"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), r"adapter_config.json: is missi"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "holds neither adapter_model.safetensors nor adapter_model.bin",
    ),
    "another kind": (edit("peft_type", "IA3"), "peft_type: is 'IA3', only LORA is merged"),
    "pissa": (edit("init_lora_weights", "pissa_niter_4"), "changes the base's weights too"),
    "lora_bias": (edit("lora_bias", True), "lora_bias'?: True is not followed here"),
    "a later key": (edit("use_novelty", {"a": 1}), "use_novelty'?: .* is not followed here"),
    "another rank": (edit("r", 5), r"has shape \[4, 64\], adapter_config.json says rank 5"),
    "rank 0": (edit("r", 0), "r: must be an integer in 1"),
    "rank of a pattern": (edit("rank_pattern", {"q_proj": 0}), "q_proj: must be an integer in 1"),
    "no regular expression": (edit("alpha_pattern", {"(": 1}), r"pattern '\(' can't be used"),
    "endless expression": (
        edit("alpha_pattern", {r"(?:\w|\w\w|\.|\w\w\w)+[A-Z]": 1}), "can't be used .takes too long"
    ),
    "no alpha": (edit("lora_alpha", "x"), "lora_alpha: must be a number"),
    "dora without magnitudes": (edit("use_dora", True), "must have lora_A, lora_B, lora_magnitude"),
    "A alone": (
        edit_tensors(lambda v: v.pop(first(v, "lora_B"))), "has lora_A, must have lora_A, lora_B"
    ),
    "another base": (
        edit_tensors(lambda v: v.update({f"{LLM}.model.layers.7.x": torch.ones(4, 64)})),
        "the base model has no such tensor; give the checkpoint that this adapter was trained on",
    ),
    "another width": (
        edit_tensors(lambda v: v.update({first(v, "lora_A"): torch.ones(4, 32)})),
        r"is a change of \[64, 32\], the base has \[64, 64\]",
    ),
    "more rows": (
        edit_tensors(lambda v: v.update({f"{LLM}.lm_head.weight": torch.ones(9, 64)})),
        r"has shape \[9, 64\], the base has",
    ),
    "infinite": (
        edit_tensors(lambda v: v[first(v, "lora_B")].fill_(torch.inf)), "holds NaN or Inf"
    ),
    "nothing": (edit_tensors(lambda v: v.clear()), "changes nothing"),
    "a pickle that calls": (
        lambda f: torch.save({"a": print}, f / "non_lora_trainables.bin"), "wants to call"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def plain_adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    checkpoint = open_checkpoint(base)
    make_adapter(checkpoint, folder, target_modules=["q_proj"], r=4)
    return folder, checkpoint.config


@pytest.mark.parametrize("name", DAMAGES)
def test_refuses_in_one_line(plain_adapter, tmp_path, name):
    original, config = plain_adapter
    folder = tmp_path / "adapter"
    shutil.copytree(original, folder)
    damage, expected = DAMAGES[name]
    damage(folder)
    with pytest.raises(VilaDeployError, match=expected) as error:
        open_adapter(folder, config)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_refuses_what_tied_tables_cannot_follow(tmp_path, target):
    untied = open_checkpoint(make_checkpoint(tmp_path / "untied", layers=1, **SMALL))
    make_adapter(untied, tmp_path / "adapter", target_modules=[target])
    tied = open_checkpoint(make_checkpoint(tmp_path / "tied", layers=1, tied=True, **SMALL))
    with pytest.raises(VilaDeployError, match="the model ties it with its"):
        open_adapter(tmp_path / "adapter", tied.config)


def test_an_empty_file_of_what_was_trained_in_full(base, tmp_path):
    checkpoint = open_checkpoint(base)
    make_adapter(checkpoint, tmp_path, target_modules=["q_proj"])
    torch.save({}, tmp_path / "non_lora_trainables.bin")
    assert open_adapter(tmp_path, checkpoint.config).to_json()["replaced"] == 0
