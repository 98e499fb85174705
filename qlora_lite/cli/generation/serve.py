"""`qlora-lite serve`: answers over HTTP, with OpenAI's interface, and a page to talk to the model.

Exit status: 130 or 143 when a signal ends it, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import importlib.util
import json as json_lines
from pathlib import Path
from typing import Annotated

import typer

from qlora_lite.cli.generation.talkers import (
    DecodeCopies,
    MaxNewTokens,
    Talker,
    generation_settings,
    held_copies,
    load_talker,
)
from qlora_lite.cli.options import (
    AnyBase,
    BaseIn,
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    Format,
    IgnoreUnexpected,
    Int8Activations,
    Model,
    SkipModules,
    TextOnly,
)
from qlora_lite.errors import ConfigError
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

SHORTEST_TOKEN = 16
BASE = "base"


def _check_token(host: str, token: str | None) -> None:
    from qlora_lite.serving.app import is_loopback

    if token is None and not is_loopback(host):
        raise ConfigError(f"others can reach the server at {host}, so it needs a --token; or leave out --host")
    if token is not None and (
        len(token) < SHORTEST_TOKEN or not token.isascii() or " " in token or not token.isprintable()
    ):
        raise ConfigError(f"--token must have at least {SHORTEST_TOKEN} letters, digits and signs, without spaces")


def _names(talker: Talker, model: str) -> dict[str, str | None]:
    """{what requests call it: the adapter}: the adapters, and the plain base by the name of its folder."""
    own = Path(model).name or BASE
    plain = own if own not in talker.adapters else BASE
    return {**{name: name for name in talker.adapters}, plain: None}


def serve(
    ctx: typer.Context,
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="Folder of an adapter, or a name for it and the folder, as polite=out/run/adapter. Each is a model "
            "of its own for clients, by its name; the plain base is one by the name of its folder.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at. One that others can reach needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 chooses a free one.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="QLORA_LITE_TOKEN", show_envvar=True, help="Secret that clients have to send, as their API key."
        ),
    ] = None,
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    max_new_tokens: MaxNewTokens = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait while one is answered; more are refused.")] = 8,
    time_limit: Annotated[
        float, typer.Option(help="Seconds that a request may wait, and that an answer may take.")
    ] = 300.0,
    decode_copies: DecodeCopies = False,
    any_base: AnyBase = False,
    ignore_unexpected: IgnoreUnexpected = False,
    text_only: TextOnly = False,
    base_in: BaseIn = "memory",
    json: Annotated[bool, typer.Option("--json", help="Print address and models as one JSON object.")] = False,
) -> None:
    """Answer over HTTP, with OpenAI's interface, and on a page; at this machine alone unless a token is set."""
    if missing := [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serve needs {' and '.join(missing)}; install qlora-lite[serve]")
    from qlora_lite.serving.answers import Answers, Limits
    from qlora_lite.serving.app import is_loopback, make_app
    from qlora_lite.serving.server import Server, address_of, listen

    made = generation_settings({**ctx.params, "temperature": None}, model)
    limits = Limits(made.max_new_tokens, queue, time_limit)
    _check_token(host, token)
    with listen(host, port) as listening:
        talker = load_talker(ctx.params)
        names = _names(talker, model)
        answers = Answers(talker.model, talker.tokenizer, names, limits)
        app = make_app(answers, token, checks_host=is_loopback(host))
        address = address_of(listening)
        if json:
            print(json_lines.dumps({"address": address, "models": [*names]}), flush=True)
        else:
            print(f"{address} (OpenAI's interface is at {address}/v1; Ctrl-C ends the server)", flush=True)
            print(f"models: {', '.join(names)}", flush=True)
        with held_copies(talker.model, decode_copies):
            try:
                Server(app, answers.end).run([listening])
            finally:
                answers.close()  # before the copies go
