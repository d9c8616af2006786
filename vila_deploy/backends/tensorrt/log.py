"""Record TensorRT's error messages for the exception that follows."""

from __future__ import annotations

from typing import Any

# Logger and messages by package: TensorRT uses the first logger that it is given for all.
_loggers: dict[int, tuple[Any, Any, list[str]]] = {}


class ErrorLog:
    """A package's errors since this log was made; pass `logger` to TensorRT."""

    def __init__(self, trt: Any):
        if id(trt) not in _loggers:
            messages: list[str] = []
            _loggers[id(trt)] = trt, _logger(trt, messages), messages
        _, self.logger, self._messages = _loggers[id(trt)]
        self._start = len(self._messages)

    def first(self, otherwise: str) -> str:
        """Return the first error, of which later ones are mostly consequences, or `otherwise`."""
        return next(iter(self._messages[self._start :]), otherwise)

    def last(self, otherwise: str) -> str:
        """Return the newest error, or `otherwise` if there is none."""
        return next(reversed(self._messages[self._start :]), otherwise)


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):
        """Record errors and ignore all other messages."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.append(message.partition("\n")[0])

    return Logger()
