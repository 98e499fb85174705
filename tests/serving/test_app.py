"""Tests of the routes, over real connections, with OpenAI's own client where it has the words for it."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from qlora_lite.serving.app import is_loopback

HI: list[Any] = [{"role": "user", "content": "hello?"}]
TOKEN = "a-token-of-some-length"


def client(address: str, token: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=token, max_retries=0, timeout=60)


def ask(
    address: str, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A plain request; `_` in names of headers stands for `-`."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def test_the_client_of_openai_gets_answers_whole_and_in_pieces(start: Callable[..., str]) -> None:
    openai_client = client(start())
    assert [model.id for model in openai_client.models.list()] == ["loud", "tiny"]
    assert openai_client.models.retrieve("loud").owned_by == "qlora-lite"
    whole = openai_client.chat.completions.create(model="loud", messages=HI, max_tokens=8, temperature=0, seed=1)
    assert whole.choices[0].message.role == "assistant" and whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    pieces = list(openai_client.chat.completions.create(model="loud", messages=HI, max_tokens=8, **options))
    said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(said) == whole.choices[0].message.content and len([text for text in said if text]) > 1
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1] == "length"
    assert pieces[-1].usage == whole.usage and len({piece.id for piece in pieces}) == 1
    text = openai_client.completions.create(model="tiny", prompt="abc", max_tokens=6)
    streamed = openai_client.completions.create(model="tiny", prompt="abc", max_tokens=6, stream=True)
    assert "".join(piece.choices[0].text for piece in streamed) == text.choices[0].text != ""


def test_errors_are_those_of_the_client(start: Callable[..., str]) -> None:
    openai_client = client(start())
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'; there are: loud, tiny"):
        openai_client.chat.completions.create(model="x", messages=HI)
    with pytest.raises(openai.BadRequestError, match="n is not offered here") as refused:
        openai_client.chat.completions.create(model="tiny", messages=HI, n=2)
    assert refused.value.param == "n" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("x")


def has_a_place(openai_client: openai.OpenAI) -> bool:
    """Whether a request is answered and not refused since others wait."""
    with contextlib.suppress(openai.InternalServerError):
        openai_client.completions.create(model="tiny", prompt="abc", max_tokens=1)
        return True
    return False


def test_a_reader_that_leaves_ends_its_answer(start: Callable[..., str]) -> None:
    openai_client = client(start(queue=0))
    for _ in range(2):
        stream = openai_client.completions.create(model="tiny", prompt="abc", stream=True)
        next(iter(stream))
        stream.close()
        until = time.monotonic() + 60
        while not has_a_place(openai_client):  # once the answer has noticed
            assert time.monotonic() < until
            time.sleep(0.02)


def test_a_token_is_asked_for(start: Callable[..., str]) -> None:
    address = start(TOKEN)
    for wrong in ("none", TOKEN[:-1], TOKEN + "x"):
        with pytest.raises(openai.AuthenticationError, match="the token is missing or wrong"):
            client(address, wrong).models.list()
    assert [model.id for model in client(address, TOKEN).models.list()] == ["loud", "tiny"]
    status, headers, _ = ask(address, "POST", "/v1/completions", b"{}", Content_Type="application/json")
    assert status == 401 and headers["www-authenticate"] == "Bearer"
    assert ask(address, "GET", "/", Host="anywhere.example")[0] == 200  # the page asks for the token


def test_other_sites_cannot_use_it_through_a_browser(start: Callable[..., str]) -> None:
    address = start()
    for path in ("/", "/v1/models"):
        status, _, body = ask(address, "GET", path, Host="evil.example:80")
        assert status == 403 and b"without a token this server is called localhost, not 'evil.example'" in body
        assert ask(address, "GET", path, Host="localhost:1")[0] == 200
    body = json.dumps({"model": "tiny", "prompt": "abc", "max_tokens": 1}).encode()
    assert ask(address, "POST", "/v1/completions", body, Content_Type="text/plain")[0] == 415
    status, headers, _ = ask(address, "OPTIONS", "/v1/completions", Origin="http://evil.example")
    assert status == 405 and not any("access-control" in name for name in headers)


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"{", 400, b"the request is not valid JSON"),
        (b"[" * 100_000, 400, b"the request is not valid JSON"),
        (b"\xff", 400, b"the request is not valid JSON"),
        (b"[]", 400, b"the request must be a JSON object; got a list"),
        (b'{"model": "tiny", "prompt": "", "max_tokens": 1}', 400, b"the prompt has no tokens"),
        (b" " * 200_000, 413, b"the request has more than 150,000 bytes"),
    ],
    ids=["cut", "deep", "bytes", "list", "empty prompt", "large"],
)
def test_bad_bodies_are_refused(start: Callable[..., str], body: bytes, status: int, error: bytes) -> None:
    got, _, said = ask(start(body_bytes=150_000), "POST", "/v1/completions", body, Content_Type="application/json")
    assert got == status and error in said


def test_a_body_without_a_length_is_counted(start: Callable[..., str]) -> None:
    connection = http.client.HTTPConnection(urlsplit(start(body_bytes=1000)).netloc, timeout=60)
    connection.request(
        "POST", "/v1/completions", iter([b" " * 900] * 3), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert connection.getresponse().status == 413
    connection.close()


def test_the_page_needs_nothing_else(start: Callable[..., str]) -> None:
    status, headers, body = ask(start(), "GET", "/")
    text, policy = body.decode(), headers["content-security-policy"]
    assert status == 200 and "default-src 'none'" in policy and "connect-src 'self'" in policy
    nonce = policy.partition("'nonce-")[2].partition("'")[0]
    assert text.count(f'nonce="{nonce}"') == 2 and "{{" not in text
    assert "http://" not in text and "https://" not in text and "innerHTML" not in text


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "localhost.evil.example", "", "example.org")))
