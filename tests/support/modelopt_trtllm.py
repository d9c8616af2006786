"""Makes tests/golden/trtllm_*.json with NVIDIA Model Optimizer, which test_trtllm_golden.py reads.

    pip install torch transformers==4.57.3 nvidia-modelopt==0.47.0
    python tests/support/modelopt_trtllm.py tests/golden [--keep DIR] [--smollm2 FOLDER_WITH_CONFIG]

Runs on a CPU. What is committed: names, dtypes, shapes and the two configs of each export.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SIZES = {
    "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "vocab_size": 1003, "max_position_embeddings": 512,
    "rope_theta": 50000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def tiny(family: str) -> torch.nn.Module:
    import transformers

    config_class = getattr(transformers, f"{family}Config")
    model_class = getattr(transformers, f"{family}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES))
    model.config.architectures = [model_class.__name__]
    return model.half().eval()


def smollm2(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()


def export(model: torch.nn.Module, folder: Path, quantized: bool, tp: int = 1) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    if quantized:
        config = copy.deepcopy(mtq.INT4_AWQ_CFG)
        text = json.dumps(config, default=str)
        assert "128" in text
        config = _with_group(config, 64)
        tokens = torch.randint(0, 1000, (4, 32), generator=torch.Generator().manual_seed(1))
        model = mtq.quantize(model, config, lambda m: m(tokens))
    decoder = "qwen" if "Qwen" in type(model).__name__ else "llama"
    with torch.inference_mode():
        export_tensorrt_llm_checkpoint(
            model, decoder, torch.float16, folder, inference_tensor_parallel=tp
        )


def _with_group(value: Any, size: int) -> Any:
    """Blocks of `size` wherever the config says 128."""
    if isinstance(value, dict):
        return {k: size if v == 128 and k == -1 else _with_group(v, size) for k, v in value.items()}
    return [_with_group(v, size) for v in value] if isinstance(value, list) else value


def summary(folder: Path) -> dict[str, Any]:
    """Everything about an export but its numbers."""
    ranks = {}
    for file in sorted(folder.glob("rank*.safetensors")):
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in sorted(opened.keys())}
            ranks[file.name] = {n: [s.get_dtype(), s.get_shape()] for n, s in slices.items()}
    configs = {f.name: json.loads(f.read_text()) for f in sorted(folder.glob("*.json"))}
    return {"configs": configs, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--keep", type=Path, required=True, help="exports go here")
    parser.add_argument("--smollm2", type=Path)
    options = parser.parse_args()
    models = {"llama": lambda: tiny("Llama"), "qwen2": lambda: tiny("Qwen2")}
    if options.smollm2:
        models = {"smollm2": lambda: smollm2(options.smollm2)}
    for name, make in models.items():
        cases = {}
        for precision in ("fp16", "int4_awq"):
            folder = options.keep / f"{name}-{precision}"
            export(make(), folder, precision == "int4_awq")
            cases[precision] = summary(folder)
        text = json.dumps(cases, indent=1, sort_keys=True)
        (options.out / f"trtllm_{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
