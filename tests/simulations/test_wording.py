"""Numbers and names as people read them."""

import doctest
from dataclasses import replace

import pytest

from common import statements
from simulations import wording
from simulations.result import Achieved, Comparison, SimulationResult, Spread
from simulations.wording import duration, epsilon_text, number, percent, plain, spread_text


def test_examples() -> None:
    """The examples in the docstrings hold."""
    outcome = doctest.testmod(wording)
    assert outcome.attempted > 5
    assert outcome.failed == 0


def test_an_epsilon_has_an_example() -> None:
    """It lies with the sentences that the card is made of too."""
    (found,) = doctest.DocTestFinder().find(statements.epsilon_text, globs=vars(statements))
    assert found.examples
    assert doctest.testmod(statements).failed == 0


@pytest.mark.parametrize("value", [0.98201, 0.0012345678, 7.0, 99.999, 123456.7])
def test_epsilon_is_never_rounded_down(value: float) -> None:
    """A written epsilon is at least the real one, and at most a thousandth above."""
    assert value <= float(epsilon_text(value)) <= value * 1.001


def test_missing_numbers() -> None:
    """What is not a finite number is a dash, and a missing error is left away."""
    nan = float("nan")
    assert {number(None), number(nan), percent(None), percent(nan)} == {wording.NOTHING}
    assert spread_text(Spread(nan, nan)) == wording.NOTHING
    assert spread_text(Spread(0.5, nan)) == "0.500"
    assert percent(0.5, nan) == "50.0 %"
    assert (number(0.0), epsilon_text(0.0)) == ("0", "0")


def test_lone_surrogate_can_be_written() -> None:
    """A name that is no valid Unicode can still be encoded, and a line break is a space."""
    assert plain("a\ud800\nb").encode() == "a\ufffd b".encode()


def test_almost_a_minute() -> None:
    """Rounding carries into minutes."""
    assert (duration(59.94), duration(59.96)) == ("59.9 s", "1 min 0 s")


def test_missing_accuracy(shop_comparison: Comparison) -> None:
    """A method whose accuracy is missing is not weighed."""
    nothing = Spread(float("nan"), float("nan"))
    rows = tuple(replace(row, accuracy=nothing) for row in shop_comparison.rows)
    told = wording.verdict(replace(shop_comparison, rows=rows))
    assert all("cannot be weighed" in sentence for sentence in told)


class TestStatements:
    """The sentences that every result carries about its sums."""

    @pytest.mark.parametrize("mode", ["distributed", "local"])
    def test_masked_sums_are_described_with_their_limits(self, mode: str) -> None:
        """How many merchants at least, against whom, and that epsilon is the same."""
        said = statements.sums_statement(mode, secure=True, merchants=1234)
        for part in (
            "were masked",
            "at least 1,234 merchants",
            "fewer than a third of the merchants",
            "same epsilon holds towards the coordinator",
        ):
            assert part in said
        assert "{" not in said
        assert ("table of colluders" in said) is (mode == "distributed")

    @pytest.mark.parametrize("mode", ["distributed", "local"])
    def test_plain_sums_are_described_as_such(self, mode: str) -> None:
        """Nothing of masks."""
        said = statements.sums_statement(mode, secure=False, merchants=90)
        assert said == statements.NOT_MASKED[mode]
        assert "were not masked" in said


class TestSums:
    """What a result says of its sums."""

    def test_masked(self, large_result: SimulationResult) -> None:
        """An assurance and no warning of the server."""
        assert "over at least 2 merchants" in wording.assurance(large_result)
        assert wording.headline(large_result).endswith("allowed, towards the server too.")
        assert not [caution for caution in wording.cautions(large_result) if caution.grave]

    def test_plain(self, small_result: SimulationResult) -> None:
        """A grave warning and no assurance."""
        assert wording.assurance(small_result) == ""
        assert wording.headline(small_result).endswith("towards whoever sees sums only.")
        assert [caution.title for caution in wording.cautions(small_result)] == [
            "The sums were not masked"
        ]

    def test_equal_sums_are_counted_once(self, small_result: SimulationResult) -> None:
        """No range where every sum held as many."""
        result = replace(small_result, achieved=Achieved(0.9, 3, 3))
        assert "of 3 merchants a sum" in wording.collusion(result)
