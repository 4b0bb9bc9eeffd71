"""Numbers and names as people read them."""

import doctest
from dataclasses import replace

import pytest

from simulations import wording
from simulations.result import Comparison, Spread
from simulations.wording import duration, epsilon_text, number, percent, plain, spread_text


def test_examples() -> None:
    """The examples in the docstrings hold."""
    outcome = doctest.testmod(wording)
    assert outcome.attempted > 5
    assert outcome.failed == 0


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
