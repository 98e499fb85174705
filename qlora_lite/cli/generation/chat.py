"""`qlora-lite chat`: talks with a model, with its adapters or without.

A person types behind a prompt; of a pipe, each line is a turn, and the chat ends with it.

Exit status: 0 ended, 1 failed (of a pipe, a turn that cannot be answered), 2 wrong usage, 130 ended by Ctrl-C.
"""

from __future__ import annotations

import json as json_lines
import time
from typing import TYPE_CHECKING, Annotated

import typer

from qlora_lite.cli.generation.lines import Lines, shown
from qlora_lite.cli.generation.talkers import (
    OFF,
    DecodeCopies,
    MaxNewTokens,
    Temperature,
    TopK,
    TopP,
    adapters_in_words,
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
from qlora_lite.errors import ConfigError, QLoRAError
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED

if TYPE_CHECKING:
    from qlora_lite.generation.chat_session import ChatSession

HELP = """\
/reset           forget what was said
/adapter         show the adapters
/adapter NAME    answer with this adapter from now on
/adapter off     answer without an adapter
/help            show this
/exit            end the chat, as Ctrl-D does
Ctrl-C           end the answer that is being written
//...            say a line that begins with /"""
COMMAND = "/"


class Chat:
    """A conversation in the terminal or of a pipe: takes lines, and prints what becomes of them."""

    def __init__(self, session: ChatSession, adapters: tuple[str, ...], lines: Lines, as_json: bool) -> None:
        self._session, self._adapters, self._lines, self._as_json = session, adapters, lines, as_json

    def run(self) -> None:
        """Answers lines until they end or `/exit`. Of a person errors are shown; of a pipe they end the chat."""
        if self._lines.by_person:
            self._tell_adapters()
            print("(/help lists the commands)")
        for line in self._lines.read():
            if not self._survived(line):
                return

    def _survived(self, line: str) -> bool:
        """As `_take`; an error is shown to a person, and the chat goes on."""
        try:
            return self._take(line)
        except QLoRAError as error:
            if not self._lines.by_person:
                raise
            print(shown(f"error: {' '.join(str(error).split())}"))
            return True

    def _take(self, line: str) -> bool:
        """Obeys a command or answers a message; returns whether the chat goes on. An empty line does nothing."""
        if not line.strip():
            return True
        if line.startswith(COMMAND) and not line.startswith(2 * COMMAND):
            return self._obey(*line.split())
        self._answer(line[1:] if line.startswith(COMMAND) else line)
        return True

    def _obey(self, command: str, *words: str) -> bool:
        if command == "/exit" and not words:
            return False
        if command == "/reset" and not words:
            self._session.reset()
            self._tell("what was said is forgotten")
        elif command == "/help" and not words:
            self._tell(HELP)
        elif command == "/adapter" and len(words) <= 1:
            if words:
                self._session.use(None if words[0] == OFF else words[0])
            self._tell_adapters()
        else:
            known = "/reset, /adapter NAME, /adapter off, /help and /exit"
            raise ConfigError(f"{' '.join([command, *words])!r} is not a command; there are {known}")
        return True

    def _tell(self, text: str) -> None:
        """Shows what became of a command; with --json there are answers alone."""
        if not self._as_json:
            print(shown(text))

    def _tell_adapters(self) -> None:
        self._tell(f"adapters: {adapters_in_words(self._adapters, self._session.adapter)}")

    def _answer(self, text: str) -> None:
        began = time.perf_counter()
        with self._lines.answering():
            made = self._session.ask(text, None if self._as_json else self._show, self._lines.interrupted)
        dropped = self._session.dropped
        if self._as_json:
            figures = {
                "answer": made.text,
                "finish_reason": made.finish_reason,
                "tokens": made.tokens,
                "seconds": round(time.perf_counter() - began, 2),
                "adapter": self._session.adapter,
                "turns_dropped": dropped,
            }
            print(json_lines.dumps(figures, ensure_ascii=False), flush=True)
            return
        print(flush=True)
        notes = {"length": "cut at --max-new-tokens", "interrupted": "ended by Ctrl-C"}
        self._note(notes.get(made.finish_reason))
        self._note(f"the {dropped} oldest turns were forgotten, since they no longer fit" if dropped else None)

    def _note(self, text: str | None) -> None:
        if text is not None and self._lines.by_person:
            print(f"({text})")

    def _show(self, text: str) -> None:
        print(shown(text), end="", flush=True)


def chat(
    ctx: typer.Context,
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="Folder of an adapter, or a name for it and the folder, as polite=out/run/adapter. Of several, the "
            "first one answers until /adapter chooses another.",
        ),
    ] = None,
    format: Format = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    int8_activations: Int8Activations = False,
    system: Annotated[str | None, typer.Option(help="System message that begins the conversation.")] = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Annotated[int | None, typer.Option(help="Seed of drawn tokens. Default: another one each time.")] = None,
    decode_copies: DecodeCopies = False,
    any_base: AnyBase = False,
    ignore_unexpected: IgnoreUnexpected = False,
    text_only: TextOnly = False,
    base_in: BaseIn = "memory",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk with a model, with its adapters or without; a pipe gives one turn a line."""
    from qlora_lite.generation.chat_session import ChatSession

    made = generation_settings(ctx.params, model)
    talker = load_talker(ctx.params)
    session = ChatSession(talker.model, talker.tokenizer, made, system)
    with held_copies(talker.model, decode_copies):
        Chat(session, talker.adapters, Lines(), json).run()
