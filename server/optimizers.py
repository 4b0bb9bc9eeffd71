"""Decoded average -> next parameters. Post-processing: nothing here touches customers.

With the average of the merchants' updates as (minus) the gradient these are FedAvg (sgd with
rate 1), FedAvgM (momentum), FedAdam and FedYogi of Reddi et al. 2021, "Adaptive federated
optimization", Algorithm 2, with Adam's bias correction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from common.contract import ADAM_DECAYS, ADAM_EPSILON, Training

(_BETA1, _BETA2), _TINY = ADAM_DECAYS, ADAM_EPSILON


@dataclass
class Optimizer:
    """The coordinator's step and the running average of the model.

    Args:
        training: The contract's settings.
        theta: Starting parameters, P numbers.
    """

    training: Training
    theta: Float[np.ndarray, " P"]
    steps: int = 0
    _first: Float[np.ndarray, " P"] = field(init=False)
    _second: Float[np.ndarray, " P"] = field(init=False)
    _average: Float[np.ndarray, " P"] = field(init=False)

    def __post_init__(self) -> None:
        self.theta = self.theta.copy()
        self._first = np.zeros_like(self.theta)
        self._second = np.zeros_like(self.theta)
        self._average = np.zeros_like(self.theta)

    def step(self, gradient: Float[np.ndarray, " P"]) -> None:
        """Move the parameters against an averaged gradient."""
        self.steps += 1
        if self.training.optimizer == "sgd":
            self._first = self.training.momentum * self._first + gradient
            direction = self._first
        else:
            direction = self._adaptive(gradient)
        self.theta = self.theta - self.training.step_size * direction
        decay = self.training.averaging
        self._average = decay * self._average + (1.0 - decay) * self.theta

    def _adaptive(self, gradient: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        self._first = _BETA1 * self._first + (1.0 - _BETA1) * gradient
        square = gradient * gradient
        if self.training.optimizer == "adam":
            self._second = _BETA2 * self._second + (1.0 - _BETA2) * square
        else:
            sign = np.sign(self._second - square)
            self._second = self._second - (1.0 - _BETA2) * sign * square
        first = self._first / (1.0 - _BETA1**self.steps)
        second = self._second / (1.0 - _BETA2**self.steps)
        return first / (np.sqrt(second) + _TINY)

    @property
    def state(self) -> dict[str, Float[np.ndarray, " P"]]:
        """Return what a later process needs to go on, beside the number of steps."""
        return {
            "theta": self.theta,
            "first": self._first,
            "second": self._second,
            "average": self._average,
        }

    def restore(self, steps: int, state: Mapping[str, Float[np.ndarray, " P"]]) -> None:
        """Go on from what `state` gave after so many steps."""
        self.steps, self.theta = steps, state["theta"]
        self._first, self._second = state["first"], state["second"]
        self._average = state["average"]

    @property
    def published(self) -> Float[np.ndarray, " P"]:
        """Return the parameters to evaluate and publish: the average over rounds, or the last."""
        decay = self.training.averaging
        if not self.steps or not decay:
            return self.theta
        return self._average / (1.0 - decay**self.steps)
