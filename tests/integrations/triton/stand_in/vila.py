"""The model before the LLM as Triton runs it, with the vision encoder of our engine on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vila_deploy import open_engine
from vila_deploy.engine.manifest import Manifest
from vila_deploy.integrations.triton import trtllm_model


class TritonPythonModel(trtllm_model.TritonPythonModel):
    """Opens another vision encoder, since TensorRT's needs a GPU."""

    def open_vision(self, folder: Path, manifest: Manifest) -> Any:
        self._engine = open_engine(os.environ["STAND_IN_ENGINE"])
        return SimpleNamespace(run=self._engine.session.encode_images)
