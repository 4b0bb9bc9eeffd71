"""Tables on a terminal of any width: side by side where they fit, else one figure a line."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

_ANY_WIDTH = 10_000


@dataclass(frozen=True)
class Column:
    """A heading; without one the column is left out where the table does not fit."""

    heading: str
    figures: bool = True  # to the right


def show(
    console: "Console", title: str, columns: Sequence[Column], rows: Iterable[Sequence[str | Text]]
) -> None:
    """Print a table. No figure is ever cut: a narrow terminal gets a list instead."""
    cells = [[_text(cell) for cell in row] for row in rows]
    table = Table(title=title or None, title_justify="left", title_style="bold")
    table.box, table.padding = None, (0, 2, 0, 0)
    for column in columns:
        justify = "right" if column.figures else "left"
        table.add_column(column.heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in cells:
        table.add_row(*row)
    options = console.options.update(max_width=_ANY_WIDTH)
    if Measurement.get(console, options, table).maximum <= console.width:
        console.print(table)
        return
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    for first, *others in cells:
        named = f"{columns[0].heading} " if columns[0].figures else ""
        console.print(Text.assemble(named, first), soft_wrap=True)
        for column, cell in zip(columns[1:], others, strict=True):
            if column.heading and cell:
                console.print(Text.assemble(f"  {column.heading}: ", cell), soft_wrap=True)


def _text(cell: str | Text) -> Text:
    return Text(cell) if isinstance(cell, str) else cell
