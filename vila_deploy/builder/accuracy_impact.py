"""Measure how far modules in fewer bits move the logits: graphs with and without them, compared.

The very graphs that are compiled or run are built once with fp16 modules and once as asked, and
run on the CPU by onnxruntime over held-out texts and images.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from vila_deploy.backends.onnxruntime import files as cpu_files
from vila_deploy.backends.onnxruntime import vision as cpu_vision
from vila_deploy.backends.onnxruntime.cache_scales import calibrate_cache
from vila_deploy.backends.onnxruntime.inference import load_graph, run_each, vision_options
from vila_deploy.backends.tensorrt import files, graphs
from vila_deploy.builder.calibration_prompts import builtin_prompts
from vila_deploy.builder.resolve import ResolvedBuild
from vila_deploy.builder.smoothed_tower import smoothed_tower
from vila_deploy.builder.tower_errors import layer_errors, write_hidden_states
from vila_deploy.checkpoint import Checkpoint
from vila_deploy.checkpoint.llm_config import EMBEDDING, HEAD
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.data.embed import TokenSequence, length_limit
from vila_deploy.data.examples import load_held_out
from vila_deploy.engine.precision import ModulePrecision
from vila_deploy.eval.data import EvaluationData
from vila_deploy.eval.metrics import TokenMetrics, compare_logits, top1_agreement
from vila_deploy.formats.module_dtypes import FP16, INT8
from vila_deploy.onnx_export.dialects.onnxruntime import INT8_TERMS, OnnxRuntimeDialect
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
LAYER_IMAGES = 3
# Rows of logits in memory at a time.
LOGIT_ROWS = 64
# Otherwise onnxruntime would round activations to int8 where TensorRT does not.
EXACT_ACTIVATIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
AS_ASKED, PLAIN = "asked", "plain"
# Of hidden states behind the tower's layers.
STATES = "states"
CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


@dataclass(frozen=True)
class AccuracyImpact:
    """How far next-token distributions move from those of the same engine with fp16 modules.

    KL is KL(fp16 ‖ as asked) in nats, per token; `kl_p99` its 99th percentile. Top-1 agreement is
    the share of tokens for which both find the same one most likely. `sha256` is of the data,
    `own_data` whether it is the user's.

    Args:
        image_feature_error: of a tower in fewer bits: norm of the difference of the images'
            embeddings over their norm.
        tower_layer_errors: the same of the hidden states behind each of its layers, on a tile of
            each of the first LAYER_IMAGES images.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    sequences: int
    images: int
    own_data: bool
    sha256: str
    image_feature_error: float | None = None
    tower_layer_errors: Sequence[float] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluated_dialect(build: ResolvedBuild) -> str:
    """Return the dialect of the graphs in which the impact of `build`'s modules can be measured.

    Raises:
        VilaDeployError: all are fp16, or no graph has them as the backend does.
    """
    request = build.request
    if not request.module_precision.quantized() and request.activations != INT8:
        raise VilaDeployError(
            "there is nothing to measure: all modules are fp16",
            where="--eval",
            fix="leave --eval out; vila-quantize --eval compares a quantized LLM with its original",
        )
    return build.backend.evaluated_dialect(request)


def measure_accuracy_impact(
    checkpoint: Checkpoint,
    module_precision: ModulePrecision,
    dialect: str,
    data: Path | None,
    scratch: Path,
    activations: str | None = None,
) -> AccuracyImpact:
    """Run the checkpoint's graphs with `module_precision` and with fp16 and compare the logits.

    Both int8 terms of int8x2 together differ from float32 by less than 1e-6 nats; here float32
    stands for them in the decoder layers.

    Args:
        dialect: of the graphs, a key of DIALECTS.
        data: own held-out data as `load_held_out` takes it; None means the built-in one.
        scratch: folder in which a temporary one gets both sets of weights.
        activations: of the 4-bit linears as asked, in dialect "onnxruntime".

    Raises:
        VilaDeployError: nothing to predict, or data that can't be read.
    """
    # Only the CPU's graphs keep the cache in fewer bits.
    assert module_precision.kv_cache == FP16 or dialect == "onnxruntime"
    held_out = EvaluationData(checkpoint, load_held_out(data), data is not None, MAX_SEQUENCES)
    with (
        tempfile.TemporaryDirectory(dir=scratch, prefix=".accuracy-") as name,
        progress(_steps(checkpoint, held_out), "measuring") as advance,
    ):
        longest = max(map(len, held_out.ids))
        graphs = _GraphPair(
            checkpoint, module_precision, dialect, Path(name), longest, advance, activations
        )
        metrics = graphs.compare(held_out)
    return AccuracyImpact(
        kl_mean=float(metrics.kl.mean()),
        kl_p99=float(metrics.kl.quantile(0.99)),
        top1_agreement=top1_agreement(metrics.same_top1),
        tokens=len(metrics),
        sequences=len(held_out.sequences),
        images=held_out.images,
        own_data=held_out.own,
        sha256=held_out.sha256,
        image_feature_error=graphs.image_feature_error,
        tower_layer_errors=graphs.tower_layer_errors,
    )


