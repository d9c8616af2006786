"""Write ONNX graphs node by node and stream their weights to a file beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

OPSET = 21
IR_VERSIONS = {21: 10, 24: 12}
MICROSOFT = "com.microsoft"
ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class StoredTensor:
    """Position, type and shape of a tensor in a WeightFile."""

    file: str
    data_type: int
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


class WeightFile:
    """A file of tensors, appended one by one so that only one at a time is in memory."""

    def __init__(self, path: Path):
        self._path, self._file, self._offset = path, path.open("xb"), 0

    def __enter__(self) -> WeightFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, array: NDArray[Any]) -> StoredTensor:
        """Write `array` in C order at an aligned offset."""
        return self._append(array, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    def append_int4(self, packed: NDArray[np.uint8], shape: tuple[int, ...]) -> StoredTensor:
        """Write signed 4-bit values of `shape`, two to a byte, the first in the low half."""
        assert packed.size * 2 == np.prod(shape)
        return self._append(packed, onnx.TensorProto.INT4, shape)

    def _append(self, array: NDArray[Any], data_type: int, shape: tuple[int, ...]) -> StoredTensor:
        self._offset += self._file.write(b"\0" * (-self._offset % ALIGNMENT_BYTES))
        stored = StoredTensor(self._path.name, data_type, shape, self._offset, array.nbytes)
        self._offset += self._file.write(np.ascontiguousarray(array).data)
        return stored


class GraphWriter:
    """An ONNX graph under construction; values are their names."""

    def __init__(self, opset: int = OPSET) -> None:
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""

    def scope(self, name: str) -> None:
        """Begin the names of the nodes that follow with `name`."""
        self._scope = f"{name}/"

    def input(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> str:
        """Declare an input of the graph; a name in `shape` stands for any size."""
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: list[int | str]) -> str:
        """Declare an output of the graph; a node with that name as output must write it."""
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def constant(self, value: NDArray[Any], name: str | None = None) -> str:
        """Return the name of a small tensor in the graph file; equal ones are one initializer."""
        name = name or f"{value.dtype}{list(value.shape)}:{value.tobytes().hex()}"
        if name not in self._initializers:
            self._initializers[name] = numpy_helper.from_array(value, name)
        return name

    def integers(self, *values: int) -> str:
        """Return the name of a constant int64 vector, such as a shape."""
        return self.constant(np.array(values, np.int64))

    def weight(self, name: str, stored: StoredTensor) -> str:
        """Return the name of a tensor that lies in a WeightFile."""
        tensor = onnx.TensorProto(name=name, data_type=stored.data_type, dims=stored.shape)
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (
            ("location", stored.file),
            ("offset", stored.offset),
            ("length", stored.size_bytes),
        ):
            tensor.external_data.add(key=key, value=str(value))
        self._initializers[name] = tensor
        return name

    def node(
        self, op: str, *inputs: str, output: str | None = None, domain: str = "", **attributes: Any
    ) -> str:
        """Add a node with one output and return its name."""
        name = output or f"{self._scope}{op}_{len(self._nodes)}"
        return self.nodes(op, *inputs, outputs=[name], domain=domain, **attributes)[0]

    def nodes(
        self, op: str, *inputs: str, outputs: list[str], domain: str = "", **attributes: Any
    ) -> list[str]:
        """Add a node with the named outputs; an empty name leaves one out."""
        name = f"{self._scope}{op}_{len(self._nodes)}"
        self._nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs

    def has(self, value: str) -> bool:
        """Return whether a node so far has an output called `value`."""
        return any(value in node.output for node in self._nodes)

    def new_name(self, name: str) -> str:
        """Return a value name that is not in use."""
        return f"{self._scope}{name}_{len(self._nodes)}"

    def save(self, path: Path) -> None:
        """Write the graph to `path`; its weights must lie in the same folder."""
        graph = helper.make_graph(
            self._nodes, path.stem, self._inputs, self._outputs, list(self._initializers.values())
        )
        versions = {"": self._opset, MICROSOFT: 1}
        used = {"", *(node.domain for node in self._nodes)}
        model = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid(domain, versions[domain]) for domain in sorted(used)
            ],
            ir_version=IR_VERSIONS[self._opset],
            producer_name="vila-deploy",
        )
        path.write_bytes(model.SerializeToString(deterministic=True))


def _value_info(name: str, dtype: type[np.generic], shape: list[int | str]) -> onnx.ValueInfoProto:
    data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, data_type, shape)
