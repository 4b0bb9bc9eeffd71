"""Parameters and planted customers with which a mechanism shows what it does.

A malicious coordinator chooses the parameters; the audit does the same. With a large bias for
segment 0 the softmax is exactly one-hot, so a customer's gradient is exactly zero where its
label is 0, and exactly known where it is not, whatever noise moves the other parameters by.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from audit.subject import Table
from common.network import Network

GAP = 9e5  # below the 1e6 that a merchant accepts of a parameter


def silent(network: Network) -> Float[np.ndarray, " P"]:
    """Return parameters under which customers of segment 0 have gradient zero."""
    theta = np.zeros(network.size)
    network.layers(theta)[-1][0, -1] = GAP
    return theta


def loud(network: Network, scale: float = 1.0) -> Float[np.ndarray, " P"]:
    """Return the same with every hidden unit at work, so that other customers move all layers."""
    theta = silent(network)
    *hidden, last = network.layers(theta)
    for layer in hidden:
        layer[:, :-1] = 1.0 / (layer.shape[1] - 1)
    for layer in hidden[:1]:
        layer[:, :-1], layer[:, -1] = 0.0, 1.0
    if hidden:
        last[0, :-1] = scale
    return theta


def hostile(network: Network, random: np.random.Generator) -> Iterator[Float[np.ndarray, " P"]]:
    """Yield parameters that a coordinator may choose to make one customer count as much as it can.

    Loud ones, with small and with large gradients in every layer, and random ones of all sizes.
    """
    yield loud(network)
    yield loud(network, 1e3)
    for scale in (0.1, 3.0, 1e3):
        yield random.normal(size=network.size) * scale


def table_of(inputs: Float[np.ndarray, "R F"], label: int = 0, *, held_out: bool = False) -> Table:
    """Return customers of one segment, all on one side of the split."""
    count = len(inputs)
    return Table(inputs, np.full(count, label), np.full(count, held_out))


def joined(one: Table, other: Table) -> Table:
    """Return the customers of both tables."""
    return Table(
        np.concatenate([one.inputs, other.inputs]),
        np.concatenate([one.labels, other.labels]),
        np.concatenate([one.held_out, other.held_out]),
    )


def extremes(inputs: int, random: np.random.Generator) -> Float[np.ndarray, "R F"]:
    """Return customers at the corners of the domain, and one in its middle."""
    signs = random.choice([-1.0, 1.0], size=(1, inputs))
    return np.concatenate(
        [np.ones((1, inputs)), -np.ones((1, inputs)), signs, np.zeros_like(signs)]
    )


def backgrounds(inputs: int, random: np.random.Generator) -> list[Float[np.ndarray, "R F"]]:
    """Return what an extreme customer is added to: nobody, an opposite, a crowd.

    One faint opposite shows clipping of the whole batch: the sum swings round to the other side.
    """
    return [
        np.zeros((0, inputs)),
        np.full((1, inputs), -0.1),
        random.uniform(-1.0, 1.0, size=(4, inputs)),
    ]
