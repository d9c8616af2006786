"""Which model a server has, under which names, as OpenAI's API lists it."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from vila_deploy.server.errors import ApiError
from vila_deploy.server.options import ServerOptions


class ModelListing:
    """Answers /v1/models.

    Args:
        max_model_len: tokens of a prompt and its answer together.
    """

    def __init__(self, options: ServerOptions, max_model_len: int):
        self.options, self.started = options, int(time.time())
        self.max_model_len = max_model_len

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
            "max_model_len": self.max_model_len,
            "limits": {
                "max_body_bytes": limits.body_bytes,
                "max_image_pixels": limits.image_pixels,
                "max_images": limits.images,
            },
        }
