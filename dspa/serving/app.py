"""The HTTP side: three endpoints of the OpenAI API, a list of the names, and a health check."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import HTTPException
from fastapi.responses import JSONResponse, Response, StreamingResponse

from dspa.serving.answers import AnswerForm, ChatForm, CompletionForm, ResponseForm, collected
from dspa.serving.engine import Engine, PreparedRequest
from dspa.serving.generation import Event
from dspa.serving.requests import ChatBody, CompletionBody, RequestError, ResponseBody, read_request

_ENDPOINTS: dict[str, tuple[Any, Callable[[PreparedRequest], AnswerForm]]] = {
    "/v1/chat/completions": (ChatBody, ChatForm),
    "/v1/completions": (CompletionBody, CompletionForm),
    "/v1/responses": (ResponseBody, ResponseForm),
}
_GONE = Response(status_code=499)  # nobody is there to read it


def build_app(engine: Engine) -> FastAPI:
    """The application that serves an engine."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status)

    @app.exception_handler(HTTPException)
    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        status = getattr(error, "status_code", 404)
        served = ", ".join((*_ENDPOINTS, "/v1/models", "/health"))
        line = f"{request.method} {request.url.path[:100]} is not served here; served are {served}"
        return JSONResponse(RequestError(line, status=status).body(), status_code=status)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        line = f"the server failed: {type(error).__name__}; its log says more"
        return JSONResponse(RequestError(line, status=500).body(), status_code=500)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "dspa"} for name in engine.names]
        return {"object": "list", "data": listed}

    for path, (body_kind, form_of) in _ENDPOINTS.items():
        app.add_api_route(path, _endpoint(engine, body_kind, form_of), methods=["POST"], response_model=None)
    return app


def _endpoint(
    engine: Engine, body_kind: Any, form_of: Callable[[PreparedRequest], AnswerForm]
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    async def answer(request: Request) -> Response:
        asked = read_request(await _body(request, engine.limits.request_bytes), body_kind)
        prepared = await engine.prepare(asked)
        form = form_of(prepared)
        events = engine.generate(prepared)
        if asked.stream:
            return StreamingResponse(_guarded(form, events), media_type="text/event-stream")
        answering = asyncio.ensure_future(collected(events, asked.choices))
        leaving = asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not answering.done():
                return _GONE
            return JSONResponse(form.whole(answering.result()))
        finally:
            for task in (answering, leaving):
                task.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
            await _close(events)

    return answer


async def _guarded(form: AnswerForm, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """The stream of an answer; an error becomes its last event, and a client that leaves ends the generation."""
    try:
        async for piece in form.stream(events):
            yield piece
    except RequestError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
    finally:
        await _close(events)


async def _close(events: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it is running just now, and ends by being cancelled
        await events.aclose()


async def _body(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise RequestError(f"the body has more than {limit} bytes, the limit of this server", status=413)
    return bytes(body)


async def _left(request: Request) -> None:
    """Returns when the client has closed its connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
