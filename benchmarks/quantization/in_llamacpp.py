"""GGUF files in llama.cpp beside our own arithmetic: SmolLM2-135M-Instruct on tokens of two texts.

$ python benchmarks/quantization/smollm2.py prepare SCRATCH
$ vila-quantize SMOLLM2 -o ours --group-size 64 --format gguf-q8_0     # candidates
$ vila-convert SMOLLM2 --to gguf -o f16
$ llama-quantize f16/llm/*.gguf q4_0.gguf Q4_0
$ python benchmarks/quantization/in_llamacpp.py SCRATCH ours q4_0.gguf --results FILE

SMOLLM2 comes from `python -m tests.support.smollm2`. A candidate is a GGUF file, or a folder of
vila-quantize's. For a folder the same weights also go through float32 arithmetic and the graph of
our CPU engine with two int8 terms, and llama.cpp reads the same values from a file in F32, whose
products are float32: what remains of a difference is how llama.cpp rounds activations. Prints a
JSON line for each text and candidate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from cpu_choices import final_states
from gguf import GGUFReader
from safetensors.torch import load_file
from smollm2 import (
    BLOCK,
    TEXTS,
    Loss,
    compare,
    final_hidden,
    load_model,
    loss_of,
    python_version,
    read_weights,
    replace_weights,
)
from torch import Tensor

from vila_deploy.backends.llamacpp.decoder import DecoderOptions, LlamaDecoder, LlamaModel
from vila_deploy.backends.llamacpp.memory import OUTPUT_ROWS
from vila_deploy.backends.onnxruntime import files as onnx_files
from vila_deploy.bench.measure import commit, device_name
from vila_deploy.checkpoint import open_checkpoint
from vila_deploy.checkpoint.gguf_layout import ENDS, hyperparameters, tensor_specs
from vila_deploy.checkpoint.gguf_reader import gguf_files
from vila_deploy.checkpoint.llm_config import EMBEDDING
from vila_deploy.eval.metrics import TokenMetrics, compare_logits
from vila_deploy.formats.registry import FORMATS
from vila_deploy.onnx_export.dialects.onnxruntime import INT8_TERMS, OnnxRuntimeDialect
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import store_llm
from vila_deploy.writers.gguf_files import GgufFiles, add_tensor

ENGINE_ACTIVATIONS = "int8x2"
# The same values in other types: what their arithmetic costs.
OTHER_TYPES = ("F32", "Q5_0")
# What gives logits: final states [blocks · 512, hidden], and the head that multiplies them.
States = tuple[Tensor, Tensor]


class InLlamaCpp:
    """Logits of a GGUF file through the decoder of backend llamacpp."""

    def __init__(self, file: Path, threads: int):
        options = DecoderOptions(1, BLOCK, int8_cache=False, threads=threads)
        self._model = LlamaModel(file, options)
        self._decoder = LlamaDecoder(self._model, options, flash_attention=False)

    def logits(self, block: Tensor) -> Iterator[Tensor]:
        """Yield logits [OUTPUT_ROWS, vocab] of the tokens of `block`, with an empty cache."""
        self._decoder.keep(0, 0)
        for part in block.split(OUTPUT_ROWS):
            yield torch.from_numpy(self._decoder.decode([0] * len(part), part.tolist()))

    def close(self) -> None:
        self._decoder.close()
        self._model.close()


def losses(file: Path, threads: int, expected: Sequence[States], tokens: Tensor) -> list[Loss]:
    """Return what llama.cpp's answers are beside each of `expected`."""
    metrics = [TokenMetrics.zeros(tokens.numel()) for _ in expected]
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -1)], 1).flatten()
    opened, begin = InLlamaCpp(file, threads), 0
    for block in tokens:
        for logits in opened.logits(block):
            rows = slice(begin, begin + len(logits))
            targets = following[rows].clamp(min=0)
            for (states, head), found in zip(expected, metrics, strict=True):
                compare_logits(states[rows] @ head.T, logits.clone(), targets, found[rows])
            begin += len(logits)
    opened.close()
    return [loss_of(found, following, len(tokens)) for found in metrics]


