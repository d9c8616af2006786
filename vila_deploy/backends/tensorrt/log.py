"""What TensorRT says of errors, kept for the exception that follows."""

from __future__ import annotations

from typing import Any

# By package: TensorRT keeps the first logger that it is given, whatever comes later.
_kept: dict[int, tuple[Any, Any, list[str]]] = {}


class ErrorLog:
    """The errors of a package since this was made; `logger` is what TensorRT is given."""

    def __init__(self, trt: Any):
        if id(trt) not in _kept:
            messages: list[str] = []
            _kept[id(trt)] = trt, _logger(trt, messages), messages
        _, self.logger, self._messages = _kept[id(trt)]
        self._start = len(self._messages)

    def first(self, otherwise: str) -> str:
        """What went wrong first; what follows is mostly its consequence."""
        return next(iter(self._messages[self._start :]), otherwise)

    def last(self, otherwise: str) -> str:
        """Of a run that may have had troubles before."""
        return next(reversed(self._messages[self._start :]), otherwise)


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):
        """Keeps errors and drops the rest."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message.partition("\n")[0])

    return Logger()
