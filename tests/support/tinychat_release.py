"""llm/ as the AWQ releases of VILA have it: one TinyChat *-v2.pt, no shards."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.support.damage import INDEX, edit_json
from tests.support.tiny import make_checkpoint
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.formats.base import QuantizedLinear
from vila_deploy.formats.tinychat import TINYCHAT_V2

NAME = "vila-1.5-3b-w4-g64-awq-v2.pt"
PT = f"llm/{NAME}"
Tensors = dict[str, Any]
# What llm-awq's search writes, and users take for the model.
SEARCH_RESULT = {
    "scale": [("input_layernorm", ("self_attn.q_proj",), torch.ones(8))],
    "clip": [("self_attn.v_proj", torch.ones(8, 1, 1))],
}


def release(folder: Path, name: str = NAME, **overrides: Any) -> tuple[Path, Path]:
    """A checkpoint in AutoAWQ's layout and the same weights as an AWQ release of VILA has them."""
    awq = make_checkpoint(folder / "awq", quantized=True, **overrides)
    root = folder / "release"
    shutil.copytree(awq, root)
    llm = open_checkpoint(awq).llm
    state: Tensors = OrderedDict()
    for key in llm.names():
        prefix, _, kind = key.rpartition(".")
        if kind == "qweight":
            linear = llm.linear(prefix)
            assert isinstance(linear, QuantizedLinear)
            packed = TINYCHAT_V2.pack(linear)
            state.update({f"{prefix}.{part}": tensor for part, tensor in packed.items()})
        elif kind not in ("qzeros", "scales") and key not in state:
            state[key] = llm.tensor(key)
    state._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    (root / "llm/model.safetensors").unlink()
    # The releases keep the index of the shards that they don't have.
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00002.safetensors")}
    (root / INDEX).write_text(json.dumps(index), "utf-8")
    edit_json("llm/config.json", lambda values: values.pop("quantization_config"))(root)
    torch.save(state, root / "llm" / name)
    return root, awq


def change(edit: Callable[[Tensors], Any], path: str = PT) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        state = torch.load(root / path)
        edit(state)
        torch.save(state, root / path)

    return damage


def as_bfloat16(state: Tensors) -> None:
    """The file as llm-awq's `--dtype bfloat16` writes it: every float in bfloat16."""
    for name, tensor in state.items():
        if name.endswith(".scaled_zeros"):
            scale = state[f"{name.removesuffix('.scaled_zeros')}.scales"].bfloat16()
            zero = (-tensor.float() / scale.float().clamp(min=1e-9)).round()
            state[name] = -(scale.float() * zero).bfloat16()
        elif name.endswith(".scales"):
            continue
        elif tensor.is_floating_point():
            state[name] = tensor.bfloat16()
    for name in [name for name in state if name.endswith(".scales")]:
        state[name] = state[name].bfloat16()


def save(value: Any) -> Callable[[Path], None]:
    return lambda root: torch.save(value, root / PT)
