"""Input tensors of a Triton request, and the responses to it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vila_deploy.integrations.triton.repository import INPUTS


def input_arrays(triton: Any, request: Any) -> dict[str, NDArray[Any]]:
    """Return the input tensors that a request has, by name.

    Args:
        triton: the module triton_python_backend_utils.
    """
    found = {}
    for tensor in INPUTS:
        value = triton.get_input_tensor_by_name(request, tensor.name)
        if value is not None:
            found[tensor.name] = value.as_numpy()
    return found


class Responses:
    """Sends the responses to one request; any thread may use it, one at a time.

    Args:
        triton: the module triton_python_backend_utils.
        sender: of the request.
    """

    def __init__(self, triton: Any, sender: Any):
        self._triton, self._sender = triton, sender

    @property
    def cancelled(self) -> bool:
        """Return whether the client waits no longer."""
        return bool(self._sender.is_cancelled())

    def piece(self, text: str) -> None:
        """Send the next piece of the answer."""
        self._sender.send(self._response(text, ""))

    def end(self, text: str, finish_reason: str) -> None:
        """Send the last piece of the answer, or all of it."""
        self._end(self._response(text, finish_reason))

    def fail(self, message: str) -> None:
        """Send an error instead of what is left of the answer."""
        self._end(self._triton.InferenceResponse([], self._triton.TritonError(message)))

    def _response(self, text: str, finish_reason: str) -> Any:
        values = {"text_output": text, "finish_reason": finish_reason}
        tensors = [
            self._triton.Tensor(name, np.array([value.encode()], object))
            for name, value in values.items()
        ]
        return self._triton.InferenceResponse(tensors)

    def _end(self, response: Any) -> None:
        self._sender.send(response, self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
