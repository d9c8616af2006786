"""A GPU that isn't there: tensors that are said to lie on it are kept apart from the others.

Under `PretendGpu` a tensor moved to "cuda" stays where it is but remembers where it would be. An
operation that mixes the two places raises, as it does on a real GPU; what is computed is the CPU's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

GPU = torch.device("cuda")
MOVES = (Tensor.copy_, Tensor.__setitem__, Tensor.__getitem__, Tensor.to)
BETWEEN_PLACES = ("__set__", "_has_compatible_shallow_copy_type")


class PretendGpu(TorchFunctionMode):
    """Args:
    operations: how many took place on the GPU.
    """

    def __init__(self):
        super().__init__()
        # Kept, or another tensor's memory might come to lie where one of these was.
        self._storages = {}
        self.operations = 0

    def _is_here(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._storages

    def _mark(self, tensor):
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage
        return tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        here = [self._is_here(leaf) for leaf in leaves]
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._property(func, args, here)
        if func is Tensor.cpu:
            return func(*args).clone() if here[0] else func(*args)
        wanted = self._wanted(func, args, kwargs)
        if func is Tensor.numpy and here[0]:
            raise TypeError("can't convert cuda tensor to numpy")
        if wanted is not None:
            return self._made(func, args, kwargs, wanted)
        if func not in MOVES and name not in BETWEEN_PLACES:
            # Numbers may come from anywhere; what is empty has no place.
            pairs = zip(leaves, here, strict=True)
            vectors = [at for leaf, at in pairs if leaf.numel() and (leaf.ndim or at)]
            if any(vectors) and not all(vectors):
                raise RuntimeError(f"{name}: tensors on two devices")
        elif func is Tensor.__getitem__ and any(here[1:]) and not here[0]:
            raise RuntimeError("an index on the GPU into a tensor on the CPU")
        result = func(*args, **kwargs)
        reads = func in (Tensor.copy_, Tensor.__setitem__)
        if (here and here[0]) if reads or func in MOVES else any(here):
            self.operations += 1
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor) and leaf.numel():
                    self._mark(leaf)
        return result

    def _property(self, func, args, here):
        if func.__self__ is Tensor.device and here[0]:
            return GPU
        result = func(*args)
        # Gradients come from where no mode sees them.
        if func.__self__ is Tensor.grad and here[0] and result is not None:
            self._mark(result)
        return result

    def _wanted(self, func, args, kwargs):
        """The device that is named in a call, and no longer in its arguments."""
        named = kwargs.get("device")
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], torch.device | str):
            named = args[1]
        return None if named is None else torch.device(named)

    def _made(self, func, args, kwargs, device):
        if device.type != "cuda" and func is not Tensor.to:
            return func(*args, **kwargs)
        if func is Tensor.to:
            moved = self._is_here(args[0]) != (device.type == "cuda")
            copied = args[0].clone() if moved or kwargs.get("copy") else args[0]
            return self._mark(copied) if device.type == "cuda" else copied
        return self._mark(func(*args, **{**kwargs, "device": "cpu"}))
