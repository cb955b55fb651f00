"""`modelquota docs`: the topics of the documentation, which are files of the package."""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from importlib.resources import files
from typing import Annotated, ClassVar

import typer
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, TableElement
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from modelquota.cli.errors import unusable

__all__ = ["add_commands", "read_topic", "topics"]

# Longer lines of prose are hard to read, and no code in the topics is wider.
MAX_WIDTH = 120
_GAP = "  "

_LINK = re.compile(r"\[\w+\]\((\w+)\.md\)")


def topics() -> dict[str, str]:
    """Return one line on what each topic is about, by the topic's name, in alphabetical order."""
    found = (item.name.removesuffix(".md") for item in files("modelquota.docs").iterdir() if item.name.endswith(".md"))
    return {topic: read_topic(topic).partition("\n")[0].partition(": ")[2] for topic in sorted(found)}


def read_topic(topic: str) -> str:
    """Return the Markdown of a topic."""
    return files("modelquota.docs").joinpath(f"{topic}.md").read_text(encoding="utf-8")


def add_commands(app: typer.Typer) -> None:
    """Add the command to an application."""

    @app.command("docs")
    def docs(
        topic: Annotated[
            str | None,
            typer.Argument(metavar="[TOPIC]", help="What to read; without it, all topics.", autocompletion=_complete),
        ] = None,
    ) -> None:
        """Read the documentation: list its topics, or show one.

        On a terminal a topic is shown with colors, as wide as the terminal. Otherwise the original Markdown is printed,
        so that code can be copied out of it.

        **Exit code**: 0; 2 if the topic does not exist.
        """
        console = Console()
        known = topics()
        if topic is None:
            _list(console, known)
        elif topic not in known:
            raise unusable(Console(stderr=True), _unknown(topic, list(known)))
        elif console.is_terminal:
            # a reader can use the name of another topic here, but not the name of its file
            text = _LINK.sub(r"`modelquota docs \1`", read_topic(topic))
            console.print(_Topic(text, hyperlinks=False), width=min(console.width, MAX_WIDTH))
        else:
            print(read_topic(topic), end="")


def _complete(incomplete: str) -> Iterator[tuple[str, str]]:
    """Yield the topics that begin with `incomplete`, each with its line, for shell completion."""
    return ((topic, about) for topic, about in topics().items() if topic.startswith(incomplete))


def _list(console: Console, known: dict[str, str]) -> None:
    if not console.is_terminal:
        width = max(map(len, known))
        for topic, about in known.items():
            print(f"{topic:{width}}  {about}")
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    for topic, about in known.items():
        table.add_row(topic, Text(about))
    console.print(table)
    console.print("modelquota docs TOPIC shows one.", style="dim", highlight=False)


def _unknown(topic: str, known: list[str]) -> str:
    given = topic.lower()
    near = [name for name in known if given and name.startswith(given)] or get_close_matches(given, known, cutoff=0.5)
    hint = f"perhaps {' or '.join(near)}" if near else f"one of {', '.join(known)}"
    return f"there is no topic {topic!r}; expected {hint}"


class _LeftHeading(Heading):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text.copy()
        text.justify = "left"
        yield text


class _PlainCode(CodeBlock):
    """Code in the terminal's own colors and without a margin, so that it can be selected and pasted."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip(), self.lexer_name, theme="ansi_dark", word_wrap=True)


class _FoldedTable(TableElement):
    """A table that loses no letter: if its columns would have to be narrower than their words, it is a list."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        header = None if self.header is None else self.header.row
        if header is None or self.body is None:
            return
        headings = [cell.content for cell in header.cells]
        rows = [[cell.content for cell in row.cells] for row in self.body.rows]
        columns = list(zip(headings, *rows, strict=True))
        least = [max(map(_longest_word, column)) for column in columns]
        spare = options.max_width - sum(least) - len(_GAP) * len(columns)
        if spare < 0:
            yield from _records(headings, rows)
            return
        wanted = [max(map(cell_len, (text.plain for text in column))) for column in columns]
        table = Table.grid(padding=(0, len(_GAP), 0, 0))
        for width in _spread(least, wanted, spare):
            table.add_column(width=width)
        table.add_row(*headings, style="dim")
        for row in rows:
            table.add_row(*row)
        yield table


def _spread(least: list[int], wanted: list[int], spare: int) -> list[int]:
    """Return widths of columns: each at least what it needs, and the rest for those that would fold most often."""
    widths = list(least)
    for _ in range(spare):
        folds = [most / width for most, width in zip(wanted, widths, strict=True)]
        if max(folds) > 1:
            widths[folds.index(max(folds))] += 1
    return widths


def _longest_word(text: Text) -> int:
    return max(map(cell_len, text.plain.split()), default=1)


def _records(headings: list[Text], rows: list[list[Text]]) -> Iterator[Text]:
    """Yield a line for each cell that is not empty, after its heading; the first cell of a row leads the others."""
    for number, row in enumerate(rows):
        if number:
            yield Text()
        for heading, cell in zip(headings, row, strict=True):
            if cell.plain:
                yield Text.assemble("" if heading is headings[0] else _GAP, (f"{heading.plain}: ", "dim"), cell)


class _Topic(Markdown):
    elements: ClassVar = {
        **Markdown.elements,
        "table_open": _FoldedTable,
        "heading_open": _LeftHeading,
        "fence": _PlainCode,
        "code_block": _PlainCode,
    }
