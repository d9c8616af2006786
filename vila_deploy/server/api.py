"""What the endpoints share, and those that only tell."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vila_deploy.processing.chat_template import PROMPT_TEMPLATES
from vila_deploy.runtime.open_engine import OpenedEngine
from vila_deploy.runtime.scheduler import Scheduler
from vila_deploy.server.body import BodyBudget
from vila_deploy.server.metrics import MEDIA_TYPE, ServerMetrics
from vila_deploy.server.model_listing import ModelListing
from vila_deploy.server.options import ServerOptions
from vila_deploy.server.prompts import PromptMaker
from vila_deploy.server.remote_images import Network
from vila_deploy.server.structured_output import StructuredOutput


class Api(ModelListing):
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
        super().__init__(options, engine.session.max_seq_len)
        self.engine, self.scheduler = engine, scheduler
        self.draining = False
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

    async def drain(self) -> None:
        """Return when running answers have ended, or have been told to."""
        seconds = self.options.drain_timeout_s
        await asyncio.to_thread(self.scheduler.drain, seconds)

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
