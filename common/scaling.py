"""From a feature's natural units to the model's inputs in [-1, 1], and back.

Every formula uses the contract's public bounds alone, never a statistic of the customers:
both ends of the wire compute the same numbers without having seen a row.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from common.contract import Contract, Feature
from common.errors import ContractError

Elementwise = Callable[[Float[np.ndarray, "..."]], Float[np.ndarray, "..."]]

_TRANSFORMS: dict[str, tuple[Elementwise, Elementwise]] = {
    "none": (np.positive, np.positive),
    "log1p": (np.log1p, np.expm1),
    "sqrt": (np.sqrt, np.square),
}


@dataclass(frozen=True)
class Input:
    """One of the model's F inputs.

    Attributes:
        feature: Name of the contract's feature.
        label: What a person calls the input, like `age`, `plan = basic`, `age (missing)`.
        unit: Unit of a number; "share of customers" for every other kind.
        kind: `number`, `flag`, `category` (one of a one-hot group) or `missing` (indicator).
    """

    feature: str
    label: str
    unit: str
    kind: Literal["number", "flag", "category", "missing"]


@dataclass(frozen=True)
class Quantity:
    """A mean over customers in units that a person reads; `value` is None where unknown."""

    input: Input
    value: float | None


def inputs(contract: Contract) -> tuple[Input, ...]:
    """List the model's inputs in the order of the encoded columns."""
    return tuple(item for feature in contract.features for item in _inputs(feature))


def scale(feature: Feature, values: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
    """Clip a number to its public bounds, transform it and scale it to [-1, 1].

    Args:
        feature: A feature of kind `number`.
        values: Natural units; NaN stays NaN.

    Returns:
        `2 (t(x) - t(low)) / (t(high) - t(low)) - 1`, rising with `values`.

    Raises:
        ContractError: The bounds cannot be told apart in 64-bit numbers.

    >>> spend = Feature(name="spend", high=5000.0, transform="log1p")
    >>> scale(spend, np.array([-3.0, 0.0, 5000.0, 9000.0])).tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    forward, _ = _TRANSFORMS[feature.transform]
    bottom, span = _span(feature)
    clipped = np.clip(values, feature.low, feature.high)
    return np.clip((forward(clipped) - bottom) / span * 2.0 - 1.0, -1.0, 1.0)


def unscale(feature: Feature, scaled: Float[np.ndarray, "R"]) -> Float[np.ndarray, "R"]:
    """Turn scaled numbers back into natural units, within the public bounds.

    Args:
        feature: A feature of kind `number`.
        scaled: Scaled values; noise beyond [-1, 1] is clipped, NaN stays NaN.

    Returns:
        Natural units, rising with `scaled`.

    Raises:
        ContractError: The bounds cannot be told apart in 64-bit numbers.

    >>> unscale(Feature(name="age", low=20.0, high=80.0), np.array([-1.0, 0.0, 1.0])).tolist()
    [20.0, 50.0, 80.0]
    """
    _, backward = _TRANSFORMS[feature.transform]
    bottom, span = _span(feature)
    raised = (np.clip(scaled, -1.0, 1.0) + 1.0) / 2.0 * span + bottom
    return np.clip(backward(raised), feature.low, feature.high)


def natural(contract: Contract, scaled: Float[np.ndarray, "F"]) -> list[Quantity]:
    """Turn a mean of encoded customers into units that a person reads.

    A number comes back as the value whose scaled form is the mean: with a transform that is a
    typical value, not the arithmetic mean. Flags, categories and missing indicators come back
    as shares of the customers. Where a feature has an indicator, its number or flag is that of
    the customers who have a value.

    Args:
        contract: Says which input is which.
        scaled: Mean of encoded rows, possibly with noise; NaN for a suppressed cell.

    Returns:
        One quantity an input, in the order of `inputs`.
    """
    values = iter(float(value) for value in scaled)
    return [item for feature in contract.features for item in _quantities(feature, values)]


def _inputs(feature: Feature) -> Iterator[Input]:
    name, share = feature.name, "share of customers"
    if feature.kind == "category":
        for category in feature.categories:
            yield Input(name, f"{name} = {category}", share, "category")
    elif feature.kind == "flag":
        yield Input(name, name, share, "flag")
    else:
        yield Input(name, name, feature.unit, "number")
    if feature.missing == "indicator":
        yield Input(name, f"{name} (missing)", share, "missing")


def _quantities(feature: Feature, values: Iterator[float]) -> Iterator[Quantity]:
    own = list(_inputs(feature))
    means = [next(values) for _ in own]
    if feature.missing == "indicator" and feature.kind != "category":
        means[0] = _of_known(means[0], means[-1])
    for item, mean in zip(own, means, strict=True):
        if not math.isfinite(mean):
            yield Quantity(item, None)
        elif item.kind == "number":
            yield Quantity(item, float(unscale(feature, np.array([mean]))[0]))
        else:
            yield Quantity(item, (min(max(mean, -1.0), 1.0) + 1.0) / 2.0)


def _of_known(mean: float, indicator: float) -> float:
    """Undo the zeros that customers without a value add to a mean."""
    known = (1.0 - indicator) / 2.0
    return mean / min(known, 1.0) if known > 0 else math.nan


def _span(feature: Feature) -> tuple[float, float]:
    """Give the transformed lower bound and the distance to the upper one."""
    forward, _ = _TRANSFORMS[feature.transform]
    bounds = np.array([feature.low, feature.high])
    with np.errstate(over="ignore"):
        bottom, top = forward(bounds)
        span = float(top - bottom)
    if not (math.isfinite(2.0 * span) and span > 1e-300):
        raise ContractError(
            f"feature '{feature.name}': expected bounds that 64-bit numbers can tell apart, "
            f"got low={feature.low} and high={feature.high}"
        )
    return float(bottom), span
