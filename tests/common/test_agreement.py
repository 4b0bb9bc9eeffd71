"""Agreement of what is claimed with privacy-loss distributions, from hard to easy settings."""

import itertools
from functools import cache

import pytest

from audit.epsilon import DP_ACCOUNTING, OPACUS, opinions
from common.accounting import Assessment, assess, rdp_upper_bound, within
from common.events import Event, GaussianSum, PoissonGaussianSum, to_document

CUSTOMERS = (200, 5_000, 50_000, 1_000_000)
RATES = (0.005, 0.05, 0.4, 1.0)
NOISE = (0.5, 2.0, 8.0, 50.0)
STEPS = (1, 40, 1_000, 10_000)
# every rate with every noise and every number of steps; each with one number of customers
GRID = [
    (CUSTOMERS[sum(place) % 4], RATES[place[0]], NOISE[place[1]], STEPS[place[2]])
    for place in itertools.product(range(4), repeat=3)
]
QUICK = [(5_000, 0.05, 2.0, 1_000), (200, 0.4, 8.0, 40), (1_000_000, 0.005, 0.5, 40)]
MIXED = [GaussianSum(40.0, 1.0, 10), GaussianSum(12.0, 1.0, 2)]


def events_of(setting: tuple[int, float, float, int]) -> list[Event]:
    """Return the sampled sums of a setting, those of 40 steps among other sums."""
    _, rate, sigma, steps = setting
    return [PoissonGaussianSum(sigma, 1.0, rate, steps), *(MIXED if steps == 40 else [])]


@cache
def opinions_on(
    setting: tuple[int, float, float, int],
) -> tuple[Assessment, dict[str, float | str]]:
    """Return what is claimed and what the auditor's libraries say."""
    events, delta = events_of(setting), setting[0] ** -1.1
    return assess(events, delta), opinions([to_document(event) for event in events], delta)


def check(setting: tuple[int, float, float, int]) -> None:
    """The claim is within 2 % of the auditor's PLD, or larger and with a note that says so."""
    claimed, said = opinions_on(setting)
    pld = said[DP_ACCOUNTING]
    assert isinstance(pld, float), pld
    if abs(claimed.epsilon - pld) > 0.02 * max(claimed.epsilon, pld):
        assert claimed.epsilon > pld
        assert claimed.notes
    for name, opinion in claimed.opinions.items():
        if isinstance(opinion, str):
            assert any(note.startswith(name) for note in claimed.notes)


def test_grid_is_large_enough() -> None:
    """At least sixty settings, and each bound of each range is among them."""
    assert len(set(GRID)) >= 60
    for column, values in enumerate((CUSTOMERS, RATES, NOISE, STEPS)):
        assert {setting[column] for setting in GRID} == set(values)


@pytest.mark.parametrize("setting", QUICK, ids=str)
def test_quick_settings(setting: tuple[int, float, float, int]) -> None:
    """Three settings of every day."""
    check(setting)
    assert opinions_on(setting)[0].notes == ()


@pytest.mark.slow
@pytest.mark.parametrize("setting", GRID, ids=str)
def test_grid(setting: tuple[int, float, float, int]) -> None:
    """Claim and distributions agree within 2 %, or the larger is claimed and a note says so."""
    check(setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", GRID, ids=str)
def test_bounds_hold(setting: tuple[int, float, float, int]) -> None:
    """The claim is not below the Opacus of the auditor less its error, nor above Renyi."""
    claimed, said = opinions_on(setting)
    events, delta = events_of(setting), setting[0] ** -1.1
    opacus = said[OPACUS]
    if isinstance(opacus, float):
        assert claimed.epsilon >= opacus * 0.98 - 0.01
    bound = rdp_upper_bound(events, delta)
    assert claimed.epsilon <= bound * 1.001 or claimed.notes
    assert within(events, delta, claimed.epsilon)[0]


@pytest.mark.slow
def test_notes_are_rare() -> None:
    """Notes appear where epsilon is next to nothing, or useless; nowhere between."""
    noted = [opinions_on(setting)[0] for setting in GRID if opinions_on(setting)[0].notes]
    assert len(noted) <= 12
    assert all(claimed.epsilon < 0.03 or claimed.epsilon > 500 for claimed in noted)
