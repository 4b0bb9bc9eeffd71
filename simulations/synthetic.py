"""Generated customers: heavy-tailed, skewed, overlapping, with gaps; nobody behind a row.

A person shops at one or more merchants. At each, a hidden kind of customer (six, from
one-off to daily) gives the yearly purchases and the usual amount; purchases then fall on
days with seasons, weekends and an intermittent lifetime. Features and segments are computed
from the purchases by the same code that reads a merchant's own.

`calibration.json` holds sums and shares of Complete Journey, no row of it. The lean towards
the household's size is an assumption, not a measurement.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from clients.transactions import behaviour
from common.contract import Contract
from common.errors import DataError
from simulations.labelling import Values, segments, windows_of

BLOCK = 10_000  # customers generated at a time, unless one merchant has more
DAYS = 365
START = np.datetime64("2017-01-01", "s")  # a Sunday
MIN_PURCHASES = 2  # of a customer in the feature window
MAX_PURCHASES = 400  # a year
AMOUNTS = (0.25, 900.0)
EVERY_KIND = 0.05  # least part of a merchant's mix that is the overall mix
SIZE_LEAN = 0.3  # correlation of household size with the usual amount
MAX_MERCHANTS = 100_000


@dataclass(frozen=True)
class Recipe:
    """What to generate."""

    merchants: int
    customers: int  # of a merchant; the median where sizes vary
    size_sd: float = 0.0  # of the log of the merchants' sizes
    concentration: float = 57.0  # Dirichlet; smaller: merchants' mixes of kinds differ more
    shift: float = 1.0  # of merchants' log frequency and log amount, in measured deviations

    @property
    def expected(self) -> int:
        """About how many customers all merchants have together."""
        return round(self.merchants * self.customers * math.exp(self.size_sd**2 / 2))

    def __post_init__(self) -> None:
        """Refuse a recipe that gives no merchants or customers."""
        if not 1 <= self.merchants <= MAX_MERCHANTS:
            raise DataError(
                f"synthetic: expected 1 to {MAX_MERCHANTS} merchants, got {self.merchants}"
            )
        if self.customers < 1 or self.concentration <= 0 or self.size_sd < 0 or self.shift < 0:
            raise DataError(
                "synthetic: expected customers >= 1, concentration > 0, size_sd >= 0, shift >= 0"
            )


@cache
def calibration() -> dict[str, Any]:
    """Return the aggregates that the generator follows."""
    text = files("simulations").joinpath("calibration.json").read_text(encoding="utf-8")
    numbers: dict[str, Any] = json.loads(text)
    return numbers


PRESETS = {
    "smoke": Recipe(20, 50),
    "small": Recipe(100, 50),
    "default": Recipe(200, 500, size_sd=0.4),
    "wide": Recipe(1000, 1000),
    "large": Recipe(500, 2000),
    "xl": Recipe(1000, 10_000),
}
# Strength of the difference between merchants: (concentration, shift).
PARTITIONS = {"mild": (57.0, 1.0), "skewed": (5.0, 2.0), "extreme": (1.0, 3.0)}


@dataclass(frozen=True)
class Population:
    """All that is drawn before purchases. A place is one customer of one merchant."""

    sizes: Values  # customers of each merchant
    mixes: Values  # share of each kind at each merchant
    shifts: Values  # of log frequency and log amount at each merchant
    person: Values  # of each place, sorted by merchant
    household: Values  # of each person: size of the household, 0 where unstated
    lean: Values  # of each person: standard normal, behind household size and usual amount


def merchant_id(number: int) -> str:
    """Name the merchant with this number."""
    return f"merchant-{number:04d}"


def merchant_sizes(recipe: Recipe, seed: int) -> Values:
    """Draw the number of customers of each merchant."""
    random = np.random.default_rng([seed, 0])
    spread = np.exp(random.normal(0.0, recipe.size_sd, recipe.merchants))
    return np.maximum(1, np.round(recipe.customers * spread)).astype(np.int64)


def stream(recipe: Recipe, contract: Contract, seed: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Generate merchant after merchant, holding one block of purchases at a time.

    Args:
        recipe: How many, how large, how different.
        contract: Says windows, features and segments; the label does not change purchases.
        seed: Same seed, same tables.

    Yields:
        Merchant id and its table: `customer`, `person`, features, the segment and the
        previous one.
    """
    population = _populate(recipe, seed)
    ends = np.cumsum(population.sizes)
    first = 0
    while first < recipe.merchants:
        begin = int(ends[first] - population.sizes[first])
        last = max(int(np.searchsorted(ends, begin + BLOCK, side="right")), first + 1)
        random = np.random.default_rng([seed, 2, first])
        merchant = np.repeat(np.arange(first, last), population.sizes[first:last])
        person = population.person[begin : ends[last - 1]]
        rows = _block(population, contract, merchant, person, random)
        for number in range(first, last):
            start = int(ends[number] - population.sizes[number]) - begin
            own = rows.iloc[start : start + int(population.sizes[number])]
            customer = [f"customer-{place:05d}" for place in range(len(own))]
            yield merchant_id(number), own.reset_index(drop=True).assign(customer=customer)
        first = last


