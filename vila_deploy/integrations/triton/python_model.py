"""The model that Triton's Python backend runs: all clients' requests on one engine's scheduler."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from vila_deploy.integrations.triton.repository import ENGINE
from vila_deploy.integrations.triton.request import parse_request
from vila_deploy.integrations.triton.responses import Responses, input_arrays
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
            responses = Responses(self._triton, request.get_response_sender())
            try:
                self._submit(input_arrays(self._triton, request), responses)
            except VilaDeployError as error:
                responses.fail(str(error))

    def _submit(self, inputs: Mapping[str, NDArray[Any]], responses: Responses) -> None:
        engine = self._engine
        answer = parse_request(inputs, engine.model, engine.require_tokenizer())
        events = _Events(responses, answer.streams)
        events.ticket = self._scheduler.submit(answer.request, events.on_event)

    def finalize(self) -> None:
        """End what runs and close the engine."""
        self._opened.close()


class _Events:
    """What becomes of the scheduler's events; used by the engine's thread once it is submitted."""

    def __init__(self, responses: Responses, streams: bool):
        self._responses, self._streams = responses, streams
        self.ticket: Ticket | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, Failed):
            self._responses.fail(str(event.error))
        elif isinstance(event, Finished):
            self._responses.end("" if self._streams else event.text, event.finish_reason)
        elif self._responses.cancelled:
            if self.ticket is not None:
                self.ticket.cancel()
        elif isinstance(event, TextPiece) and event.text and self._streams:
            self._responses.piece(event.text)