def _steps(checkpoint: Checkpoint, held_out: EvaluationData) -> int:
    return checkpoint.config.llm.num_layers + 1 + len(held_out.sequences)


class _GraphPair:
    """The graphs of a checkpoint in a temporary folder, with modules as asked and in fp16.

    `compare` leaves what it has measured of a quantized tower in the attributes.
    """

    image_feature_error: float | None = None
    tower_layer_errors: tuple[float, ...] = ()

    def __init__(
        self,
        checkpoint: Checkpoint,
        module_precision: ModulePrecision,
        dialect: str,
        folder: Path,
        max_seq_len: int,
        advance: Advance,
        activations: str | None = None,
    ):
        self._checkpoint, self._folder, self._dialect = checkpoint, folder, dialect
        self._module_precision, self._advance = module_precision, advance
        self._emitter, self._max_seq_len = DIALECTS[dialect](), max_seq_len
        emitters = {PLAIN: self._emitter}
        if activations == INT8:
            emitters[AS_ASKED] = OnnxRuntimeDialect(INT8_TERMS[activations])
        with WeightFile(folder / files.WEIGHTS) as file:
            llm, config = checkpoint.llm, checkpoint.config.llm
            stored = store_llm(config, llm, max_seq_len, file, self._emitter, advance, FP16)
            heads = {PLAIN: stored.head}
            if module_precision.lm_head != FP16:
                weight = llm.tensor(HEAD)
                heads[AS_ASKED] = self._emitter.store_head(file, weight, module_precision.lm_head)
        stored_as = {}
        if module_precision.kv_cache != FP16:
            emitter = emitters.setdefault(AS_ASKED, self._emitter)
            assert isinstance(emitter, OnnxRuntimeDialect)
            prompts = [prompt[:max_seq_len] for prompt in builtin_prompts(checkpoint)]
            scales = calibrate_cache(folder, config, stored, emitter, prompts)
            stored_as[AS_ASKED] = replace(stored, cache_scales=scales)
        self._trunks = {}
        for name, emitter in emitters.items():
            trunk = build_llm_graph(
                config, stored_as.get(name, stored), emitter, tokens=None, logits=False, states=True
            )
            trunk.save(folder / f"trunk_{name}.onnx")
            self._trunks[name] = _load(folder / f"trunk_{name}.onnx")
        self._heads = {}
        for name, head in heads.items():
            emitter = emitters.get(name, self._emitter)
            build_head_graph(config, head, emitter).save(folder / f"{name}.onnx")
            self._heads[name] = _load(folder / f"{name}.onnx")

    def compare(self, data: EvaluationData) -> TokenMetrics:
        """Return the figures of every predicted token, without losses."""
        prompts = {PLAIN: [embeds.numpy() for embeds in data.embeds(self._checkpoint)]}
        if self._module_precision.vision != FP16:
            features = {}
            for name, dtype in ((PLAIN, FP16), (AS_ASKED, self._module_precision.vision)):
                features[name] = self._features(data.sequences, name, dtype)
                prompts[name] = [self._embeds(each, features[name]) for each in data.sequences]
            self._compare_towers(features)
        masks = [data.predicted(index) for index in range(len(data.sequences))]
        metrics, first = TokenMetrics.zeros(sum(int(mask.sum()) for mask in masks)), 0
        for index, mask in enumerate(masks):
            predicted = mask.numpy()
            states = {
                name: self._states(prompts.get(name, prompts[PLAIN])[index], name)[predicted]
                for name in {*prompts, *self._trunks}
            }
            for start in range(0, len(states[PLAIN]), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                expected, actual = (
                    torch.from_numpy(self._logits(states, name, rows)).double()
                    for name in (PLAIN, AS_ASKED)
                )
                compare_logits(expected, actual, out=metrics[first : first + len(expected)])
                first += len(expected)
            self._advance(f"sequence {index + 1}")
        return metrics

    def _compare_towers(self, features: Mapping[str, Mapping[str, Floats]]) -> None:
        """Keep the errors of the tower as asked; without images there are none."""
        if not features[PLAIN]:
            return
        expected, found = (
            np.concatenate([features[name][image] for image in features[PLAIN]])
            for name in (PLAIN, AS_ASKED)
        )
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        self.image_feature_error = float(error)
        folders = (self._folder / name / STATES for name in (AS_ASKED, PLAIN))
        self.tower_layer_errors = layer_errors(*folders)

    def _logits(self, states: Mapping[str, Floats], name: str, rows: slice) -> Floats:
        """Logits of some rows; a module that is not quantized is the same in both."""
        chosen = states.get(name, states[PLAIN])[rows]
        head = self._heads.get(name, self._heads[PLAIN])
        logits: Floats = head.run(["logits"], {"states": chosen})[0]
        return logits

    def _states(self, embeds: Floats, name: str) -> Floats:
        """Normed hidden states [tokens, hidden] of a sequence that begins with an empty cache."""
        llm, count = self._checkpoint.config.llm, len(embeds)
        feeds: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[None],
            "positions": np.arange(count)[None],
            "last": np.array([count - 1]),
            "seqlens_k": np.array([count - 1], np.int32),
            "total_sequence_length": np.array(count, np.int32),
        }
        trunk = self._trunks.get(name, self._trunks[PLAIN])
        inputs = trunk.get_inputs()
        for each in inputs:
            if each.name.startswith("past_"):
                kind = CACHE_TYPES[each.type]
                shape = (1, llm.num_kv_heads, self._max_seq_len, llm.head_dim)
                feeds[each.name] = np.zeros(shape, kind)
        known = {each.name for each in inputs}
        feeds = {name: value for name, value in feeds.items() if name in known}
        states: Floats = trunk.run(["states"], feeds)[0]
        return states

    def _embeds(self, sequence: TokenSequence, features: Mapping[str, Floats]) -> Floats:
        table = self._checkpoint.llm.tensor(EMBEDDING)

        def embed_tokens(ids: Sequence[int]) -> Floats:
            rows: Floats = table[torch.tensor(list(ids), dtype=torch.int64)].float().numpy()
            return rows

        image_features = [features[image.name] for image in sequence.images]
        limit = length_limit(self._checkpoint.config, len(sequence.images))
        return merge_embeddings(sequence.text_chunks, image_features, embed_tokens)[:limit]

    def _features(
        self, sequences: Sequence[TokenSequence], name: str, dtype: str
    ) -> dict[str, Floats]:
        """Features [tokens, hidden] of each image, by its name, from a tower in `dtype`."""
        config, by_name = self._checkpoint.config, {}
        paths, options = self._write_vision(self._folder / name, dtype)
        tower = load_graph(paths[0], options=options)
        projector = _load(paths[1]) if paths[1].exists() else None
        tiles: list[Floats] = []
        images = {image.name: image for sequence in sequences for image in sequence.images}
        for image in images.values():
            (pixels,) = preprocess([image.load()], config.image, config.tiling, alone=False)
            features = run_each(tower, pixels.tiles)
            tiles.append(pixels.tiles[:1])
            if projector is not None:
                blocks = s2_features(features, config.tiling, pixels.grid)
                features = merge_s2_blocks(run_each(projector, blocks), config.tiling, pixels.grid)
            by_name[image.name] = features[0]
        states = self._folder / name / STATES
        write_hidden_states(paths[0], tiles[:LAYER_IMAGES], options, states)
        return by_name

    def _write_vision(
        self, folder: Path, dtype: str
    ) -> tuple[tuple[Path, Path], Mapping[str, str]]:
        """Write the vision graph with a tower in `dtype`, and the projector if it is another.

        Returns:
            the paths of both, and onnxruntime's options for the former.
        """
        folder.mkdir()
        checkpoint, on_cpu = self._checkpoint, isinstance(self._emitter, OnnxRuntimeDialect)
        config, projector = checkpoint.config, checkpoint.projector
        tower: WeightSource = checkpoint.vision
        if on_cpu:
            cpu_vision.write_vision(folder, config, tower, projector, dtype, lambda *_: None)
            names = files.GRAPH, cpu_files.PROJECTOR_GRAPH
            encoder, rest = (folder / cpu_files.VISION / name for name in names)
        else:
            if dtype == INT8:
                tower = smoothed_tower(config, tower, projector, folder)
            graphs.write_vision(
                folder, config, tower, projector, self._dialect, lambda text="", steps=1: None,
                dtype,
            )  # fmt: skip
            encoder, rest = (
                folder / part / files.GRAPH for part in (files.VISION, files.PROJECTOR)
            )
        return (encoder, rest), vision_options() if on_cpu else EXACT_ACTIVATIONS


def _load(path: Path) -> onnxruntime.InferenceSession:
    return load_graph(path, options=EXACT_ACTIVATIONS)