def _populate(recipe: Recipe, seed: int) -> Population:
    numbers = calibration()
    sizes = merchant_sizes(recipe, seed)
    random = np.random.default_rng([seed, 1])
    shares = np.array([kind["share"] for kind in numbers["kinds"]])
    shares = shares / shares.sum()
    mixes = random.dirichlet(recipe.concentration * shares, recipe.merchants)
    # A merchant of one-off customers alone would never find a customer who came back.
    mixes = (1 - EVERY_KIND) * mixes + EVERY_KIND * shares
    shifts = random.normal(size=(recipe.merchants, 2)) * numbers["merchant_sd"] * recipe.shift
    person = _people(sizes, random)
    lean = random.normal(size=int(person.max()) + 1).astype(np.float32)
    household = np.clip(np.round(2.4 + 1.1 * lean), 1, 6).astype(np.int8)
    household[random.random(len(household)) < numbers["unstated_share"]] = 0
    return Population(sizes, mixes, shifts, person, household, lean)


def _people(sizes: Values, random: np.random.Generator) -> Values:
    """Give every place a person, nobody twice at one merchant."""
    weights = np.array(calibration()["merchants_per_person"], dtype=float)
    ends, merchants = np.cumsum(sizes), len(sizes)
    places = int(ends[-1])
    counts = np.arange(1, len(weights) + 1, dtype=np.int8)
    each = np.minimum(
        random.choice(counts, places, p=weights / weights.sum()), min(merchants, len(weights))
    )
    people = int(np.searchsorted(np.cumsum(each, dtype=np.int64), places)) + 1
    person = np.repeat(np.arange(people, dtype=np.int32), each[:people])[:places]
    random.shuffle(person)
    for _ in range(5):
        twice = _twice(ends, person)
        if twice.size == 0:
            return person
        moved = np.unique(np.concatenate([twice, random.integers(0, places, twice.size)]))
        person[moved] = person[random.permutation(moved)]
    # With few merchants some cannot be moved apart: they become people of their own.
    twice = _twice(ends, person)
    person[twice] = people + np.arange(twice.size, dtype=np.int32)
    return person


def _twice(ends: Values, person: Values) -> Values:
    """Return the places whose person has another place at the same merchant; all but one."""
    found = [np.empty(0, dtype=np.int64)]
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        own = person[begin:end]
        if len(first := np.unique(own, return_index=True)[1]) < len(own):
            found.append(begin + np.setdiff1d(np.arange(len(own)), first))
    return np.concatenate(found)


