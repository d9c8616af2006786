"""What components in fewer bits change in the logits: an engine's graphs with and without them.

The very graphs that are compiled or run are built once with fp16 components and once as asked, and
run on the CPU by onnxruntime over held-out texts and pictures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from vila_deploy.backends.onnxruntime.inference import load_graph, run_each
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.backends.tensorrt.build import dialect_of
from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.data.embed import TokenSequence, length_limit
from vila_deploy.data.examples import load_held_out
from vila_deploy.engine.build_request import BuildRequest
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.eval.data import EvaluationData
from vila_deploy.formats.module_dtypes import FP16, INT8
from vila_deploy.onnx_export.dialects.registry import DIALECTS
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.llm import build_head_graph, build_llm_graph, store_llm
from vila_deploy.processing.images import preprocess
from vila_deploy.processing.multimodal_prompt import merge_embeddings
from vila_deploy.processing.s2 import merge_s2_blocks, s2_features
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError
from vila_deploy.utils.progress import Advance, progress

MAX_SEQUENCES = 16
# Rows of logits in memory at a time.
LOGIT_ROWS = 64
# Otherwise onnxruntime would round activations to int8 where TensorRT does not.
EXACT_ACTIVATIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
AS_ASKED, PLAIN = "asked", "plain"


@dataclass(frozen=True)
class Effect:
    """How far next-token distributions move from those of the same engine with fp16 components.

    KL is KL(fp16 ‖ as asked) in nats, per token; `kl_p99` its 99th percentile. Top-1 agreement is
    the share of tokens for which both find the same one most likely. `sha256` is of the data.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    sequences: int
    images: int
    own_data: bool
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure_effect(
    checkpoint: Checkpoint,
    module_precision: ModulePrecision,
    dialect: str,
    data: Path | None,
    scratch: Path,
) -> Effect:
    """Runs the checkpoint's graphs with `module_precision` and with fp16 instead.

    Args:
        dialect: of the graphs, a key of DIALECTS.
        data: own held-out data as `load_held_out` takes it; None means the shipped one.
        scratch: folder in which a temporary one gets both sets of weights.

    Raises:
        VilaDeployError: nothing to predict, or data that can't be read.
    """
    # No graph keeps the cache in fewer bits.
    assert module_precision.kv_cache == FP16
    held_out = EvaluationData(checkpoint, load_held_out(data), data is not None, MAX_SEQUENCES)
    with (
        tempfile.TemporaryDirectory(dir=scratch, prefix=".effect-") as name,
        progress(_steps(checkpoint, held_out), "measuring") as advance,
    ):
        longest = max(map(len, held_out.ids))
        measured = _Measured(checkpoint, module_precision, dialect, Path(name), longest, advance)
        compared = list(measured.compare(held_out))
    kl = np.concatenate([each[0] for each in compared])
    same = np.concatenate([each[1] for each in compared])
    return Effect(
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(same.mean()),
        tokens=len(kl),
        sequences=len(held_out.sequences),
        images=held_out.images,
        own_data=held_out.own,
        sha256=held_out.sha256,
    )


def _steps(checkpoint: Checkpoint, held_out: EvaluationData) -> int:
    return checkpoint.config.llm.num_layers + 1 + len(held_out.sequences)


