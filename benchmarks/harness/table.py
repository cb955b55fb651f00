"""Tables for a terminal: drawn by rich where it is installed, plain text otherwise."""

import io
import re
from collections.abc import Sequence

BAD = re.compile(r"\b(NO|WORSE)\b")
FIGURE = re.compile(r"[-+]?[\d,.]+( \S+| %)?")
LEAST_WIDTH = 150


def draw(
    headings: Sequence[str], lines: Sequence[Sequence[str]], *, title: str = "", colour: bool = False, width: int = 0
) -> str:
    """Return the table as text. `width` is that of the terminal in columns, 0 where it is not known."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return plain(headings, lines, title=title)
    return _rich(headings, lines, title, colour, width)


def plain(headings: Sequence[str], lines: Sequence[Sequence[str]], *, title: str = "") -> str:
    """Return the table as plain text, a line a row; columns of figures are set to the right."""
    widths = [max(len(line[i]) for line in (headings, *lines)) for i in range(len(headings))]
    right = _figure_columns(lines, len(headings))
    text = [
        "  ".join(cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in (headings, *lines))
    ]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in ([title, *text] if title else text)) + "\n"


def _figure_columns(lines: Sequence[Sequence[str]], count: int) -> set[int]:
    columns = [[line[i] for line in lines if line[i]] for i in range(count)]
    return {i for i, cells in enumerate(columns) if cells and all(FIGURE.match(cell) for cell in cells)}


def _rich(headings: Sequence[str], lines: Sequence[Sequence[str]], title: str, colour: bool, width: int) -> str:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    right = _figure_columns(lines, len(headings))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i in right else "left", overflow="fold")
    previous = ""
    for line in lines:
        if line[0] != previous and previous:
            table.add_section()
        first = "" if line[0] == previous else line[0]
        previous = line[0]
        table.add_row(*(Text(cell, style="bold red" if BAD.search(cell) else "") for cell in (first, *line[1:])))
    console = Console(
        file=io.StringIO(), force_terminal=colour, no_color=not colour, width=max(width, LEAST_WIDTH), highlight=False
    )
    console.print(table)
    return console.file.getvalue()
