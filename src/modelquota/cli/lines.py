"""A table with one line for each row, fast for tens of thousands of rows: rich's own takes a millisecond for each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment

__all__ = ["Column", "Lines"]

_GAP = "  "


@dataclass(frozen=True, slots=True)
class Column:
    """A heading and the texts below it; numbers are aligned to the right.

    If there is not enough room, only columns with `cut` are narrowed, and their texts end in an ellipsis: a number that
    is cut would read as another one. `style` returns the name of a text's style; `most` is the greatest width.
    """

    heading: str
    texts: Sequence[str]
    style: Callable[[int], str] = lambda row: ""
    right: bool = False
    cut: bool = False
    most: int | None = None


class Lines:
    """Columns of equal length, for a console."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self._columns = columns

    def texts(self, room: int) -> Iterator[str]:
        """Yield the heading and the rows, `room` columns wide at most, without styles."""
        return map(_GAP.join, zip(*self._fitted(room), strict=True))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if console.color_system is None:
            for line in self.texts(options.max_width):
                yield Segment(line)
                yield Segment.line()
            return
        dim = console.get_style("dim")
        for row, cells in enumerate(zip(*self._fitted(options.max_width), strict=True), start=-1):
            for place, (column, cell) in enumerate(zip(self._columns, cells, strict=True)):
                if place:
                    yield Segment(_GAP)
                yield Segment(cell, dim if row < 0 else console.get_style(column.style(row)))
            yield Segment.line()

    def _fitted(self, room: int) -> Iterator[Sequence[str]]:
        """Yield the heading and texts of each column, all of one width."""
        columns = [[column.heading, *column.texts] for column in self._columns]
        # in plain ASCII, such as numbers, each character is one column wide
        sizes = [len if "".join(texts).isascii() else cell_len for texts in columns]
        widest = [max(map(size, texts)) for size, texts in zip(sizes, columns, strict=True)]
        widths = [
            width if column.most is None else min(width, column.most)
            for width, column in zip(widest, self._columns, strict=True)
        ]
        over = sum(widths) + len(_GAP) * (len(widths) - 1) - room
        cut = [place for place, column in enumerate(self._columns) if column.cut]
        while over > 0 and cut and max(widths[place] for place in cut) > 1:
            widths[max(cut, key=widths.__getitem__)] -= 1
            over -= 1
        for place, (column, texts, width) in enumerate(zip(self._columns, columns, widths, strict=True)):
            if sizes[place] is not len or widest[place] > width:
                yield [_fit(text, width, right=column.right) for text in texts]
            elif column.right:
                yield [text.rjust(width) for text in texts]
            else:
                yield [text.ljust(width) for text in texts]


def _fit(text: str, width: int, *, right: bool) -> str:
    size = cell_len(text)
    if size > width:
        text = set_cell_size(text, width - 1) + "…"
        size = width
    return " " * (width - size) + text if right else text + " " * (width - size)
