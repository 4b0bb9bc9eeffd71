"""Starting parameters that cost no privacy: trained on customers out of a textbook.

They are trained without noise, because nobody stands behind a generated row. The generator knows
the contract and nothing else, so that whether to start there is a public choice too.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from clients.training import clipped_gradient_sum
from common.contract import Contract, Training
from common.network import Network, initial_parameters, network_of
from server.optimizers import Optimizer
from simulations.textbook import Textbook, customers

_BATCH = 512
_EPOCHS = 30
_PATIENCE = 3  # epochs without a better loss on customers of other shops
_HELD_OUT = 0.2  # of the shops
_STEPS = Training(learning_rate=0.01, averaging=0.99)
_NO_CLIPPING = 1e12


@dataclass(frozen=True)
class Pretrained:
    """Starting parameters, and how good they are for generated customers of other shops."""

    parameters: Float[np.ndarray, " P"]
    customers: int  # that were generated
    accuracy: float
    majority: float  # accuracy of always naming the most common segment
    unknown: tuple[str, ...]  # features of which the generator knows nothing


def pretrained(contract: Contract, seed: int = 0) -> Pretrained:
    """Train the contract's model on generated customers.

    Inputs of which the generator knows nothing start with weight zero: what they are good for
    is learned in the federation.

    Args:
        contract: Its features, bounds, windows, segments and model.
        seed: Of the generated customers. On another machine the same seed gives customers and
            parameters that may differ in the last digits.

    Raises:
        ContractError: No customers can be generated for this contract.
    """
    found = customers(contract, seed)
    test = found.shop >= round((found.shop.max() + 1) * (1 - _HELD_OUT))
    network = network_of(contract)
    theta = _trained(contract, found, test, np.random.default_rng([seed, 1]))
    right = network.predictions(theta, found.x[test]) == found.y[test]
    most = np.bincount(found.y[~test]).argmax()
    return Pretrained(
        theta,
        len(found.y),
        float(right.mean()),
        float((found.y[test] == most).mean()),
        found.unknown,
    )


def _trained(
    contract: Contract, found: Textbook, test: np.ndarray, random: np.random.Generator
) -> Float[np.ndarray, " P"]:
    """Train by mini-batches until customers of other shops are told no better."""
    network, theta = network_of(contract), initial_parameters(contract)
    network.layers(theta)[0][:, list(found.unknown_inputs)] = 0.0
    x, y = found.x[~test], found.y[~test]
    optimizer = Optimizer(_STEPS, theta)
    best, best_loss, since = theta, np.inf, 0
    for _ in range(_EPOCHS):
        for rows in np.array_split(random.permutation(len(y)), max(len(y) // _BATCH, 1)):
            total = clipped_gradient_sum(network, optimizer.theta, x[rows], y[rows], _NO_CLIPPING)
            optimizer.step(total / len(rows))
        loss = _loss(network, optimizer.published, found.x[test], found.y[test])
        since += 1
        if loss < best_loss:
            best, best_loss, since = optimizer.published, loss, 0
        if since == _PATIENCE:
            break
    return best


def _loss(
    network: Network,
    theta: Float[np.ndarray, " P"],
    x: Float[np.ndarray, "R F"],
    y: Int[np.ndarray, " R"],
) -> float:
    """Return the mean cross-entropy."""
    right = network.probabilities(theta, x)[np.arange(len(y)), y]
    return float(-np.log(np.maximum(right, 1e-300)).mean())
