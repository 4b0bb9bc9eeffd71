"""Customers out of a textbook, drawn from a contract alone: no customer was looked at for them.

"Buy till you die": a customer buys at a rate of its own until it is lost for good (Schmittlein,
Morrison and Colombo 1987, "Counting your customers: who are they and what will they do next?"),
and spends an amount of its own a purchase (Fader, Hardie and Lee 2005, "RFM and CLV"). How often,
how long and how much is drawn anew for every shop, from ranges so wide that most shops on earth
lie within. The scale of money is the contract's: its public bound of the spend.

The ranges below were written down before anything was measured, and are not to be tuned: what is
chosen by looking at customers must be paid for out of their budgets. Unlike
`simulations.synthetic`, nothing here follows figures of any data set.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64

from clients.features import encode_values
from clients.transactions import behaviour
from common.contract import Contract, Feature, Windows
from common.errors import ContractError
from simulations.labelling import segments, windows_of

SHOPS = 300
CUSTOMERS = 200  # who come to a shop; those who buy nothing in the feature window are left out

PURCHASES_A_YEAR = (1.0, 40.0)  # of a shop's average customer, as long as it is one
RATE_SHAPE = (0.3, 3.0)  # of the gamma distribution of rates in a shop; small: few buy most
YEARS = (0.25, 5.0)  # for which a shop's average customer stays
LIFE_SHAPE = (0.5, 3.0)  # of the gamma distribution of the rates at which customers are lost
PURCHASE_OF_BOUND = (1 / 2000, 1 / 40)  # a shop's typical purchase, in parts of the spend's bound
CUSTOMER_SD = (0.3, 1.0)  # of the log of customers' typical purchases
PURCHASE_SD = (0.3, 1.0)  # of the log of one customer's purchases
EARLIER_YEARS = 2.0  # in which those came who were there before the feature window
MOST_A_YEAR = 400.0

_DAYS_A_YEAR = 365.25
_WITHOUT_CATEGORIES = frozenset(
    {
        "recency_days",
        "tenure_days",
        "purchases",
        "spend",
        "mean_purchase",
        "weekend_share",
        "evening_share",
        "mean_gap_days",
        "spend_last",
        "purchases_last",
    }
)

Vector = Float[np.ndarray, " C"]


@dataclass(frozen=True)
class Textbook:
    """Generated customers, as a model sees them (R rows)."""

    x: Float[np.ndarray, "R F"]  # 0 where the generator knows nothing
    y: Int64[np.ndarray, " R"]
    shop: Int64[np.ndarray, " R"]
    unknown: tuple[str, ...]  # features of which the generator knows nothing
    unknown_inputs: tuple[int, ...]  # the inputs that they become


def known(feature: Feature) -> bool:
    """Tell whether a feature can be computed from purchases that have a time and an amount."""
    measure = (feature.measure or "").partition(":")[0]
    return feature.kind == "number" and measure in _WITHOUT_CATEGORIES


def check_generable(contract: Contract) -> None:
    """Refuse a contract whose features or segments mean what purchases do not tell.

    Raises:
        ContractError: Says which key is missing.
    """
    name = contract.federation.name
    windows_of(contract)
    if len(contract.segments.cuts) != len(contract.segments.names) - 1:
        raise ContractError(
            f"{name}: segments.cuts: customers can be generated only where segments are cut from "
            "the spend in the label window; a column of a table may mean anything"
        )
    if not any(map(known, contract.features)):
        raise ContractError(
            f"{name}: features: none has a `measure` of purchases' times and amounts, so that "
            "generated customers would know nothing of any"
        )


def customers(contract: Contract, seed: int) -> Textbook:
    """Generate customers of many shops, with features and segments as the contract defines them.

    Raises:
        ContractError: As `check_generable`.
    """
    check_generable(contract)
    purchases, shop = _purchases(contract, np.random.default_rng([seed, 0x7E87B00C]))
    windows = windows_of(contract)
    measured = [feature for feature in contract.features if known(feature)]
    rows = behaviour(purchases, windows.features, measured)
    labels = segments(purchases, contract, rows.index)[contract.segments.column]
    unknown = [feature for feature in contract.features if not known(feature)]
    for feature in unknown:
        rows[feature.name] = feature.categories[0] if feature.categories else feature.low
    x, inputs = encode_values(rows, contract), _inputs(contract.features, unknown)
    x[:, list(inputs)] = 0.0
    names = tuple(feature.name for feature in unknown)
    return Textbook(x, labels, shop[rows.index.to_numpy()], names, inputs)


def _inputs(features: Sequence[Feature], wanted: Sequence[Feature]) -> tuple[int, ...]:
    """Return the places of the model's inputs that some features become."""
    places, first = list[int](), 0
    for feature in features:
        if feature in wanted:
            places += range(first, first + feature.width)
        first += feature.width
    return tuple(places)


