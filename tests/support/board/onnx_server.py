"""Run ONNX graphs for a Python that has no onnxruntime: requests on stdin, answers on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


def send(stream: BinaryIO, content: Any, arrays: dict[str, Any]) -> None:
    facts = {name: [str(a.dtype), list(a.shape)] for name, a in arrays.items()}
    stream.write(json.dumps([content, facts]).encode() + b"\n")
    for array in arrays.values():
        stream.write(np.ascontiguousarray(array).tobytes())
    stream.flush()


def receive(stream: BinaryIO) -> tuple[Any, dict[str, Any]]:
    line = stream.readline()
    if not line:
        raise EOFError
    content, facts = json.loads(line)
    arrays = {}
    for name, (dtype, shape) in facts.items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(stream.read(size), dtype).reshape(shape)
    return content, arrays


class OnnxServer:
    """The process that does it, for the other side."""

    def __init__(self, python: str):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([python, __file__], stdin=pipe, stdout=pipe)

    def ask(self, content: Any, arrays: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        send(self._process.stdin, content, arrays)
        return receive(self._process.stdout)


def main() -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    # Otherwise onnxruntime would round activations to int8, which no GPU engine does.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    sessions: dict[str, Any] = {}
    while True:
        try:
            path, feeds = receive(sys.stdin.buffer)
        except EOFError:
            return
        if path not in sessions:
            _remove_own_attributes(path)
            sessions[path] = onnxruntime.InferenceSession(
                Path(path), options, providers=["CPUExecutionProvider"]
            )
        session = sessions[path]
        values = [
            [v.name, v.type, v.shape] for v in (*session.get_inputs(), *session.get_outputs())
        ]
        outputs = [output.name for output in session.get_outputs()]
        results = dict(zip(outputs, session.run(outputs, feeds), strict=True)) if feeds else {}
        send(sys.stdout.buffer, [values, len(session.get_inputs())], results)


def _remove_own_attributes(path: str) -> None:
    """Remove the attributes that only TensorRT's parser knows."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in [a for a in node.attribute if a.name.startswith("TRT_")]:
            node.attribute.remove(attribute)
    Path(path).write_bytes(model.SerializeToString())


if __name__ == "__main__":
    main()
