"""What the endpoints share, and those that only tell."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vila_deploy.processing.chat_template import PROMPT_TEMPLATES
from vila_deploy.runtime.open_engine import OpenedEngine
from vila_deploy.runtime.scheduler import Scheduler
from vila_deploy.server.body import BodyBudget
from vila_deploy.server.errors import ApiError
from vila_deploy.server.metrics import MEDIA_TYPE, ServerMetrics
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.prompts import PromptMaker
from vila_deploy.server.remote_images import Network
from vila_deploy.server.structured_output import StructuredOutput


class Api:
    """The engine with all that endpoints need of it.

    `draining` is set when the server is to end: new requests are refused from then on.

    Args:
        network: how image URLs are fetched, where `options` allow it.
    """

    def __init__(
        self,
        engine: OpenedEngine,
        scheduler: Scheduler,
        options: ServerOptions,
        network: Network | None = None,
    ):
        self.engine, self.scheduler, self.options = engine, scheduler, options
        self.draining, self.started = False, int(time.time())
        self.tokenizer, model = engine.require_tokenizer(), engine.model
        stops = PROMPT_TEMPLATES[model.prompt].stops
        self.special_tokens = {
            number: name for name in stops if (number := self.tokenizer.token_id(name)) is not None
        }
        self.metrics = ServerMetrics(options.model_names[0], scheduler.stats)
        network = (network or Network()) if options.allow_image_urls else None
        self.prompts = PromptMaker(
            model, self.tokenizer, options.limits, scheduler.prompt_limit, network
        )
        self.budget = BodyBudget(options.body_bytes_in_flight)
        self.structured_output = StructuredOutput(
            self.tokenizer, model.vocab_size, model.stop_token_ids
        )

    def close(self) -> None:
        """End the threads that decode images; the scheduler stays."""
        self.prompts.close()

    async def health(self, request: Request) -> Response:
        """Answer 200 while requests are taken."""
        if self.draining or not self.scheduler.alive:
            return JSONResponse({"status": "unavailable"}, 503)
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """Answer with all figures."""
        return Response(self.metrics.exposition(), media_type=MEDIA_TYPE)

    async def list_models(self, request: Request) -> Response:
        """Answer with the model under each of its names."""
        models = [self._model(name) for name in self.options.model_names]
        return JSONResponse({"object": "list", "data": models})

    async def show_model(self, request: Request) -> Response:
        """Answer with the model of one name."""
        return JSONResponse(self._model(self.model_name(request.path_params["name"])))

    def model_name(self, asked: str | None) -> str:
        """Return the name that a client asked for; without one, the first that there is.

        Raises:
            ApiError: this server has no such model.
        """
        names = self.options.model_names
        if asked is not None and asked not in names:
            raise ApiError(
                "no such model",
                status=404,
                param="model",
                code="model_not_found",
                fix=f"this server has {' and '.join(names)}",
            )
        return asked or names[0]

    def _model(self, name: str) -> dict[str, Any]:
        limits = self.options.limits
        return {
            "id": name,
            "object": "model",
            "created": self.started,
            "owned_by": "vila-deploy",
            "max_model_len": self.engine.session.max_seq_len,
            "limits": {
                "max_body_bytes": limits.body_bytes,
                "max_image_pixels": limits.image_pixels,
                "max_images": limits.images,
            },
        }
