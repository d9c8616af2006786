"""The vision encoder as TensorRT-LLM's multimodal runner wants it: vision/ with its config."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.checkpoint.weight_source import WeightSource
from vila_deploy.onnx_export.graph_writer import WeightFile
from vila_deploy.onnx_export.vision import VisionGraphOptions, build_vision_graph
from vila_deploy.utils.files import canonical_json
from vila_deploy.utils.progress import Advance, progress

# Opset 21 is the newest that the TensorRT 10.3 of 0.12 reads.
GRAPH_OPTIONS = VisionGraphOptions(opset=21, half=True)
INPUT = "input"
MAX_IMAGES = 4  # pictures that go through at a time


def write_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    release: Release,
    advance: Advance,
) -> None:
    """Graph, weights and config.json; input [images, 3, size, size], output [images, tokens, h].

    Both are float16, as the runner hands them over.
    """
    (folder / files.VISION).mkdir()
    path = folder / files.VISION / files.GRAPH
    with WeightFile(folder / files.VISION / files.WEIGHTS) as file:
        build_vision_graph(config, tower, projector, file, advance, GRAPH_OPTIONS).save(path)
    model = onnx.load(path, load_external_data=False)
    _half_ends(model.graph, release.vision_output)
    path.write_bytes(model.SerializeToString(deterministic=True))
    values = {
        "builder_config": {
            "name": "multiModal",
            "model_type": "vila",
            "precision": "float16",
            "max_batch_size": MAX_IMAGES,
            "output_shape": [-1, config.tokens_per_block, config.llm.hidden_size],
        }
    }
    (folder / files.VISION / files.CONFIG).write_text(canonical_json(values), "utf-8")


def _half_ends(graph: onnx.GraphProto, output: str) -> None:
    """Renames input and output and gives them float16; what lies between stays as it is."""
    (pixels,), (features,) = graph.input, graph.output
    first = helper.make_node("Cast", [INPUT], [pixels.name], name=INPUT, to=TensorProto.FLOAT)
    last = helper.make_node("Cast", [features.name], [output], name=output, to=TensorProto.FLOAT16)
    graph.node.insert(0, first)
    graph.node.append(last)
    for value, name in ((pixels, INPUT), (features, output)):
        value.name, value.type.tensor_type.elem_type = name, TensorProto.FLOAT16


def compile_vision(folder: Path, engine: str, image_size: int) -> str:
    """Compiles vision/ for this computer's GPU; the version of TensorRT that did.

    Raises:
        VilaDeployError: no TensorRT here, or it refuses the graph.
    """
    from vila_deploy.backends.tensorrt.compile import Job, Profile, compile_graph
    from vila_deploy.backends.tensorrt.compilers import COMPILERS

    compiler, vision = COMPILERS["tensorrt"], folder / files.VISION
    sizes = [(count, 3, image_size, image_size) for count in (1, 1, MAX_IMAGES)]
    partial = vision / f"{engine}.partial"
    partial.unlink(missing_ok=True)
    profile: Profile = {INPUT: (sizes[0], sizes[1], sizes[2])}
    with progress(1, "compiling the vision encoder") as advance:
        compile_graph(compiler, Job(vision / files.GRAPH, partial, [profile], None), advance)
        partial.replace(vision / engine)
        advance("done")
    return str(compiler.load().__version__)
