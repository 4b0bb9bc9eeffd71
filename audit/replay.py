"""The published model, worked out again from the recorded noisy sums alone.

Nothing of `server` is used: the optimizers are written here a second time, from Reddi et al.
2021, "Adaptive federated optimization", Algorithm 2, with the bias correction of Kingma and Ba
2015. Both versions give the same float64 numbers to the last bit, so that a hash can be compared
and any other number that entered a model shows.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from audit.runs import RecordedSum
from common.contract import Contract, Training
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE

Vector = np.ndarray

_FIRST_DECAY, _SECOND_DECAY, _SMALL = 0.9, 0.99, 1e-8


@dataclass(frozen=True)
class Model:
    """The coordinator's model after some steps: weights, two moments and a running average."""

    weights: Vector
    first: Vector
    second: Vector
    average: Vector
    steps: int = 0

    @classmethod
    def begin(cls, weights: Vector) -> "Model":
        """Return the model before the first step."""
        nothing = np.zeros_like(weights)
        return cls(weights, nothing, nothing, nothing)

    def published(self, averaging: float) -> Vector:
        """Return what is evaluated and published: the running average, its start corrected."""
        if self.steps == 0 or averaging == 0:
            return self.weights
        return self.average / (1.0 - averaging**self.steps)


def stepped(model: Model, gradient: Vector, training: Training) -> Model:
    """Return the model after one step against a gradient."""
    number = model.steps + 1
    if training.optimizer == "sgd":
        first, second = training.momentum * model.first + gradient, model.second
        direction = first
    else:
        first = _FIRST_DECAY * model.first + (1.0 - _FIRST_DECAY) * gradient
        second = _second_moment(model.second, gradient * gradient, training.optimizer)
        corrected = first / (1.0 - _FIRST_DECAY**number)
        spread = np.sqrt(second / (1.0 - _SECOND_DECAY**number))
        direction = corrected / (spread + _SMALL)
    weights = model.weights - training.step_size * direction
    keep = training.averaging
    average = keep * model.average + (1.0 - keep) * weights
    return Model(weights, first, second, average, number)


def _second_moment(moment: Vector, square: Vector, optimizer: str) -> Vector:
    if optimizer == "adam":
        return np.asarray(_SECOND_DECAY * moment + (1.0 - _SECOND_DECAY) * square)
    return np.asarray(moment - (1.0 - _SECOND_DECAY) * np.sign(moment - square) * square)


def sha256_of(parameters: Vector) -> str:
    """Return the hash of a model as ledgers and records hold it: float64, little-endian."""
    return hashlib.sha256(np.ascontiguousarray(parameters, dtype="<f8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Replay:
    """How far the recorded sums lead."""

    model: Model
    rounds: int = 0  # sums that were checked
    per_merchant: float = 0.0  # noisy training customers of a merchant, from the census
    problem: str = ""  # the first thing that does not follow; empty if all does


def replay(contract: Contract, first: Vector, sums: Sequence[RecordedSum]) -> Replay:
    """Follow a run from its contract, where that starts, and its recorded sums.

    Up to the first contradiction.
    """
    state = Replay(Model.begin(first))
    with np.errstate(all="ignore"):
        for recorded in sums:
            problem = _problem(contract, state, recorded)
            if problem:
                return replace(
                    state, problem=f"{recorded.stage} of round {recorded.round} {problem}"
                )
            state = _after(contract, state, recorded)
    return state


def _problem(contract: Contract, state: Replay, recorded: RecordedSum) -> str:
    """Return what of a sum does not follow from the sums before it, or nothing."""
    if not _in_order(contract, state, recorded):
        return f"comes out of order, after {state.model.steps} updates"
    if recorded.customers_per_merchant != state.per_merchant:
        return (
            f"was asked with {recorded.customers_per_merchant!r} customers a merchant, the census "
            f"gives {state.per_merchant!r}"
        )
    if recorded.parameters != sha256_of(_shown(contract, state, recorded.stage)):
        return "was asked with another model than the sums before it give"
    lengths = {CENSUS: 1, UPDATE: state.model.weights.size}
    if recorded.total is not None and recorded.total.size != lengths.get(
        recorded.stage, recorded.total.size
    ):
        return f"has {recorded.total.size} numbers"
    return "is a sum over nobody" if recorded.merchants == () else ""


def _in_order(contract: Contract, state: Replay, recorded: RecordedSum) -> bool:
    steps, rounds = state.model.steps, contract.training.rounds
    if recorded.stage != CENSUS and not state.per_merchant:
        return False
    expected = {CENSUS: 0, UPDATE: steps + 1, EVALUATION: steps, PROFILE: rounds}
    complete = recorded.stage != PROFILE or steps == rounds
    return recorded.round == expected.get(recorded.stage) and complete and steps <= rounds


def _shown(contract: Contract, state: Replay, stage: str) -> Vector:
    """Return the parameters that merchants should have been shown."""
    if stage in {CENSUS, UPDATE}:
        return state.model.weights
    return state.model.published(contract.training.averaging)


def _after(contract: Contract, state: Replay, recorded: RecordedSum) -> Replay:
    """Return the state after a sum; one that nothing came of changes nothing."""
    state = replace(state, rounds=state.rounds + 1)
    if recorded.total is None or recorded.merchants is None:
        return state
    total, merchants = recorded.values, len(recorded.merchants)
    if recorded.stage == CENSUS:
        return replace(state, per_merchant=max(float(total[0]), 1.0) / merchants)
    if recorded.stage != UPDATE:
        return state
    if contract.training.mode == "distributed":
        gradient = total / (state.per_merchant * merchants)
    else:
        gradient = -total / merchants
    return replace(state, model=stepped(state.model, gradient, contract.training))
