"""Declares torchvision's operators: its wheel is for CUDA, and beside a torch for CPUs has none."""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _DeclaresOperators(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                self.library.define(operator + schema)
            finders.append(self)


# Keeps the declarations.
finders: list[_DeclaresOperators] = []
sys.meta_path.insert(0, _DeclaresOperators())
