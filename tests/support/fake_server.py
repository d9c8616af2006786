"""A server that answers as vila-serve does, at the word of the question, for tests of the page.

"slow" writes until it is stopped, "broken" ends in the middle, "error" fails in the middle, "busy",
"large" and "strange" are refused; whatever else is answered with what the server has seen.
"""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vila_deploy.server.page_files import PAGE_FILES, read_page_file

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
REFUSALS = {
    "busy": (429, "the queue is full"),
    "large": (413, "the request is too large"),
    "strange": (400, "<b>not</b> a value of temperature; give a number"),
}


class FakeServer(ThreadingHTTPServer):
    """Listens on a free port of 127.0.0.1; remembers each request's body."""

    daemon_threads = True

    def __init__(self, key: str = "", limits: dict[str, int] | None = None, pause_s: float = 0.02):
        super().__init__(("127.0.0.1", 0), Handler)
        self.key, self.limits, self.pause_s = key, limits or {}, pause_s
        self.requests: list[dict[str, Any]] = []
        self.disconnected = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self.path in PAGE_FILES:
            content, kind = read_page_file(self.path)
            self._send(200, kind, content)
        elif self._knows_key():
            self._json(200, {"data": [{"id": "tiny-vila", "limits": self.server.limits}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._knows_key():
            return
        self.server.requests.append(body)
        parts = body["messages"][-1]["content"]
        images = 0 if isinstance(parts, str) else len(parts) - 1
        question = parts if isinstance(parts, str) else parts[-1]["text"]
        if question in REFUSALS:
            status, message = REFUSALS[question]
            self._json(status, {"error": {"message": message}})
            return
        self._stream(question, f"{images} images, {len(body['messages'])} messages: {question}")

    def _stream(self, question: str, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        words = ["word "] * 2000 if question == "slow" else text.split(" ")
        try:
            for number, word in enumerate(words):
                if question == "broken" and number == 2:
                    return
                if question == "error" and number == 2:
                    self._event({"error": {"message": "the engine has failed"}})
                    return
                piece = f" {word}" if number else word
                self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
                time.sleep(self.server.pause_s)
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event(
                {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(words)}}
            )
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.server.disconnected += 1

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
        self.wfile.flush()

    def _knows_key(self) -> bool:
        known = not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}"
        if not known:
            self._json(401, {"error": {"message": "wrong API key", "code": "invalid_api_key"}})
        return known

    def _json(self, status: int, value: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(value).encode(), {"Retry-After": "3"})

    def _send(
        self, status: int, kind: str, content: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
