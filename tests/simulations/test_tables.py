"""The tables and sentences of the terminal."""

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from simulations.result import Comparison, SimulationResult
from simulations.tables import comparison_table, merchants_table, sizes_table, summary_lines


def _printed(renderable: RenderableType, width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


class TestMerchantsTable:
    """The table of merchants."""

    def test_few(self, small_result: SimulationResult) -> None:
        """All of a few merchants are listed, with why one refused."""
        text = _printed(merchants_table(small_result))
        assert "1,290" in text
        assert "60.2 ± 1.2 %" in text
        assert "its own cap of 0.5 would be passed" in text
        assert "they never travel" in text
        assert "not shown" not in text

    def test_nobody_refused(self, small_result: SimulationResult) -> None:
        """Where nobody refused there is no column for it."""
        result = replace(small_result, merchants=small_result.merchants[:2])
        assert len(merchants_table(result).columns) == 6

    def test_thousand(self, large_result: SimulationResult) -> None:
        """Of a thousand the ends and ten refusals are shown, and the rest is counted."""
        table = merchants_table(large_result)
        text = _printed(table)
        assert table.row_count == 20
        for shown in ("merchant-0001", "merchant-0005", "merchant-0999", "merchant-0225"):
            assert shown in text
        for hidden in ("merchant-0006", "merchant-0500", "merchant-0250"):
            assert hidden not in text
        assert "980 more merchants not shown; the report has all 1,000." in text

    def test_hostile_names(self, hostile_result: SimulationResult) -> None:
        """A name is neither markup nor an escape sequence."""
        text = _printed(merchants_table(hostile_result))
        assert "[red]" in text.replace("\n", "")
        assert "\x1b" not in text


class TestSummary:
    """The closing lines."""

    def test_not_masked_is_red(self, small_result: SimulationResult) -> None:
        """The warning that sums were not masked is bold red and names both epsilons."""
        red = [line.plain for line in summary_lines(small_result) if line.style == "bold red"]
        assert len(red) == 1
        assert "The sums were not masked" in red[0]
        assert "the epsilon is 1.413, not 0.982" in red[0]

    def test_own_noise(self, small_result: SimulationResult) -> None:
        """Where each merchant's own noise protects it from the server too, no contrast is made."""
        lines = summary_lines(replace(small_result, epsilon_server=small_result.epsilon))
        assert "the epsilon is 0.982." in lines[1].plain
        assert ", not" not in lines[1].plain

    def test_masked_is_calm(self, large_result: SimulationResult) -> None:
        """A masked run has no red line, and its seed is said."""
        lines = summary_lines(large_result)
        assert not [line for line in lines if "red" in str(line.style)]
        assert any("not for release" in line.plain for line in lines)

    def test_overspent(self, small_result: SimulationResult) -> None:
        """More than the cap, and accountants that disagree, are red."""
        result = replace(small_result, epsilon=1.2, epsilon_recomputed=1.4)
        red = [line.plain for line in summary_lines(result) if line.style == "bold red"]
        assert len(red) == 3

    def test_figures(self, small_result: SimulationResult) -> None:
        """The closing figures and the notes are there."""
        text = "\n".join(line.plain for line in summary_lines(small_result))
        for part in ("recomputed 0.9818", "58.7 ± 1.8 %", "2 took part, 1 refused", "8.3 s"):
            assert part in text
        assert small_result.notes[0] in text


class TestComparisonTables:
    """The tables of a comparison."""

    def test_methods(self, shop_comparison: Comparison) -> None:
        """Every method has its figures; one that does not exist is a dash."""
        table = comparison_table(shop_comparison)
        text = _printed(table)
        assert table.row_count == 9
        assert "Together, shared noise, ε 1" in text
        assert "0.811 ± 0.008" in text
        assert "nan" not in text
        assert "not private, not for release" in text

    def test_sizes(self, shop_comparison: Comparison) -> None:
        """Every merchant-size group is a column."""
        table = sizes_table(shop_comparison)
        assert [str(column.header) for column in table.columns[1:]] == list(shop_comparison.sizes)
        assert "0.547 ± 0.015" in _printed(table)
