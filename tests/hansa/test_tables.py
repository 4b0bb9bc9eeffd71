"""Tables on wide and narrow terminals."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from hansa.commands.tables import Column, show

COLUMNS = (Column("Run", figures=False), Column("Epsilon"), Column("", figures=False))
ROWS = (("2768c73120871673", "0.9834", "####"), ("[red]a", Text("none", style="red"), ""))


def shown(width: int) -> str:
    """Print the table to a terminal of this width."""
    console = Console(width=width, file=io.StringIO(), record=True)
    show(console, "Runs", COLUMNS, ROWS)
    return console.export_text()


def test_side_by_side_where_it_fits() -> None:
    """A heading, then a line a row; what looks like markup is shown as it is."""
    title, heading, first, second = shown(40).splitlines()
    assert title.strip() == "Runs"
    assert heading.split() == ["Run", "Epsilon"]
    assert first.split() == ["2768c73120871673", "0.9834", "####"]
    assert second.split() == ["[red]a", "none"]


@pytest.mark.parametrize("width", [30, 12])
def test_a_list_where_it_does_not_fit(width: int) -> None:
    """No figure is cut; the column without a heading is left out."""
    lines = shown(width).replace("\n", " ")
    assert lines.split() == [
        "Runs", "2768c73120871673", "Epsilon:", "0.9834", "[red]a", "Epsilon:", "none",
    ]  # fmt: skip


def test_a_first_figure_keeps_its_heading() -> None:
    """Else nobody knows what it counts."""
    console = Console(width=12, file=io.StringIO(), record=True)
    show(console, "", [Column("After round"), Column("Epsilon")], [("4", "0.2235")])
    assert console.export_text().splitlines() == ["After round 4", "  Epsilon: 0.2235"]
