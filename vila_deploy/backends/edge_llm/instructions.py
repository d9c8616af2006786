"""Write EDGE_LLM.md of an engine folder: what is left to do, with NVIDIA's own tools."""

from __future__ import annotations

from vila_deploy.backends.edge_llm import files
from vila_deploy.backends.edge_llm.exporter import EXPORTER, INSTALL, PLUGIN_VERSION
from vila_deploy.backends.tensorrt import files as vision_files
from vila_deploy.checkpoint.config import VilaConfig
from vila_deploy.engine.build_request import BuildRequest

TEMPLATE = """\
# {name} for {title} with TensorRT-Edge-LLM

| in this folder | what it is |
|---|---|
| `{checkpoint}/` | the language model, input of NVIDIA's exporter |
| `{vision}/` | the vision encoder as ONNX, for pixels [tiles, 3, {size}, {size}]{projector} |
| `tokenizer/`, `manifest.json` | of vila-deploy |

1. Export, on a PC with Python 3.10 to 3.12, in an environment of its own
   (`{install}`):

```
vila-build-engine . --target {target} --backend edge-llm -o .
```

   which is this command, and removes `{checkpoint}/` afterwards:

```
{exporter} {checkpoint} {exported} --int4-gemm-plugin-version {plugin}
```

2. On the board, with NVIDIA's TensorRT-Edge-LLM built there (EMBEDDED_TARGET=jetson-orin):

```
llm_build --onnxDir {exported}/{llm} --engineDir engine --maxBatchSize {batch} \\
    --maxInputLen {input_len} --maxKVCacheCapacity {seq_len}
llm_inference --engineDir engine --inputFile questions.json --outputFile answers.json
```

   The output head is one matrix of {head:.0f} MB, for which the compiler asks for up to
   {block:.0f} MB of memory in one piece; a board that gives less needs a larger `cma=`
   (docs/orin.md).

3. Images: `llm_inference` has no runner for VILA. `{vision}/{graph}` is compiled with

```
trtexec --onnx={vision}/{graph} --stronglyTyped --saveEngine=vision.plan
```

   and its embeddings take the place of the image's tokens in `inputs_embeds`, by code of your
   own on NVIDIA's C++ runtime. Questions without images need nothing of that.
"""


def instructions(request: BuildRequest, config: VilaConfig, head_bytes: int, block: int) -> str:
    """Return the text of EDGE_LLM.md.

    Args:
        head_bytes: of the output head in float16.
        block: bytes that compiling it asks for in one piece.
    """
    limits = request.limits
    return TEMPLATE.format(
        name="This model",
        title=request.target.title,
        target=request.target.name,
        checkpoint=files.CHECKPOINT,
        exported=files.EXPORTED,
        llm=files.LLM,
        vision=vision_files.VISION,
        graph=vision_files.GRAPH,
        projector=", followed by `projector/`" if config.tiling.uses_s2 else "",
        size=config.vision.image_size,
        exporter=EXPORTER,
        install=INSTALL,
        plugin=PLUGIN_VERSION,
        batch=limits.max_batch_size,
        input_len=limits.max_input_len,
        seq_len=limits.max_seq_len,
        head=head_bytes / 1e6,
        block=block / 1e6,
    )
