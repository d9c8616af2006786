"""The model that Triton's Python backend runs: all clients' requests on one engine's scheduler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_deploy.integrations.triton.repository import ENGINE, INPUTS
from vila_deploy.integrations.triton.request import Answer, parse_request
from vila_deploy.runtime.open_engine import open_engine
from vila_deploy.runtime.request import Event, Failed, Finished, TextPiece, Ticket
from vila_deploy.runtime.scheduler import Scheduler
from vila_deploy.utils.errors import VilaDeployError


class TritonPythonModel:
    """What the Python backend calls; see its README."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine that config.pbtxt names.

        Args:
            args: `model_config` is config.pbtxt as JSON, `model_repository` the model's folder.
        """
        import triton_python_backend_utils

        self._triton = triton_python_backend_utils
        parameters = json.loads(args["model_config"])["parameters"]
        folder = Path(args["model_repository"], parameters[ENGINE]["string_value"])
        slots = int(parameters["slots"]["string_value"])
        with ExitStack() as stack:
            self._engine = stack.enter_context(open_engine(folder, slots))
            self._scheduler = Scheduler(self._engine)
            stack.callback(self._scheduler.close)
            self._opened = stack.pop_all()

    def execute(self, requests: Sequence[Any]) -> None:
        """Let each request wait for a slot; its answer follows piece by piece."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, _Responses(self._triton, sender))
            except VilaDeployError as error:
                _Responses(self._triton, sender).fail(str(error))

    def _submit(self, request: Any, responses: _Responses) -> None:
        answer = parse_request(self._inputs(request), self._engine)

        def on_event(event: Event) -> None:
            responses.add(event, answer)

        responses.ticket = self._scheduler.submit(answer.request, on_event)

    def _inputs(self, request: Any) -> dict[str, NDArray[Any]]:
        found = {}
        for tensor in INPUTS:
            value = self._triton.get_input_tensor_by_name(request, tensor.name)
            if value is not None:
                found[tensor.name] = value.as_numpy()
        return found

    def finalize(self) -> None:
        """End what runs and close the engine."""
        self._opened.close()


class _Responses:
    """The responses to one request; used by the engine's thread once it is submitted."""

    def __init__(self, triton: Any, sender: Any):
        self._triton, self._sender = triton, sender
        self.ticket: Ticket | None = None

    def add(self, event: Event, answer: Answer) -> None:
        if isinstance(event, Failed):
            self.fail(str(event.error))
        elif isinstance(event, Finished):
            self._send("" if answer.streams else event.text, event.finish_reason, last=True)
        elif self._sender.is_cancelled():
            if self.ticket is not None:
                self.ticket.cancel()
        elif isinstance(event, TextPiece) and event.text and answer.streams:
            self._send(event.text, "")

    def fail(self, message: str) -> None:
        error = self._triton.TritonError(message)
        self._end(self._triton.InferenceResponse([], error))

    def _send(self, text: str, finish_reason: str, last: bool = False) -> None:
        values = {"text_output": text, "finish_reason": finish_reason}
        tensors = [
            self._triton.Tensor(name, np.array([value.encode()], object))
            for name, value in values.items()
        ]
        response = self._triton.InferenceResponse(tensors)
        if last:
            self._end(response)
        else:
            self._sender.send(response)

    def _end(self, response: Any) -> None:
        self._sender.send(response, self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