def _block(
    population: Population,
    contract: Contract,
    merchant: Values,
    person: Values,
    random: np.random.Generator,
) -> pd.DataFrame:
    """Generate purchases of some places and turn them into rows."""
    windows = windows_of(contract)
    window = [_day(date) for date in windows.features]
    waiting = np.arange(len(merchant))
    parts = []
    # A customer who has not come back yet is no customer: draw those again.
    while waiting.size:
        place, day, amount = _purchases(
            population, merchant[waiting], population.lean[person[waiting]], random
        )
        inside = (day >= window[0]) & (day < window[1])
        regular = np.bincount(place[inside], minlength=len(waiting)) >= MIN_PURCHASES
        keep = regular[place]
        parts.append((waiting[place[keep]], day[keep], amount[keep]))
        waiting = waiting[~regular]
    place, day, amount = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    purchases = pd.DataFrame(
        {
            "customer": place,
            "time": START + (day * 86_400).astype("timedelta64[s]"),
            "amount": amount,
        }
    )
    places = pd.RangeIndex(len(merchant), name="customer")
    rows = behaviour(purchases, windows.features, contract.features).reindex(places)
    household = population.household[person].astype(float)
    rows["household_size"] = np.where(household > 0, household, np.nan)
    rows = rows[[feature.name for feature in contract.features]]
    rows = rows.assign(**segments(purchases, contract, places))
    rows.insert(0, "customer", "")
    rows.insert(1, "person", pd.Series(person).map("person-{:07d}".format).to_numpy())
    return rows


def _day(date: Any) -> int:
    return int((np.datetime64(date, "D") - START.astype("datetime64[D]")).astype(int))


def _purchases(
    population: Population, merchant: Values, lean: Values, random: np.random.Generator
) -> tuple[Values, Values, Values]:
    """Draw a year of purchases for each place: place, day (with its time) and amount."""
    kinds = calibration()["kinds"]
    places = len(merchant)
    steps = np.cumsum(population.mixes, axis=1)[merchant]
    kind = (random.random(places)[:, None] > steps).sum(axis=1).clip(max=len(kinds) - 1)
    root = np.linalg.cholesky(np.array([entry["covariance"] for entry in kinds]))
    normal = random.normal(size=(places, 2))
    normal[:, 1] = SIZE_LEAN * lean + np.sqrt(1 - SIZE_LEAN**2) * normal[:, 1]
    level = np.array([entry["mean"] for entry in kinds])[kind] + population.shifts[merchant]
    level += np.einsum("uij,uj->ui", root[kind], normal)
    often = np.clip(np.round(np.exp(level[:, 0])), 1, MAX_PURCHASES).astype(int)
    count = np.where(level[:, 0] < 0.35, 1, often)  # below: a one-off customer
    place = np.repeat(np.arange(places), count)
    day = _days(place, places, random)
    spread = np.array([entry["amount_sd"] for entry in kinds])[kind]
    amount = np.exp(level[place, 1] + random.normal(size=len(place)) * spread[place])
    return place, day, np.round(amount.clip(*AMOUNTS), 2)


def _days(place: Values, places: int, random: np.random.Generator) -> Values:
    """Draw the day of each purchase: a lifetime, seasons by week, weekends by customer."""
    numbers = calibration()
    shortest = numbers["shortest_life"]
    life = shortest + (1 - shortest) * random.random(places)
    life[random.random(places) < numbers["always_share"]] = 1.0
    start = random.random(places) * (1 - life) * numbers["latest_start"]
    week = np.array(numbers["week"]) / max(numbers["week"])
    count = len(place)
    day = (start[place] + life[place] * random.random(count)) * DAYS
    for _ in range(4):  # thin by drawing again what falls in a quiet week
        quiet = random.random(count) > week[np.minimum((day // 7).astype(int), len(week) - 1)]
        again = place[quiet]
        day[quiet] = (start[again] + life[again] * random.random(len(again))) * DAYS
    mean, weight = numbers["weekend"]
    weekender = random.beta(weight * mean, weight * (1 - mean), places)
    weekend = random.random(count) < weekender[place]
    # Days 6 and 7 after a Sunday are Saturday and Sunday.
    shift = np.where(weekend, random.integers(6, 8, count), random.integers(1, 6, count))
    return np.asarray((np.floor(day / 7) * 7 + shift + random.random(count)).clip(0, DAYS - 1e-3))
