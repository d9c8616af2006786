"""Our own algorithms on the model and the tokens of smollm2.py, as baselines.py runs the others.

$ python benchmarks/quantization/smollm2.py prepare SCRATCH
$ python benchmarks/quantization/ours.py SCRATCH awq-gptq ours.safetensors [--symmetric]
$ python benchmarks/quantization/smollm2.py evaluate SCRATCH ours.safetensors

`--bits-per-weight 4.5 --widths 4 5 8` gives the linears bits as `vila-quantize` does, with the
sensitivities that it would measure on these tokens.

The tokens go into the layers as they are, without the BOS and the blocks that `vila-quantize` makes
of texts. The output holds the effective weights; its metadata version, CPU seconds and memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vila_deploy.checkpoint.llm_config import (
    EMBEDDING,
    LINEARS,
    NORMS,
    LlmConfig,
    layer_prefix,
    load_llm_config,
)
from vila_deploy.formats.base import QuantScheme
from vila_deploy.model.layerwise import PackedHiddenStates
from vila_deploy.model.llm import dense_weight, load_decoder_layer
from vila_deploy.quantize.algorithms import awq, awq_gptq
from vila_deploy.quantize.bit_choice import BitChoice, choose_bits
from vila_deploy.quantize.calibrate import Calibration
from vila_deploy.quantize.sensitivity import measure_sensitivities
from vila_deploy.utils.device import CPU
from vila_deploy.utils.fields import Fields
from vila_deploy.utils.limits import CHUNK_TOKENS

GROUP_SIZE = 64


class Weights:
    """SCRATCH/model as a source of weights."""

    def __init__(self, scratch: Path):
        self.tensors = load_file(scratch / "model" / "model.safetensors")

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def linear(self, prefix: str) -> Tensor:
        return self.tensors[f"{prefix}.weight"]


def quantize(
    algorithm: str, config: LlmConfig, weights: Weights, embeds: list[Tensor], scheme: QuantScheme
) -> dict[str, Tensor]:
    """Effective weights by name."""
    if algorithm == "awq":
        states = PackedHiddenStates.on_device(config, embeds)
    else:
        scratch = Path(tempfile.gettempdir())
        states = PackedHiddenStates.on_host(config, embeds, scratch, CPU, CHUNK_TOKENS)
        quantized = states.copy()
    effective = dict(weights.tensors)
    for index in range(config.num_layers):
        where = layer_prefix(index)
        layer = load_decoder_layer(config, weights, index)
        for parameter in layer.parameters():
            parameter.data = parameter.data.clone()
        if algorithm == "awq":
            result = awq.quantize_layer(
                layer,
                lambda name, where=where: dense_weight(weights, f"{where}.{name}", torch.float32),
                states,
                scheme,
                where,
            )
        else:
            result = awq_gptq.quantize_layer(layer, states, quantized, scheme, where)
        for name in NORMS:
            effective[f"{where}.{name}.weight"] = result.norms[name].half().float()
        for name in LINEARS:
            effective[f"{where}.{name}.weight"] = result.linears[name].dequantize()
        print(f"layer {index}: {time.process_time():.0f} CPU seconds", flush=True)
    return {name: tensor.clone().contiguous() for name, tensor in effective.items()}


def search_bits(
    algorithm: str,
    config: LlmConfig,
    weights: Weights,
    embeds: list[Tensor],
    scheme: QuantScheme,
    widths: list[int],
    mean_bits: float,
) -> BitChoice:
    """Bits of each linear of the layers; embedding and head stay as they are."""
    checkpoint: Any = SimpleNamespace(config=SimpleNamespace(llm=config), llm=weights)
    tokens = sum(map(len, embeds))
    data = Calibration(
        embeds=embeds,
        is_image=torch.zeros(tokens, dtype=torch.bool),
        text_sequences=len(embeds),
        image_sequences=0,
        images=0,
        tokens=tokens,
        image_tokens=0,
        sha256="",
    )
    sensitivities = measure_sensitivities(
        checkpoint,
        data,
        scheme,
        widths,
        algorithm=algorithm,
        seed=0,
        device=CPU,
        scratch=Path(tempfile.gettempdir()),
    )
    sizes = {name: weights.linear(name).numel() for name in sensitivities}
    return choose_bits(sensitivities, sizes, mean_bits)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("algorithm", choices=["awq-gptq", "awq"])
    parser.add_argument("output", type=Path, help="a .safetensors file")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--bits-per-weight", type=float)
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 8])
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    fields = Fields.from_file(args.scratch / "model" / "config.json")
    config = load_llm_config(fields, Fields({}, fields.source))
    weights, scheme = Weights(args.scratch), QuantScheme(GROUP_SIZE, args.symmetric)
    tokens = load_file(args.scratch / "tokens.safetensors")["calibration"]
    start = time.process_time()
    embeds = list(weights.tensors[EMBEDDING][tokens])
    mixed: dict[str, Any] = {}
    if args.bits_per_weight is not None:
        choice = search_bits(
            args.algorithm, config, weights, embeds, scheme, args.widths, args.bits_per_weight
        )
        scheme, found = choice.scheme(scheme), choice.to_json()
        mixed = {
            "widths": args.widths,
            "search_cpu_seconds": round(time.process_time() - start, 1),
            **{key: value for key, value in found.items() if key != "linears"},
        }
        print(json.dumps(found), flush=True)
    effective = quantize(args.algorithm, config, weights, embeds, scheme)
    facts = {
        "candidate": f"vila-deploy-{args.algorithm}-{'sym' if args.symmetric else 'asym'}",
        "version": f"vila-deploy {version('vila-deploy')}",
        "symmetric": args.symmetric,
        "group_size": GROUP_SIZE,
        "calibration_tokens": tokens.numel(),
        "cpu_seconds": round(time.process_time() - start, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **mixed,
    }
    save_file(effective, args.output, metadata={"facts": json.dumps(facts)})
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
