"""The HTTP server: OpenAI's chat and completions, models, health and metrics, over one model."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from layerpack.formats.errors import LayerpackError
from layerpack.formats.jsontext import parse_json
from layerpack.runtime.generate import Generation
from layerpack.runtime.model import Model
from layerpack.runtime.requests.answer import Answer
from layerpack.serving.asking import CHAT, COMPLETIONS, asked_of
from layerpack.serving.fields import RequestError, shown
from layerpack.serving.metrics import metrics_text
from layerpack.serving.streaming import cancel, events
from layerpack.serving.telling import Teller, refused

_LEFT_S = 0.25  # how often a client that waits for a whole answer is looked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve. `names`: what the model may be called in requests, the first one shown.

    `ping_s`: a stream says so often that it is alive, while nothing else comes.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 8 << 20
    max_waiting: int = 256
    default_tokens: int = 512
    ping_s: float = 5.0


def create_app(model: Model, settings: Settings) -> Starlette:
    """The application over an open model."""
    server = _Server(model, settings)
    middleware = []
    if settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
            )
        )
    routes = [
        Route(CHAT, server.answered(CHAT), methods=["POST"]),
        Route(COMPLETIONS, server.answered(COMPLETIONS), methods=["POST"]),
        Route("/v1/models", server.guarded(server.models), methods=["GET"]),
        Route("/v1/models/{name:path}", server.guarded(server.one_model), methods=["GET"]),
        Route("/", server.page, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/metrics", server.guarded(server.metrics), methods=["GET"]),
    ]
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={404: _not_found, 405: _not_found, 500: _unforeseen},
    )


Handler = Callable[[Request], Awaitable[Response]]


class _Server:
    def __init__(self, model: Model, settings: Settings) -> None:
        self._model, self._settings = model, settings

    def guarded(self, handler: Handler) -> Handler:
        """The handler, for those who know the key."""

        async def checked(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except RequestError as error:
                return _error(error)

        return checked

    def answered(self, url: str) -> Handler:
        async def handler(request: Request) -> Response:
            return await self._answer(url, request)

        return self.guarded(handler)

    async def models(self, _request: Request) -> Response:
        name = self._settings.names[0]
        return JSONResponse({"object": "list", "data": [_model(name)]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(_model(request.path_params["name"]))

    async def health(self, _request: Request) -> Response:
        counts = self._model.counts
        progress = self._model.progress
        said = {
            "status": "ok",
            "running": counts.running,
            "waiting": self._model.num_waiting,
            "layer": progress.done + 1,
            "layers": progress.total,
        }
        return JSONResponse(said)

    async def page(self, _request: Request) -> Response:
        # Nothing comes from elsewhere, and no other page may frame it.
        policy = "default-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
        headers = {"content-security-policy": f"{policy}; frame-ancestors 'none'"}
        text = files("layerpack.serving").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=headers)

    async def metrics(self, _request: Request) -> Response:
        text, kind = metrics_text(self._model)
        return Response(text, media_type=kind)

    def _check_key(self, request: Request) -> None:
        if (key := self._settings.api_key) is None:
            return
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {key}".encode()):
            raise RequestError(
                "the API key is missing or wrong", status=401, code="invalid_api_key"
            )

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._settings.names:
            raise RequestError(
                f"model {shown(name)} is not served here, {self._settings.names[0]!r} is",
                param="model",
                status=404,
                code="model_not_found",
            )

    async def _answer(self, url: str, request: Request) -> Response:
        body = await self._body(request)
        asked = asked_of(url, body, default_tokens=self._settings.default_tokens)
        self._check_model(asked.model)
        if self._model.num_waiting + len(asked.prompts) > self._settings.max_waiting:
            raise RequestError(
                f"{self._model.num_waiting} requests are waiting already; come again later",
                status=429,
                code="queue_full",
            )
        try:
            teller = Teller(asked, model=self._settings.names[0], tokenizer=self._model.tokenizer)
            answers = [self._model.submit(*each) for each in asked.prompts]
        except LayerpackError as reason:
            raise refused(reason) from reason
        if asked.stream:
            await self._first_word(answers)
            return StreamingResponse(
                events(self._model, teller, answers, ping_s=self._settings.ping_s),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
            )
        return await self._whole(request, teller, answers)

    async def _body(self, request: Request) -> Any:
        most, raw = self._settings.max_body_bytes, bytearray()
        try:
            async for part in request.stream():
                raw += part
                if len(raw) > most:
                    raise RequestError(f"the body is longer than {most} bytes", status=413)
        except ClientDisconnect as reason:
            raise RequestError("the client left before it had asked", status=400) from reason
        try:
            return parse_json(bytes(raw))
        except ValueError as reason:
            raise RequestError(f"the body is not JSON ({reason})") from reason

    async def _first_word(self, answers: list[Answer]) -> None:
        """A moment for what is wrong with the prompt to be found: then it is no stream.

        Raises RequestError.
        """
        for _ in range(20):
            if any(answer.is_over for answer in answers) or all(
                answer.has_begun for answer in answers
            ):
                break
            await asyncio.sleep(0.01)
        for answer in answers:
            if answer.is_over:
                try:
                    answer.wait()
                except Exception as reason:
                    cancel(answers)
                    raise refused(reason) from reason

    async def _whole(self, request: Request, teller: Teller, answers: list[Answer]) -> Response:
        async def drained(answer: Answer) -> Generation:
            async for _ in answer:
                pass
            return answer.wait()

        work = asyncio.gather(*(drained(answer) for answer in answers))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=_LEFT_S)
                if not work.done() and await request.is_disconnected():
                    raise RequestError("the client left", status=400)
            return JSONResponse(teller.whole(work.result()))
        except LayerpackError as reason:
            raise refused(reason) from reason
        finally:
            cancel(answers)
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "layerpack"}


def _error(error: RequestError) -> Response:
    headers = {"retry-after": "30"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)


async def _not_found(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 404)
    return _error(
        RequestError(f"there is no {request.method} {shown(request.url.path)}", status=status)
    )


async def _unforeseen(_request: Request, error: Exception) -> Response:
    return _error(RequestError(f"unforeseen: {error!r}", status=500))
