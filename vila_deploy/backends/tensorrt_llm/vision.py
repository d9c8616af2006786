"""Write and compile the vision encoder as TensorRT-LLM's multimodal runner expects it."""

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

# TensorRT 10.3, that of TensorRT-LLM 0.12, reads opsets up to 21.
GRAPH_OPTIONS = VisionGraphOptions(opset=21, half=True)


def write_vision(
    folder: Path,
    config: VilaConfig,
    tower: WeightSource,
    projector: WeightSource,
    release: Release,
    advance: Advance,
) -> None:
    """Write vision/: graph, weights and config.json.

    Input [images, 3, size, size], output [images, tokens, hidden], both float16 as in the runner.
    """
    (folder / files.VISION).mkdir()
    path = folder / files.VISION / files.GRAPH
    with WeightFile(folder / files.VISION / files.WEIGHTS) as file:
        build_vision_graph(config, tower, projector, file, advance, GRAPH_OPTIONS).save(path)
    model = onnx.load(path, load_external_data=False)
    _use_float16_io(model.graph, release.vision_output)
    path.write_bytes(model.SerializeToString(deterministic=True))
    values = {
        "builder_config": {
            "name": "multiModal",
            "model_type": "vila",
            "precision": "float16",
            "max_batch_size": files.MAX_IMAGES,
            "output_shape": [-1, config.tokens_per_block, config.llm.hidden_size],
        }
    }
    (folder / files.VISION / files.CONFIG).write_text(canonical_json(values), "utf-8")


def _use_float16_io(graph: onnx.GraphProto, output: str) -> None:
    """Rename input and output and make them float16; the nodes between keep their types."""
    (pixels,), (features,) = graph.input, graph.output
    first = helper.make_node(
        "Cast", [files.VISION_INPUT], [pixels.name], name=files.VISION_INPUT, to=TensorProto.FLOAT
    )
    last = helper.make_node("Cast", [features.name], [output], name=output, to=TensorProto.FLOAT16)
    graph.node.insert(0, first)
    graph.node.append(last)
    for value, name in ((pixels, files.VISION_INPUT), (features, output)):
        value.name, value.type.tensor_type.elem_type = name, TensorProto.FLOAT16


def compile_vision(folder: Path, engine: str, image_size: int) -> str:
    """Compile vision/ for this computer's GPU and return the version of TensorRT.

    Raises:
        VilaDeployError: TensorRT is not installed, or refuses the graph.
    """
    from vila_deploy.backends.tensorrt.compile import Job, Profile, compile_graph
    from vila_deploy.backends.tensorrt.compilers import COMPILERS

    compiler, vision = COMPILERS["tensorrt"], folder / files.VISION
    sizes = [(count, 3, image_size, image_size) for count in (1, 1, files.MAX_IMAGES)]
    partial = vision / f"{engine}.partial"
    partial.unlink(missing_ok=True)
    profile: Profile = {files.VISION_INPUT: (sizes[0], sizes[1], sizes[2])}
    with progress(1, "compiling the vision encoder") as advance:
        compile_graph(compiler, Job(vision / files.GRAPH, partial, [profile], None), advance)
        partial.replace(vision / engine)
        advance("done")
    return str(compiler.load().__version__)
