"""Errors in the form that OpenAI's API gives them, in our own words only."""

from __future__ import annotations

from typing import Any

from vila_deploy.utils.errors import VilaDeployError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    411: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(VilaDeployError):
    """A problem that ends a request.

    Args:
        what: the rule that is broken and what was found.
        status: the HTTP status, a key of the table above.
        param: the field that it concerns, as messages[0].content.
        code: a word for programs.
        retry_after_s: when to try again, in seconds.
        allow: methods that the path has, for status 405.
    """

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        fix: str | None = None,
        retry_after_s: int | None = None,
        allow: str | None = None,
    ):
        super().__init__(what, where=param, fix=fix)
        self.status, self.param, self.code = status, param, code
        self.retry_after_s, self.allow = retry_after_s, allow

    def body(self) -> dict[str, Any]:
        """Return the JSON object that OpenAI's clients expect."""
        kind = _TYPES[self.status]
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {"www-authenticate": "Bearer"} if self.status == 401 else {}
        if self.allow is not None:
            headers["allow"] = self.allow
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        return headers


def refused(error: VilaDeployError, param: str, code: str | None = None) -> ApiError:
    """Return a problem that a room below has with a request; `where`, maybe a path, is left out."""
    return ApiError(error.what, param=param, code=code, fix=error.fix)


def internal(request_id: str) -> ApiError:
    """Return what a client hears of a fault of ours; the log has the rest under the same id."""
    return ApiError(
        "the server failed to answer this request",
        status=500,
        code="internal_error",
        fix=f"the server's log says more under {request_id}",
    )
