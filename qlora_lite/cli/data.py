"""`qlora-lite data`: what is learned from records, before a step is taken.

Exit status: 0 shown, 1 more bad records than --skip-bad or nothing to learn, 2 wrong usage.
"""

from __future__ import annotations

import json as json_lines
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_lite.cli.data_options import (
    SOURCES_HELP,
    Fields,
    Learn,
    LearnEmptyReasoning,
    Limit,
    MaxLength,
    SkipBad,
    TokenCache,
    data_config,
    input_paths,
    tokenizing_progress,
)
from qlora_lite.cli.options import Json, Model

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from qlora_lite.data.listing import ShownExample
    from qlora_lite.data.summary import Summary
    from qlora_lite.data.tokenization import SourceTokens, TokenizedSet

SHOWN, SHOWN_ON_PAGE = 3, 20
WIDTH = 100  # of what is not printed on a terminal
ALL = 2**62  # bad records are shown, not refused
EIGHTHS = " ▏▎▍▌▋▊▉"


def _line(console: Console, text: str | Text = "", style: str | None = None) -> None:
    """Prints text as it is, without markup and wrapping, and ends the line unless the text does."""
    end = "" if str(text).endswith("\n") else "\n"
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True, end=end)


def _print_lines(console: Console, heading: str, lines: Iterable[str]) -> None:
    _line(console, heading, "bold")
    for line in lines:
        _line(console, f"  {line}")
    _line(console)


def _print_figures(console: Console, heading: str, figures: Sequence[tuple[str, str]]) -> None:
    from qlora_lite.data.listing import visible_line

    width = max(len(name) for name, _ in figures)
    _print_lines(console, visible_line(heading), (f"{name:<{width}}  {visible_line(value)}" for name, value in figures))


def histogram(summary: Summary, width: int, ascii_only: bool = False) -> list[str]:
    """Returns the lengths of the examples as bars, in lines of at most `width` characters where that can be."""
    from qlora_lite.data.listing import bars

    shown = bars(summary)
    names, counts = max(len(bar.lengths) for bar in shown), max(len(f"{bar.examples:,}") for bar in shown)
    marks = max(len(bar.mark) + 3 if bar.mark else 0 for bar in shown)
    room = max(8, min(50, width - names - counts - marks - 3))
    most = max(bar.examples for bar in shown)
    whole, cut, arrow = ("#", "-", "<") if ascii_only else ("█", "░", "◀")
    lines = []
    for bar in shown:
        full, rest = divmod(max(1, round(8 * room * bar.examples / most)) if bar.examples else 0, 8)
        if ascii_only or bar.is_cut:
            drawn = (cut if bar.is_cut else whole) * max(full, bar.examples > 0)
        else:
            drawn = whole * full + EIGHTHS[rest].strip()
        mark = f" {arrow} {bar.mark}" if bar.mark else ""
        lines.append(f"{bar.lengths:>{names}}  {drawn:<{room}} {bar.examples:>{counts},}{mark}")
    return lines


def _coloured(example: ShownExample) -> Text:
    """The text of an example: green where it is learned, special tokens reversed, escapes in yellow."""
    from rich.text import Text

    from qlora_lite.data.listing import visible_parts

    text = Text()
    for piece in example.pieces:
        style = "bold green" if piece.learned else "dim" if piece.special else ""
        for part, hidden in visible_parts(piece.text):
            text.append(part, f"{style}{' reverse' if piece.special else ''}{' yellow' if hidden else ''}".strip())
    return text


def _print_examples(console: Console, shown: Sequence[ShownExample], of: int) -> None:
    from qlora_lite.data.listing import ASCII_MARKS, MARKS

    if not shown:
        return
    has_colours = console.color_system is not None and not console.no_color
    marks = ASCII_MARKS if console.options.ascii_only else MARKS
    legend = "learned text is green" if has_colours else f"learned text is between {marks[0]} and {marks[1]}"
    _line(console, f"{len(shown):,} of {of:,} examples; {legend}", "bold")
    for example in shown:
        _line(console)
        _line(console, example.heading, "bold")
        _line(console, _coloured(example) if has_colours else example.marked(marks))


def _print_bad(console: Console, parts: Sequence[SourceTokens]) -> None:
    from qlora_lite.data.listing import bad_lines

    if count := sum(part.bad.count for part in parts):
        _print_lines(console, f"{count:,} bad record{'s' if count > 1 else ''}", bad_lines(parts))


