"""What activations, cache and output head of a CPU engine add to what 4 bits cost a real small LLM.

$ python benchmarks/quantization/smollm2.py prepare SCRATCH
$ python benchmarks/quantization/cpu_choices.py SCRATCH CANDIDATE --results FILE

CANDIDATE is SmolLM2-135M in the VILA layout, quantized to 4 bits. The engine's own decoder graphs
run on blocks of 512 tokens of the two texts, each block into an empty cache; the product with the
head is computed here, of the head's rounded weights and of states rounded as the kernel does it. A
JSON line for each text and choice has the KL divergence from the unquantized model, and the share
that the choice adds to that of float32 activations and a float16 head.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from smollm2 import TEXTS, compare, load_model, python_version
from torch import Tensor

from vila_deploy.backends.onnxruntime import files
from vila_deploy.backends.onnxruntime.cache_scales import calibrate_cache
from vila_deploy.backends.onnxruntime.inference import load_graph
from vila_deploy.bench.measure import commit, device_name
from vila_deploy.builder.calibration_prompts import builtin_prompts
from vila_deploy.checkpoint import Checkpoint, open_checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.formats.int8_linear import round_int8
from vila_deploy.formats.module_dtypes import head_group_size
from vila_deploy.onnx_export.dialects.onnxruntime import INT8_TERMS, OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import StoredLlm, build_llm_graph, store_llm

BLOCK = 512
# Activations of the decoder layers; cache; dtype of the head and int8 terms of its activations, 0:
# float.
BASE = ("fp32", "fp16", "fp16", 0)
CHOICES = (
    ("int8", "fp16", "fp16", 0),
    ("fp32", "fp16", "int8", 2),
    ("int8", "fp16", "int8", 1),
    ("int8", "fp16", "int8", 2),
    ("fp32", "int8", "fp16", 0),
    ("int8", "int8", "int8", 2),
)


def final_states(
    checkpoint: Checkpoint,
    stored: StoredLlm,
    folder: Path,
    activations: str,
    tokens: Tensor,
) -> Iterator[Tensor]:
    """Yield what the head multiplies, [512, hidden], for each block of `tokens`."""
    config = checkpoint.config.llm
    graph = build_llm_graph(
        config, stored, OnnxRuntimeDialect(INT8_TERMS[activations]),
        tokens=None, logits=False, states=True,
    )  # fmt: skip
    graph.save(folder / "graph.onnx")
    session = load_graph(folder / "graph.onnx", threads=torch.get_num_threads())
    table = checkpoint.llm.tensor(EMBEDDING)
    shape = (1, config.num_kv_heads, BLOCK, config.head_dim)
    cache = np.zeros(shape, np.int8 if stored.cache_scales else np.float32)
    feeds: dict[str, NDArray[Any]] = {
        "seqlens_k": np.array([BLOCK - 1], np.int32),
        "total_sequence_length": np.array(BLOCK, np.int32),
    }
    feeds |= {i.name: cache for i in session.get_inputs() if i.name.startswith("past_")}
    for block in tokens:
        embeds = table[block].float().numpy()[None]
        yield torch.from_numpy(session.run(["states"], feeds | {"inputs_embeds": embeds})[0])


def int8_terms(states: Tensor, terms: int) -> Tensor:
    """Return `states` as the sum of `terms` int8 terms, a scale for each row and group."""
    groups = states.unflatten(1, (-1, head_group_size(states.shape[1])))
    rest, total = groups, torch.zeros_like(groups)
    for _ in range(terms):
        scale = (rest.abs().amax(-1, keepdim=True) / 127).clamp_(min=1e-30)
        term = (rest / scale).round_() * scale
        rest, total = rest - term, total + term
    return total.flatten(1)


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    checkpoint = open_checkpoint(args.candidate)
    teacher_head = load_model(args.scratch).lm_head.weight.detach()
    tokens, teacher = (load_file(args.scratch / f"{n}.safetensors") for n in ("tokens", "teacher"))
    weight = checkpoint.llm.tensor(HEAD)
    int8 = round_int8(weight.reshape(-1, head_group_size(weight.shape[1])), HEAD)
    heads = {"fp16": weight.float(), "int8": int8.dequantize().reshape(weight.shape)}
    config, dialect = checkpoint.config.llm, OnnxRuntimeDialect(INT8_TERMS["int8"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with WeightFile(folder / files.WEIGHTS) as file:
            stored = store_llm(config, checkpoint.llm, BLOCK, file, dialect, lambda *_: None)
        prompts = builtin_prompts(checkpoint)
        scales = calibrate_cache(folder, config, stored, dialect, prompts)
        of_cache = replace(stored, cache_scales=scales)
        for text in TEXTS:
            blocks = tokens[text][: args.blocks]
            states = {
                (activations, cache): torch.cat(
                    [*final_states(checkpoint, kept, folder, activations, blocks)]
                )
                for activations in ("fp32", "int8")
                for cache, kept in (("fp16", stored), ("int8", of_cache))
            }
            plain = states["fp32", "fp16"], heads["fp16"]
            exact = teacher[text][: len(blocks) * BLOCK], teacher_head
            base = compare(*plain, *exact, blocks)
            for choice in (BASE, *CHOICES[-args.last :]):
                activations, cache, dtype, terms = choice
                given = states[activations, cache]
                asked = (int8_terms(given, terms) if terms else given), heads[dtype]
                loss = base if choice == BASE else compare(*asked, *exact, blocks)
                row = {
                    "what": "activations, cache and head of a CPU engine",
                    "model": args.name,
                    "text": text,
                    "tokens": blocks.numel(),
                    "activations": activations,
                    "kv_cache": cache,
                    "lm_head": dtype,
                    "lm_head_terms": terms,
                    **asdict(loss),
                    "kl_added_share": loss.kl_mean / base.kl_mean - 1,
                    "label": "measured",
                    "device": device_name(),
                    "python": python_version(),
                    "commit": commit(),
                }
                print(json.dumps(row), flush=True)
                if args.results is not None:
                    with args.results.open("a", encoding="utf-8") as results:
                        results.write(json.dumps(row) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("candidate", type=Path)
    parser.add_argument("--name", default="SmolLM2-135M int4")
    parser.add_argument("--blocks", type=int, default=32, help="of 512 tokens, of each text")
    parser.add_argument(
        "--last", type=int, default=len(CHOICES), help="of the choices, only the last so many"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
