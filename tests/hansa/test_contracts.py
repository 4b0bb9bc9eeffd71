"""The ready contracts: secure sums, and a ring that fits the set."""

import pytest

from common.contract import Contract
from common.plan import plan_of
from simulations.catalogue import CATALOGUE
from simulations.datasets import ready_contract, ready_contracts

SIZES = {
    "complete-journey-store": 5_846,
    "complete-journey-home": 2_420,
    "cdnow": 23_570,
    "synthetic": 108_000,
}


def size_of(name: str) -> int:
    """Return the published number of customers of a contract's data set."""
    return next(size for start, size in SIZES.items() if name.startswith(start))


@pytest.fixture(params=ready_contracts())
def ready(request: pytest.FixtureRequest) -> tuple[str, Contract]:
    """Give every ready contract by name."""
    return request.param, ready_contract(request.param)


def test_sums_are_secure(ready: tuple[str, Contract]) -> None:
    """By default, which no ready contract spells out or turns off."""
    assert ready[1].aggregation.secure


def test_the_ring_has_room_for_about_ten_times_the_customers(
    ready: tuple[str, Contract],
) -> None:
    """A public bound: neither so tight that it tells the number nor so wide that noise suffers."""
    name, contract = ready
    assert 9 <= contract.aggregation.max_customers / size_of(name) <= 11


def test_the_published_sizes_are_those_of_the_catalogue() -> None:
    """So that the bounds follow the sets."""
    published = {rows for entry in CATALOGUE for rows in entry.rows.values()}
    assert set(SIZES.values()) <= published


def test_rounding_costs_little_noise(ready: tuple[str, Contract]) -> None:
    """At most 1.3 % of the largest vector's noise, of the real-world sets at most 0.4 %."""
    name, contract = ready
    for release in plan_of(contract).releases():
        cost = release.sensitivity / release.event.sensitivity - 1.0
        assert cost <= (0.013 if name.startswith("synthetic") else 0.004)
