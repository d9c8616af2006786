"""Other tools quantize the model of smollm2.py on the same tokens, each in its own environment.

$ python benchmarks/quantization/smollm2.py prepare SCRATCH
$ BASELINE_VENV/bin/python benchmarks/quantization/baselines.py SCRATCH autoawq-asym awq.safetensors
$ python benchmarks/quantization/smollm2.py evaluate SCRATCH awq.safetensors

Every candidate gets 4 bits in groups of 64 for the seven linears of each layer, 32 × 512 tokens and
the tool's own defaults else; float32 throughout, on the CPU. What comes out are the effective
weights, with the row of facts (version, CPU seconds, memory) in the file's metadata. Needs
torch, transformers, safetensors and the tool (vila_deploy isn't imported here):

| candidate | environment |
|---|---|
| autoawq-* | autoawq 0.2.9, transformers 4.51.3 |
| autoround-* | auto-round 0.16.1 |
| llmcompressor-* | llmcompressor 0.14.0.1 |
| modelopt-* | nvidia-modelopt 0.47.0, requests, transformers 4.57 |
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

GROUP_SIZE = 64
CLIP_TOKENS = 512  # llm-awq's number of tokens for its clip search, over all blocks
SAME_MODEL = 1e-3  # largest difference of final hidden states, a tenth of what RTN changes at least


@dataclass
class Cost:
    """What quantizing took, without imports and loading; memory with them."""

    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0

    def of(self, work: Callable[[], Any]) -> Any:
        start = _cpu_seconds()
        result = work()
        self.cpu_seconds = _cpu_seconds() - start
        self.peak_rss_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return result


def _cpu_seconds() -> float:
    """User and system, of this process and the children that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def load_model(scratch: Path) -> nn.Module:
    """The fp32 model, checked to compute in this environment what it did in `prepare`'s."""
    model = AutoModelForCausalLM.from_pretrained(scratch / "model", torch_dtype=torch.float32)
    check_model(model.eval(), scratch)
    return model


@torch.no_grad()
def check_model(model: nn.Module, scratch: Path) -> None:
    """Another version of transformers may read config.json otherwise, or not at all."""
    block = load_file(scratch / "tokens.safetensors")["topics"][:1]
    expected = load_file(scratch / "teacher.safetensors")["topics"][: block.shape[1]]
    off = float((model.model(block)[0][0] - expected).abs().max())
    if off > SAME_MODEL:
        raise SystemExit(f"this environment computes another model: hidden states {off:.3g} off")


def dense(model: nn.Module, effective: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Weights by name: `effective` of each quantized linear, embedding and norms as they are."""
    weights = {
        f"{name}.weight": module.weight.detach()
        for name, module in model.named_modules()
        if name.endswith("norm") or name.endswith("embed_tokens")
    }
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            weights[f"{name}.weight"] = effective(module).detach().float()
    return {name: weight.clone().contiguous() for name, weight in weights.items()}


def autoawq(scratch: Path, tokens: Tensor, cost: Cost, *, symmetric: bool) -> dict[str, Tensor]:
    """AutoAWQ 0.2.9; asymmetric packed as GEMM and unpacked again with its own function.

    Symmetric weights it packs for a GPU's kernel only, so there they are what it would pack.
    """
    from awq import AutoAWQForCausalLM
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.packing_utils import dequantize_gemm

    class Quantizer(AwqQuantizer):
        """With a real copy of the weights to restore: on a CPU its `.cpu()` copies nothing."""

        def _compute_best_scale(
            self, x: Tensor, w_mean: Tensor, x_mean: Tensor, module2inspect: nn.Module, *rest: Any
        ) -> Tensor:
            stored = module2inspect.state_dict
            module2inspect.state_dict = lambda: {n: t.clone() for n, t in stored().items()}
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module2inspect, *rest)
            finally:
                del module2inspect.state_dict

        def _apply_quant(self, module: nn.Module, named_linears: dict[str, nn.Linear]) -> None:
            if not symmetric:
                super()._apply_quant(module, named_linears)
                return
            for linear in named_linears.values():
                linear.weight.data = self.pseudo_quantize_tensor(linear.weight.data.half())[0]

    baseline = AutoAWQForCausalLM.from_pretrained(
        str(scratch / "model"), torch_dtype=torch.float32, device_map="cpu"
    )
    check_model(baseline.model, scratch)
    scheme = {
        "q_group_size": GROUP_SIZE,
        "w_bit": 4,
        "version": "GEMM",
        "zero_point": not symmetric,
    }
    blocks, length = tokens.shape
    cost.of(
        lambda: baseline.quantize(
            quant_config=scheme,
            calib_data=tokens.tolist(),
            max_calib_samples=blocks,
            max_calib_seq_len=length,
            quantizer_cls=Quantizer,
        )
    )

    def effective(linear: nn.Module) -> Tensor:
        if symmetric:
            return linear.weight
        parts = (linear.qweight, linear.qzeros, linear.scales.float())
        return dequantize_gemm(*parts, 4, GROUP_SIZE).T

    return dense(baseline.model, effective)


def autoround(
    scratch: Path, tokens: Tensor, cost: Cost, *, symmetric: bool, light: bool
) -> dict[str, Tensor]:
    """AutoRound by its default recipe, or by its light one: a quarter of the steps."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    model, blocks = load_model(scratch), len(tokens)
    recipe = {"iters": 50, "lr": 5e-3} if light else {}
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(scratch / "model"),
        scheme="W4A16",
        group_size=GROUP_SIZE,
        sym=symmetric,
        dataset=list(tokens[:, None]),
        nsamples=blocks,
        seqlen=tokens.shape[1],
        device_map="cpu",
        **recipe,
    )
    quantized = cost.of(rounding.quantize)[0]
    return dense(quantized, lambda linear: linear.weight)


