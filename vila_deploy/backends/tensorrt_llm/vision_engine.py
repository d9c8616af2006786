"""Run the vision encoder's engine through TensorRT-LLM's Session."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from vila_deploy.backends.tensorrt_llm import files
from vila_deploy.backends.tensorrt_llm.releases import Release
from vila_deploy.utils.arrays import Floats
from vila_deploy.utils.errors import VilaDeployError

DEVICE = "cuda"


class VisionEngine:
    """The vision encoder in `folder`; up to `files.MAX_IMAGES` images in a pass.

    Args:
        package: the module tensorrt_llm.
    """

    def __init__(self, package: Any, torch: Any, folder: Path, release: Release):
        self._package, self._torch = package, torch
        self._output = release.vision_output
        plan = folder / files.VISION / release.vision_engine
        with (
            plan.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            self._session = package.runtime.Session.from_serialized_engine(content)

    def run(self, pixels: Floats) -> Floats:
        """Return features [images, tokens, hidden] of [images, 3, size, size].

        Raises:
            VilaDeployError: TensorRT fails.
        """
        starts = range(0, len(pixels), files.MAX_IMAGES)
        return np.concatenate([self._pass(pixels[i : i + files.MAX_IMAGES]) for i in starts])

    def _pass(self, pixels: Floats) -> Floats:
        torch, runtime = self._torch, self._package.runtime
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(DEVICE, torch.float16)
        half = self._package._utils.str_dtype_to_trt("float16")
        info = runtime.TensorInfo(files.VISION_INPUT, half, tuple(batch.shape))
        (output_info,) = self._session.infer_shapes([info])
        output = torch.empty(tuple(output_info.shape), dtype=torch.float16, device=DEVICE)
        stream = torch.cuda.current_stream()
        inputs, outputs = {files.VISION_INPUT: batch.contiguous()}, {self._output: output}
        if not self._session.run(inputs, outputs, stream.cuda_stream):
            raise VilaDeployError(
                "TensorRT could not run the vision engine", fix="build the engine again"
            )
        stream.synchronize()
        features: Floats = output.float().cpu().numpy()
        return features