class Ours:
    """The weights of a checkpoint of vila-quantize, in arithmetic of our own."""

    def __init__(self, scratch: Path, folder: Path):
        self.checkpoint = open_checkpoint(folder)
        self.weights = read_weights(folder)
        self._model = load_model(scratch)
        replace_weights(self._model, self.weights)
        self.head = self._model.lm_head.weight.detach()

    def in_float32(self, tokens: Tensor) -> States:
        """Return the states that float32 arithmetic with dense weights gives."""
        return final_hidden(self._model, tokens), self.head

    def in_cpu_engine(self, tokens: Tensor) -> States:
        """Return the states that the graph of a CPU engine with two int8 terms gives."""
        dialect = OnnxRuntimeDialect(INT8_TERMS[ENGINE_ACTIVATIONS])
        llm = self.checkpoint.llm
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with WeightFile(folder / onnx_files.WEIGHTS) as file:
                stored = store_llm(
                    self.checkpoint.config.llm, llm, BLOCK, file, dialect, lambda *_: None
                )
            parts = final_states(self.checkpoint, stored, folder, ENGINE_ACTIVATIONS, tokens)
            return torch.cat([*parts]), self.head

    def write(self, folder: Path, linear_type: str) -> Path:
        """Write a GGUF file of the same values with linears in `linear_type`, tables in F32."""
        config = self.checkpoint.config.llm
        metadata = hyperparameters(config) | {"tokenizer.ggml.model": "no_vocab"}
        metadata |= {f"{config.family.name}.context_length": BLOCK, "general.file_type": 0}
        specs = list(tensor_specs(config, ("F32",), (linear_type,)))
        with GgufFiles(folder, linear_type, metadata, specs) as file:
            for spec in specs:
                name = spec.source
                prefix = name.removesuffix(".weight")
                if spec.types == ("F32",):
                    add_tensor(file, config, name, self.weights[name])
                else:
                    add_tensor(file, config, prefix, self.checkpoint.llm.linear(prefix))
            file.finish()
        return folder / file.names[0]


def stored(file: Path) -> dict[str, Any]:
    """Return how a file stores its weights: types and bits a weight."""
    matrices = [tensor for tensor in GGUFReader(file).tensors if len(tensor.shape) == 2]
    linears = [tensor for tensor in matrices if tensor.name.startswith("blk.")]
    (table,) = (tensor for tensor in matrices if tensor.name == ENDS[EMBEDDING])
    bits = 8 * sum(int(t.n_bytes) for t in linears) / sum(int(t.n_elements) for t in linears)
    return {
        "linear_types": dict(Counter(t.tensor_type.name for t in linears).most_common()),
        "linear_bits": round(bits, 3),
        "table_type": table.tensor_type.name,
        "file_bytes": file.stat().st_size,
    }


def name_of(candidate: Path) -> str:
    """Return what rows call a candidate: its file's name, or its folder's without the format."""
    if candidate.is_file():
        return candidate.stem
    return (candidate.parent if candidate.name in FORMATS else candidate).name


def rows(args: argparse.Namespace, candidate: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for each text."""
    ours = Ours(args.scratch, candidate) if candidate.is_dir() else None
    file = gguf_files(candidate / "llm")[0] if candidate.is_dir() else candidate
    tokens, teacher = (load_file(args.scratch / f"{n}.safetensors") for n in ("tokens", "teacher"))
    teacher_head = load_model(args.scratch).lm_head.weight.detach()
    for text in TEXTS:
        blocks = tokens[text][: args.blocks]
        exact = teacher[text][: blocks.numel()], teacher_head
        row = {
            "candidate": name_of(candidate),
            "text": text,
            "tokens": blocks.numel(),
        } | stored(file)
        if ours is None:
            (loss,) = losses(file, args.threads, [exact], blocks)
            yield row | asdict(loss)
            continue
        own, engine = ours.in_float32(blocks), ours.in_cpu_engine(blocks)
        loss, from_own, from_engine = losses(file, args.threads, [exact, own, engine], blocks)
        row |= asdict(loss) | {"from_float32": asdict(from_own)}
        row |= {"from_cpu_engine": asdict(from_engine)}
        row["float32"] = asdict(compare(*own, *exact, blocks))
        row["cpu_engine"] = asdict(compare(*engine, *own, blocks))
        with tempfile.TemporaryDirectory() as name:
            for kind in OTHER_TYPES if args.other_types else ():
                written = ours.write(Path(name), kind)
                row[f"{kind}_from_float32"] = asdict(
                    losses(written, args.threads, [own], blocks)[0]
                )
        yield row


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    for candidate in args.candidates:
        for row in rows(args, candidate):
            line = json.dumps(
                {"what": "GGUF in llama.cpp", "model": "SmolLM2-135M"}
                | row
                | {
                    "versions": {name: version(name) for name in ("llama-cpp-python", "torch")},
                    "threads": args.threads,
                    "label": "measured",
                    "device": device_name(),
                    "python": python_version(),
                    "commit": commit(),
                }
            )
            print(line, flush=True)
            if args.results is not None:
                with args.results.open("a", encoding="utf-8") as results:
                    results.write(line + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("candidates", type=Path, nargs="+", help="GGUF files or folders")
    parser.add_argument("--blocks", type=int, default=16, help="of 512 tokens, of each text")
    parser.add_argument(
        "--other-types", action="store_true", help="a folder's values in F32 and Q5_0 too"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, help="append the rows to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