def _purchases(
    contract: Contract, random: np.random.Generator
) -> tuple[pd.DataFrame, Int64[np.ndarray, " C"]]:
    """Draw all purchases from the start of the feature window to the end of the label window.

    Returns:
        Columns `customer` (a number), `time` and `amount`; and every customer's shop.
    """
    begin, end, window = _days(windows_of(contract))
    shop = np.repeat(np.arange(SHOPS), CUSTOMERS)
    born, lost = _lives(shop, begin, window, random)
    rate = _gamma_of_shops(shop, PURCHASES_A_YEAR, RATE_SHAPE, random).clip(max=MOST_A_YEAR)
    first, last = np.maximum(born, begin), np.minimum(lost, end)
    span = np.maximum(last - first, 0.0)
    count = random.poisson(rate * span / _DAYS_A_YEAR)
    came = np.flatnonzero((born >= begin) & (born < end))  # whoever comes, comes to buy
    customer = np.concatenate([np.repeat(np.arange(len(shop)), count), came])
    day = first[customer] + span[customer] * random.random(len(customer))
    day[len(day) - len(came) :] = born[came]
    typical = _loguniform(PURCHASE_OF_BOUND, SHOPS, random)[shop] * _spend_bound(contract)
    spread, own = (random.uniform(*of, SHOPS)[shop] for of in (CUSTOMER_SD, PURCHASE_SD))
    level = np.log(typical) + spread * random.normal(size=len(shop))
    amount = np.exp(level[customer] + own[customer] * random.normal(size=len(customer)))
    epoch = np.datetime64("1970-01-01", "s")
    table = pd.DataFrame(
        {
            "customer": customer,
            "time": epoch + (day * 86_400).astype("timedelta64[s]"),
            "amount": np.maximum(np.round(amount, 2), 0.01),
        }
    )
    return table, shop


def _lives(
    shop: Int64[np.ndarray, " C"], begin: float, window: float, random: np.random.Generator
) -> tuple[Vector, Vector]:
    """Draw on which day customers came, some before the feature window, and are lost."""
    new = random.random(SHOPS)[shop]  # share of a shop's customers who come within the window
    inside = random.random(len(shop)) < new
    earlier = -EARLIER_YEARS * _DAYS_A_YEAR * random.random(len(shop))
    born = begin + np.where(inside, window * random.random(len(shop)), earlier)
    years = _loguniform(YEARS, SHOPS, random)[shop]
    shape = _loguniform(LIFE_SHAPE, SHOPS, random)[shop]
    hazard = random.gamma(shape, 1.0 / (shape * years))
    life = random.exponential(size=len(shop)) / np.maximum(hazard, 1e-9) * _DAYS_A_YEAR
    return born, born + np.minimum(life, 1e6)


def _gamma_of_shops(
    shop: Int64[np.ndarray, " C"],
    means: tuple[float, float],
    shapes: tuple[float, float],
    random: np.random.Generator,
) -> Vector:
    mean, shape = (_loguniform(of, SHOPS, random)[shop] for of in (means, shapes))
    rates: Vector = random.gamma(shape, mean / shape)
    return rates


def _loguniform(
    between: tuple[float, float], count: int, random: np.random.Generator
) -> Float[np.ndarray, " K"]:
    low, high = map(math.log, between)
    found: Float[np.ndarray, " K"] = np.exp(random.uniform(low, high, count))
    return found


def _days(windows: Windows) -> tuple[float, float, float]:
    """Return the first day, the day after the last, and the length of the feature window."""
    begin = float(_day(windows.features[0]))
    return begin, float(_day(windows.label[1])), float(_day(windows.features[1])) - begin


def _day(of: date) -> int:
    return (of - date(1970, 1, 1)).days


def _spend_bound(contract: Contract) -> float:
    """Return how much a customer spends at most, as the contract says in public."""
    bounds = [f.high for f in contract.features if (f.measure or "").startswith("spend")]
    return max(bounds, default=20 * max(*contract.segments.cuts, 1.0))