class _Measured:
    """The graphs of a checkpoint in a temporary folder, with components as asked and in fp16."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        module_precision: ModulePrecision,
        dialect: str,
        folder: Path,
        max_seq_len: int,
        advance: Advance,
    ):
        self._checkpoint, self._folder, self._dialect = checkpoint, folder, dialect
        self._module_precision, self._advance = module_precision, advance
        self._emitter, self._max_seq_len = DIALECTS[dialect](), max_seq_len
        with WeightFile(folder / files.WEIGHTS) as file:
            llm, config = checkpoint.llm, checkpoint.config.llm
            stored = store_llm(config, llm, max_seq_len, file, self._emitter, advance, FP16)
            heads = {PLAIN: stored.head}
            if module_precision.lm_head != FP16:
                weight = llm.tensor(HEAD)
                heads[AS_ASKED] = self._emitter.store_head(file, weight, module_precision.lm_head)
        trunk = build_llm_graph(
            config, stored, self._emitter, tokens=None, logits=False, states=True
        )
        trunk.save(folder / "trunk.onnx")
        self._trunk = _load(folder / "trunk.onnx")
        self._heads = {}
        for name, head in heads.items():
            build_head_graph(config, head, self._emitter).save(folder / f"{name}.onnx")
            self._heads[name] = _load(folder / f"{name}.onnx")

    def compare(self, data: EvaluationData) -> Iterator[tuple[Floats, NDArray[np.bool_]]]:
        """(KL, whether the most likely token is the same) of every predicted token."""
        prompts = {PLAIN: [embeds.numpy() for embeds in data.embeds(self._checkpoint)]}
        if self._module_precision.vision != FP16:
            for name, dtype in ((PLAIN, FP16), (AS_ASKED, self._module_precision.vision)):
                features = self._features(data.sequences, name, dtype)
                prompts[name] = [self._embeds(each, features) for each in data.sequences]
        for index in range(len(data.sequences)):
            chosen = data.predicted(index).numpy()
            states = {name: self._states(each[index])[chosen] for name, each in prompts.items()}
            for start in range(0, int(chosen.sum()), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                yield _divergence(*(self._logits(states, n, rows) for n in (PLAIN, AS_ASKED)))
            self._advance(f"sequence {index + 1}")

    def _logits(self, states: Mapping[str, Floats], name: str, rows: slice) -> Floats:
        """What is not quantized is the same in both."""
        chosen = states.get(name, states[PLAIN])[rows]
        head = self._heads.get(name, self._heads[PLAIN])
        size = 1 if self._emitter.batch == 1 else len(chosen)
        parts = [
            head.run(["logits"], {"states": chosen[start : start + size]})[0]
            for start in range(0, len(chosen), size)
        ]
        return np.concatenate(parts)

    def _states(self, embeds: Floats) -> Floats:
        """Normed hidden states [tokens, hidden] of a sequence that begins with an empty cache."""
        llm, count = self._checkpoint.config.llm, len(embeds)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],
            "positions": np.arange(count)[None],
            "last": np.array([count - 1]),
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array(count, np.int32),
        }
        inputs = self._trunk.get_inputs()
        kind = np.float32 if self._emitter.batch == 1 else np.float16
        cache = np.zeros((1, llm.num_kv_heads, self._max_seq_len, llm.head_dim), kind)
        feeds |= {each.name: cache for each in inputs if each.name.startswith("past_")}
        known = {each.name for each in inputs}
        feeds = {name: value for name, value in feeds.items() if name in known}
        states: Floats = self._trunk.run(["states"], feeds)[0]
        return states

    def _embeds(self, sequence: TokenSequence, features: Mapping[str, Floats]) -> Floats:
        table = self._checkpoint.llm.tensor(EMBEDDING)

        def embed_tokens(ids: Sequence[int]) -> Floats:
            rows: Floats = table[torch.tensor(list(ids), dtype=torch.int64)].float().numpy()
            return rows

        own = [features[picture.name] for picture in sequence.images]
        limit = length_limit(self._checkpoint.config, len(sequence.images))
        return merge_embeddings(sequence.text_chunks, own, embed_tokens)[:limit]

    def _features(
        self, sequences: Sequence[TokenSequence], name: str, dtype: str
    ) -> dict[str, Floats]:
        """Of each picture, by the tower as it is kept, [tokens, hidden]."""
        checkpoint, folder = self._checkpoint, self._folder / name
        folder.mkdir()
        parts = checkpoint.vision, checkpoint.projector
        graphs.write_vision(
            folder, checkpoint.config, *parts, self._dialect, lambda text="", steps=1: None, dtype
        )
        tower, projector = (
            _load(folder / part / files.GRAPH) if (folder / part).exists() else None
            for part in (files.VISION, files.PROJECTOR)
        )
        config, found = checkpoint.config, {}
        for picture in {p.name: p for sequence in sequences for p in sequence.images}.values():
            (pixels,) = preprocess([picture.load()], config.image, config.tiling, alone=False)
            features = run_each(tower, pixels.tiles)
            if projector is not None:
                blocks = s2_features(features, config.tiling, pixels.grid)
                features = merge_s2_blocks(run_each(projector, blocks), config.tiling, pixels.grid)
            found[picture.name] = features[0]
        return found


def _divergence(expected: Floats, found: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (expected, found))
    return (np.exp(p) * (p - q)).sum(-1), expected.argmax(-1) == found.argmax(-1)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _load(path: Path) -> onnxruntime.InferenceSession:
    return load_graph(path, options=EXACT_ACTIVATIONS)


def dialect_to_measure(request: BuildRequest, backend: str) -> str:
    """The dialect of the graphs in which the components of `request` can be measured.

    Backend native has no graphs of its own; TensorRT's hold the same rounded towers and int4 heads.

    Raises:
        VilaDeployError: all are fp16, or no graph holds what the backend does.
    """
    if not request.module_precision.quantized():
        raise VilaDeployError(
            "there is nothing to measure: all components are fp16",
            where="--eval",
            fix="leave --eval out; vila-quantize --eval compares a quantized LLM with its original",
        )
    if backend == "onnxruntime":
        return backend
    if backend == "tensorrt":
        return dialect_of(request)
    alone = _only_native(request.module_precision)
    if backend == "native" and not alone:
        return "standard"
    raise VilaDeployError(
        f"backend {backend} has no graphs that this computer could run"
        f"{f', and no other has its {alone}' if backend == 'native' else ''}",
        where="--eval",
        fix="leave --eval out, or measure with --backend tensorrt or onnxruntime",
    )


def _only_native(module_precision: ModulePrecision) -> str:
    """What no graph has as backend native has it; its int8 heads have a scale for each group."""
    found = [f"--kv-cache {module_precision.kv_cache}"] * (module_precision.kv_cache != FP16)
    found += [f"--lm-head {INT8}"] * (module_precision.lm_head == INT8)
    return " and ".join(found)
