"""Write BUILD.md of an unfinished engine folder: the steps left, with their commands."""

from __future__ import annotations

from pathlib import Path

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import Release, build_command, shell_line
from vila_deploy.engine.build_request import BuildRequest

TEMPLATE = """\
# Finishing this engine on {title}

Here are the vision encoder (`{vision}/{graph}`) and the language model as a TensorRT-LLM checkpoint
(`{checkpoint}/`, {precision}, {ranks}). Their engines are compiled on the device.

1. Install TensorRT-LLM {release}:

```
{install}
```

2. Copy this folder to the device, go into it and finish it:

```
vila-build-engine . --target {target} --backend tensorrt-llm -o .
```

A step that is done is not repeated. The same by hand:

```
trtexec --onnx={vision}/{graph} --saveEngine={vision}/{engine} \\
    --stronglyTyped --minShapes={shape[0]} --optShapes={shape[0]} --maxShapes={shape[1]}
{command}
```

`vila-chat` asks the engines that vila-build-engine finished{gpus}.
"""


def instructions(release: Release, request: BuildRequest, precision: str, image_size: int) -> str:
    """Return the text of BUILD.md."""
    shapes = [
        f"{files.VISION_INPUT}:{count}x3x{image_size}x{image_size}"
        for count in (1, files.MAX_IMAGES)
    ]
    return TEMPLATE.format(
        title=request.target.title,
        target=request.target.name,
        vision=files.VISION,
        graph=files.GRAPH,
        engine=release.vision_engine,
        checkpoint=files.CHECKPOINT,
        precision="W4A16_AWQ" if precision == "int4" else "float16",
        ranks=_ranks(request),
        release=release.title,
        install="\n".join(release.install),
        shape=shapes,
        command=shell_line(build_command(release, request, precision, Path())),
        gpus="" if request.gpus == 1 else f" on {request.gpus} GPUs, started without mpirun",
    )


def _ranks(request: BuildRequest) -> str:
    if request.gpus == 1:
        return "one GPU"
    shared = f"{request.tp} GPUs that share each layer" if request.tp > 1 else "one GPU"
    return shared if request.pp == 1 else f"{request.pp} stages of layers, each on {shared}"
