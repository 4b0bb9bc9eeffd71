"""The optimizer of a merchant's own steps (mode `local`): noisy gradient -> next parameters.

Post-processing: what comes in holds its noise already, so that no choice here costs privacy.
SGD, momentum and Adam as PyTorch has them; Adam with the decays of the coordinator's.

Number by number, so that the K-th merchant of many gets the very bits that it gets alone. State
begins anew in every round: a merchant keeps nothing between rounds, and one that was away, or
answers a second attempt, takes the same steps.
"""

import numpy as np
from jaxtyping import Float64

from clients.step_loops import move
from common.contract import ADAM_DECAYS, ADAM_EPSILON, Training
from common.network import MAX_PARAMETER

_MAX_SCALE = 1e100  # times what a lattice holds, and squared, it is still finite


class OwnOptimizer:
    """The steps of one round, for K merchants at once; takes no memory after it was made.

    Args:
        training: `local_optimizer`, `local_learning_rate`, `local_momentum`, `proximal`.
        start: Parameters at the start of the round, one merchant a row.

    Attributes:
        theta: Parameters after the steps so far; the same array always.
    """

    def __init__(self, training: Training, start: Float64[np.ndarray, "K P"]) -> None:
        self.theta = start.copy()
        self._training, self._start, self._steps = training, start, 0
        self._spare = np.empty_like(start)
        self._first, self._second = np.zeros_like(start), np.zeros_like(start)

    def step(self, gradient: Float64[np.ndarray, "K P"]) -> None:
        """Move each merchant's parameters against its gradient.

        Whether a merchant answers must not depend on its customers: steps never diverge.

        Args:
            gradient: Noisy sums times `scale_of`, model units; overwritten.
        """
        training = self._training
        self._steps += 1
        if training.proximal:
            np.subtract(self.theta, self._start, out=self._spare)
            self._spare *= training.proximal
            gradient += self._spare
        if training.local_optimizer == "adam":
            self._adapt(gradient)
        elif training.local_momentum:
            self._first *= training.local_momentum
            self._first += gradient
            gradient[:] = self._first
        move(self.theta, gradient, training.local_learning_rate, MAX_PARAMETER)

    def _adapt(self, gradient: Float64[np.ndarray, "K P"]) -> None:
        """Turn a gradient into Adam's direction (Kingma and Ba 2015, Algorithm 1)."""
        first_decay, second_decay = ADAM_DECAYS
        self._first *= first_decay
        np.multiply(gradient, 1.0 - first_decay, out=self._spare)
        self._first += self._spare
        self._second *= second_decay
        np.multiply(gradient, gradient, out=self._spare)
        self._spare *= 1.0 - second_decay
        self._second += self._spare
        np.divide(self._second, 1.0 - second_decay**self._steps, out=self._spare)
        np.sqrt(self._spare, out=self._spare)
        self._spare += ADAM_EPSILON
        np.divide(self._first, self._spare, out=gradient)
        gradient /= 1.0 - first_decay**self._steps


def scale_of(unit: float, batch: float) -> float:
    """Return what turns a noisy sum on the lattice into a step's gradient.

    >>> scale_of(0.5, 10.0)
    0.05

    Args:
        unit: Lattice step of the sum.
        batch: What it is divided by.
    """
    return min(unit / batch, _MAX_SCALE)
