"""The tables and sentences of the terminal."""

import io
from dataclasses import replace

from rich.console import Console, RenderableType

from common import statements
from simulations.result import Comparison, SimulationResult
from simulations.tables import (
    comparison_lines,
    comparison_table,
    merchants_table,
    sizes_table,
    summary_lines,
)
from simulations.wording import NOTHING


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

    def test_masked_sums_tell_nothing_of_single_messages(
        self, masked_result: SimulationResult
    ) -> None:
        """Neither an epsilon towards the server nor a noisy accuracy has a column."""
        table = merchants_table(masked_result)
        headings = [str(column.header) for column in table.columns]
        assert headings == ["Merchant", "Customers", "Epsilon", "Delta", "Refused because"]
        text = _printed(table)
        assert NOTHING not in text
        assert "towards the server" not in text
        assert "its own cap of 0.5 would be passed" in text

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
        """A masked run has no red line; it says what masking gives, and that it was seeded."""
        lines = summary_lines(large_result)
        assert not [line for line in lines if "red" in str(line.style)]
        said = statements.sums_statement("distributed", secure=True, merchants=2)
        assert [str(line.style) for line in lines if line.plain == said] == [""]
        text = "\n".join(line.plain for line in lines)
        assert "0.982 towards whoever sees sums, the server included" in text
        assert "not masked" not in text
        assert any("not for release" in line.plain for line in lines)

    def test_plain_sums_do_not_claim_masks(self, small_result: SimulationResult) -> None:
        """The epsilon towards the server is a figure of its own."""
        text = "\n".join(line.plain for line in summary_lines(small_result))
        assert "1.413 towards the server" in text
        assert "were masked" not in text
        assert "included" not in text

    def test_colluders_are_one_line(self, small_result: SimulationResult) -> None:
        """What was achieved and what colluders leave, rounded up."""
        found = [line.plain for line in summary_lines(small_result) if "Collud" in line.plain]
        assert found == [
            "Colluders epsilon 0.981 by the noise of 2 to 3 merchants a sum, "
            "1.398 if 1 colludes, unbounded if 2 collude"
        ]

    def test_own_noise_fears_no_colluders(self, small_result: SimulationResult) -> None:
        """In mode local colluders leave everything."""
        contract = small_result.contract.revised(training={"mode": "local"})
        lines = summary_lines(replace(small_result, contract=contract))
        assert any("epsilon 0.981 whoever colludes" in line.plain for line in lines)

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

    def test_plain_sums_are_red(self, shop_comparison: Comparison) -> None:
        """And only they are; verdict and notes follow."""
        calm = comparison_lines(shop_comparison)
        assert not [line for line in calm if "red" in str(line.style)]
        assert calm[-1].plain == shop_comparison.notes[-1]
        lines = comparison_lines(replace(shop_comparison, secure=False))
        assert lines[0].style == "bold red"
        assert statements.NOT_MASKED_COMPARED in lines[0].plain
        assert lines[1:] == calm
