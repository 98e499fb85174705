"""The routes: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, and one page to talk to the models.

A page of another site must not use the server of the browser's machine. So requests have to be JSON, which browsers do
not send across sites without asking, no answer permits it, and without a token the server has to be called by a name of
this machine, which a name that another site points here is not.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from qlora_lite.serving.answers import Answers, Cancel, Written
from qlora_lite.serving.replies import DONE, SERVER_ERROR, Reply, error_object, event, model_object
from qlora_lite.serving.wanted import RequestError, Wanted, wanted_chat, wanted_text

BODY_SECONDS = 30.0
POLL_SECONDS = 0.25
JSON_TYPE = "application/json"
NONCE = "{{nonce}}"


def make_app(answers: Answers, token: str | None = None, checks_host: bool = True) -> FastAPI:
    """Returns the application. token: that requests have to carry; None for none. checks_host: without a token, whether
    the server has to be called by a name of this machine."""
    app = FastAPI(title="qlora-lite", openapi_url=None, docs_url=None, redoc_url=None)

    def admit(request: Request) -> None:
        _check_admitted(request, token, checks_host)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        extra = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "5"}}.get(error.status)
        return JSONResponse(error_object(error), error.status, extra)

    @app.get("/")
    async def page(request: Request) -> Response:
        if token is None:
            admit(request)
        return _page()

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, object]:
        admit(request)
        return {"object": "list", "data": [model_object(name, answers.began) for name in answers.names]}

    @app.get("/v1/models/{name}")
    async def model(request: Request, name: str) -> dict[str, object]:
        admit(request)
        if name not in answers.names:
            raise RequestError(f"there is no model {name!r:.80}", "model", 404, "model_not_found")
        return model_object(name, answers.began)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        admit(request)
        wanted = wanted_chat(await _json_of(request, answers.limits.body_bytes))
        return await _respond(request, answers, wanted, Reply(wanted.model, True))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        admit(request)
        wanted = wanted_text(await _json_of(request, answers.limits.body_bytes))
        return await _respond(request, answers, wanted, Reply(wanted.model, False))

    return app


def is_loopback(host: str) -> bool:
    """Whether a name or an address is one of this machine that others cannot reach."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_admitted(request: Request, token: str | None, checks_host: bool) -> None:
    if token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
            raise RequestError(
                "the token is missing or wrong; send Authorization: Bearer TOKEN", None, 401, "bad_token"
            )
    elif checks_host:
        named = urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
        if not is_loopback(named):
            raise RequestError(f"without a token this server is called localhost, not {named!r:.80}", None, 403)


async def _json_of(request: Request, most: int) -> dict[str, Any]:
    """The JSON object of a request of limited size. Raises RequestError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON_TYPE:
        raise RequestError(f"the request must be of type {JSON_TYPE}", None, 415)
    try:
        raw = await asyncio.wait_for(_body(request, most), BODY_SECONDS)
    except asyncio.TimeoutError as error:
        raise RequestError(f"the request did not arrive within {BODY_SECONDS:g} seconds", None, 408) from error
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"the request must be a JSON object; got a {type(value).__name__}")
    return value


async def _body(request: Request, most: int) -> bytes:
    length = request.headers.get("content-length", "0")
    chunks, size = list[bytes](), int(length) if length.isascii() and length.isdigit() else 0
    if size <= most:
        size = 0
        async for chunk in request.stream():
            chunks.append(chunk)
            size += len(chunk)
            if size > most:
                break
    if size > most:
        raise RequestError(f"the request has more than {most:,} bytes", None, 413)
    return b"".join(chunks)


async def _respond(request: Request, answers: Answers, wanted: Wanted, reply: Reply) -> Response:
    pieces: asyncio.Queue[str | None] = asyncio.Queue()
    put, cancel = _putter(pieces), Cancel()
    # Tokens of a long prompt take a while, in which others are to be served.
    future = await asyncio.to_thread(answers.submit, wanted, put, cancel)
    future.add_done_callback(lambda _: put(None))
    if wanted.stream:
        stream = _stream(wanted, reply, pieces, future, cancel)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    try:
        while not future.done():
            await asyncio.wait([asyncio.wrap_future(future)], timeout=POLL_SECONDS)
            if await request.is_disconnected():
                cancel()
    finally:
        cancel()
    written = _result(future)
    return JSONResponse(reply.whole(written))


def _putter(pieces: asyncio.Queue[str | None]) -> Callable[[str | None], None]:
    """A function that puts a piece into a queue of this loop, to be called from the thread that writes."""
    loop = asyncio.get_running_loop()

    def put(piece: str | None) -> None:
        with suppress(RuntimeError):  # the loop was closed, and nobody waits any more
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

    return put


async def _stream(
    wanted: Wanted, reply: Reply, pieces: asyncio.Queue[str | None], future: Future[Written], cancel: Cancel
) -> AsyncIterator[bytes]:
    """The events of a stream. An answer that nobody reads any more is ended."""
    try:
        if (opening := reply.opening()) is not None:
            yield event(opening)
        while (piece := await pieces.get()) is not None:
            yield event(reply.piece(piece))
        written = _result(future)
        yield event(reply.last(written))
        if wanted.with_usage:
            yield event(reply.counted(written))
    except RequestError as error:
        yield event(error_object(error))
    finally:
        cancel()
    yield DONE


def _result(future: Future[Written]) -> Written:
    """What was written. Raises RequestError, of a failure of the server too: what the model's code raised."""
    try:
        return future.result()
    except RequestError:
        raise
    except BaseException as error:
        what = f"the answer failed ({type(error).__name__}: {error})"
        raise RequestError(what, None, SERVER_ERROR, "server_error") from error


def _page() -> Response:
    nonce = secrets.token_urlsafe(16)
    text = files("qlora_lite.serving").joinpath("page.html").read_text(encoding="utf-8").replace(NONCE, nonce)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        f"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers: Mapping[str, str] = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(text, headers=headers)