def _print_summary(console: Console, summary: Summary) -> None:
    for source in summary.sources:
        _print_figures(console, source.source, source.figures())
    _print_figures(console, "all records", summary.figures())
    width = console.width if console.is_terminal else WIDTH
    lines = histogram(summary, width - 2, console.options.ascii_only)
    _print_lines(console, "tokens of the examples before they are shortened", [*lines, *summary.length_notes()])


def _as_json(tokenized: TokenizedSet, summary: Summary, shown: Sequence[ShownExample] | None) -> str:
    bad = [{"place": place, "reason": reason} for part in tokenized.parts for place, reason in part.bad.kept]
    examples = {} if shown is None else {"shown": [example.to_json() for example in shown]}
    return json_lines.dumps({**summary.to_json(), "bad_records": bad, **examples})


def _check_bad(parts: Sequence[SourceTokens], allowed: int) -> None:
    """Raises CheckpointError if a source has more bad records than are allowed."""
    from qlora_lite.data.listing import visible_line
    from qlora_lite.errors import CheckpointError, listing

    over = [part for part in parts if part.bad.count > allowed]
    if over:
        found = listing(f"{part.bad.count:,} of {part.found.records:,} in {visible_line(part.name)}" for part in over)
        most = max(part.bad.count for part in over)
        raise CheckpointError(
            f"bad records: {found}; --skip-bad allows {allowed:,} of each source: correct them, "
            f"or leave them out with --skip-bad {most}"
        )


def _check_page(path: Path, overwrite: bool, sources: Sequence[str]) -> None:
    from qlora_lite.checkpoints.atomic_folder import check_output_is_not_input
    from qlora_lite.checkpoints.files import check_writable

    check_writable(path, ".html", overwrite)
    check_output_is_not_input(path, *input_paths(sources))


def _tokenized(console: Console, model: str, options: Mapping[str, Any]) -> tuple[TokenizedSet, Any, int | None]:
    """Returns the records of the command, the model's tokenizer and its longest sequence.

    Prints the bad records before it raises NothingToLearn.
    """
    from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer, read_config
    from qlora_lite.data.images.processor import ImageProcessor
    from qlora_lite.data.tokenization import NothingToLearn, tokenize_sources
    from qlora_lite.positions import longest_sequence

    config = replace(data_config(options), skip_bad=ALL)
    folder = checkpoint_folder(model, weights=False)
    tokenizer, longest = load_tokenizer(folder), longest_sequence(read_config(folder))
    try:
        with tokenizing_progress() as show:
            sources, cache = options["sources"], options["token_cache"]
            tokenized = tokenize_sources(sources, tokenizer, config, cache, show, ImageProcessor(model))
    except NothingToLearn as error:
        _print_bad(console, error.parts)
        raise
    return tokenized, tokenizer, longest


def data(
    ctx: typer.Context,
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE...", help=SOURCES_HELP)],
    model: Model,
    field: Fields = None,
    limit: Limit = None,
    skip_bad: SkipBad = 0,
    learn: Learn = "answers",
    learn_empty_reasoning: LearnEmptyReasoning = False,
    max_length: MaxLength = 512,
    token_cache: TokenCache = True,
    show: Annotated[
        int | None,
        typer.Option(help="Examples to show, spread evenly over all. Default: 3, and 20 on the page of --html."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="HTML file to write, with all of it: data.html.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file of --html.")] = False,
    json: Json = False,
) -> None:
    """Show what is learned from records: figures, lengths, all bad records, and examples with the learned text marked.

    Nothing is trained. With more bad records than --skip-bad the exit status is 1, after all is shown.
    """
    from rich.console import Console

    from qlora_lite.checkpoints.files import new_file
    from qlora_lite.checks import is_count, require
    from qlora_lite.data.listing import bad_lines, page, shown_examples
    from qlora_lite.data.summary import summarize

    require(show is None or is_count(show, 0), "--show must be an integer of at least 0", show)
    data_config(ctx.params)
    if html is not None:
        _check_page(html, overwrite, sources)
    console = Console()
    tokenized, tokenizer, longest = _tokenized(console, model, ctx.params)
    summary = summarize(tokenized, longest)
    shown = shown_examples(tokenized, tokenizer, SHOWN if show is None else show)
    _print_summary(console, summary)
    _print_bad(console, tokenized.parts)
    _print_examples(console, shown, summary.examples)
    if html is not None:
        on_page = shown_examples(tokenized, tokenizer, SHOWN_ON_PAGE) if show is None else shown
        title = f"What {model} learns from {', '.join(sources)}"
        text = page(summary, bad_lines(tokenized.parts), on_page, title)
        with new_file(html, overwrite) as file:
            file.write(text.encode())
    if json:
        print(_as_json(tokenized, summary, None if show is None else shown))
    _check_bad(tokenized.parts, skip_bad)