def llmcompressor(
    scratch: Path, tokens: Tensor, cost: Cost, *, awq: bool, gptq: bool, symmetric: bool
) -> dict[str, Tensor]:
    """llm-compressor's AWQ, its GPTQ or one after the other, as its examples stack them."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *_, **__: self  # it is called without asking
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=GROUP_SIZE
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    rounding = GPTQModifier if gptq else QuantizationModifier
    recipe = [AWQModifier()] if awq else []
    recipe.append(rounding(config_groups=groups, ignore=["lm_head"]))
    model = load_model(scratch)
    columns = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    blocks, length = tokens.shape
    cost.of(
        lambda: oneshot(
            model=model,
            dataset=Dataset.from_dict(columns),
            recipe=recipe,
            num_calibration_samples=blocks,
            max_seq_length=length,
        )
    )

    def effective(linear: nn.Module) -> Tensor:
        zero = getattr(linear, "weight_zero_point", None)
        args = linear.quantization_scheme.weights
        return fake_quantize(linear.weight, linear.weight_scale, zero, args)

    return dense(model, effective)


def modelopt(scratch: Path, tokens: Tensor, cost: Cost, *, algorithm: str) -> dict[str, Tensor]:
    """Model Optimizer's simulated int4 AWQ; its scales stay on each linear's input.

    Clipping takes 512 tokens in all, as llm-awq, instead of 64 of every block.
    """
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in (entry.get("cfg") or {}):
            entry["cfg"]["block_sizes"] = {-1: GROUP_SIZE, "type": "static"}
    config["algorithm"] = {"method": algorithm}
    if algorithm != "awq_lite":
        config["algorithm"]["max_tokens_per_batch"] = CLIP_TOKENS // len(tokens)
    model = load_model(scratch)

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            for block in tokens:
                model.model(block[None], use_cache=False)

    cost.of(lambda: mtq.quantize(model, config, calibrate))

    def effective(linear: nn.Module) -> Tensor:
        weight = linear.weight_quantizer(linear.weight)
        scale = linear.input_quantizer.pre_quant_scale
        return weight if scale is None else weight * scale.float()

    with torch.no_grad():
        return dense(model, effective)


def _autoawq(symmetric: bool) -> Callable[..., dict[str, Tensor]]:
    return lambda *args: autoawq(*args, symmetric=symmetric)


def _autoround(symmetric: bool, light: bool) -> Callable[..., dict[str, Tensor]]:
    return lambda *args: autoround(*args, symmetric=symmetric, light=light)


def _stacked(awq: bool, gptq: bool, symmetric: bool) -> Callable[..., dict[str, Tensor]]:
    return lambda *args: llmcompressor(*args, awq=awq, gptq=gptq, symmetric=symmetric)


def _simulated(algorithm: str) -> Callable[..., dict[str, Tensor]]:
    return lambda *args: modelopt(*args, algorithm=algorithm)


# Candidate → (package, symmetric, what makes its weights).
CANDIDATES: dict[str, tuple[str, bool, Callable[..., dict[str, Tensor]]]] = {
    "autoawq-asym": ("autoawq", False, _autoawq(False)),
    "autoawq-sym": ("autoawq", True, _autoawq(True)),
    "autoround-asym": ("auto-round", False, _autoround(False, light=False)),
    "autoround-sym": ("auto-round", True, _autoround(True, light=False)),
    "autoround-light-asym": ("auto-round", False, _autoround(False, light=True)),
    "autoround-light-sym": ("auto-round", True, _autoround(True, light=True)),
    "llmcompressor-awq-asym": ("llmcompressor", False, _stacked(True, False, False)),
    "llmcompressor-gptq-asym": ("llmcompressor", False, _stacked(False, True, False)),
    "llmcompressor-awq-gptq-asym": ("llmcompressor", False, _stacked(True, True, False)),
    "llmcompressor-awq-sym": ("llmcompressor", True, _stacked(True, False, True)),
    "llmcompressor-gptq-sym": ("llmcompressor", True, _stacked(False, True, True)),
    "llmcompressor-awq-gptq-sym": ("llmcompressor", True, _stacked(True, True, True)),
    "modelopt-awq-lite-sym": ("nvidia-modelopt", True, _simulated("awq_lite")),
    "modelopt-awq-clip-sym": ("nvidia-modelopt", True, _simulated("awq_clip")),
    "modelopt-awq-full-sym": ("nvidia-modelopt", True, _simulated("awq_full")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("candidate", choices=CANDIDATES)
    parser.add_argument("output", type=Path, help="a .safetensors file")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    package, symmetric, quantize = CANDIDATES[args.candidate]
    tokens, cost = load_file(args.scratch / "tokens.safetensors")["calibration"], Cost()
    weights = quantize(args.scratch, tokens, cost)
    facts = {
        "candidate": args.candidate,
        "version": f"{package} {version(package)}",
        "symmetric": symmetric,
        "group_size": GROUP_SIZE,
        "calibration_tokens": tokens.numel(),
        "cpu_seconds": round(cost.cpu_seconds, 1),
        "peak_rss_bytes": cost.peak_rss_bytes,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    save_file(weights, args.output, metadata={"facts": json.dumps(facts)})
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
