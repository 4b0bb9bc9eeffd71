"""One-run audit: plant canaries in one training, and guess from its noisy sums which are in it.

A canary is a customer with otherwise empty inputs and a code of +1 and -1 in columns that no
other customer uses. Codes are orthogonal (Hadamard), so a canary's gradient in the first layer's
columns is in nobody's way: its inner product with a noisy sum is its own clipped length, or
nothing, plus noise. A coin decides which canaries are in. Whoever guesses them better than
epsilon allows has refuted epsilon.

The observer sees every training sum and all parameters, which is what the threat model gives to
the coordinator. A lower bound is not a measurement of epsilon: even against the ideal Gaussian
mechanism a thousand canaries show about half of it.

Source: Steinke, Nasr and Jagielski 2023, arXiv 2305.08846; Mahloujifar, Melis and Chaudhuri
2024, arXiv 2410.22235.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import linalg, special, stats

from audit.bench import Bench, Kind
from audit.epsilon import recompute
from audit.statistics import (
    distribution_free_epsilon,
    gaussian_epsilon,
    gaussian_mu,
    right_guesses,
)
from audit.subject import MAX_FEATURES, Step, Subject, Table, noise_shares, twin
from common.contract import Contract
from common.errors import ContractError
from common.events import to_document
from common.network import Network, softmax

CONFIDENCE = 0.95
MAX_CANARIES = 2048
_SHARES = (50, 10, 4, 2)  # guesses on each side: canaries divided by these, fixed beforehand
_MERCHANTS = 3  # of a run whose merchants share the noise, at most
_CUSTOMERS = 300  # beside the canaries
_FEWEST_HELD_OUT = 20
_LENGTH = 8.0  # of a canary's inputs: most of its gradient is in its own columns, few saturate


@dataclass(frozen=True)
class Bound:
    """What guesses about canaries refute.

    Attributes:
        epsilon: Lower bound for a mechanism with Gaussian trade-off curve (f-DP).
        distribution_free: Lower bound without that assumption.
        guesses: Canaries that were guessed for the better bound.
        right: How many of these guesses were right.
    """

    epsilon: float
    distribution_free: float
    guesses: int
    right: int


@dataclass(frozen=True)
class OneRun:
    """One training with canaries.

    Attributes:
        canaries: How many were planted; about half of them were in.
        confidence: With which the bound holds.
        bound: What was refuted.
        charged: Epsilon of what the merchant's ledger was charged, recomputed.
        rounds: Training rounds that were observed.
    """

    canaries: int
    confidence: float
    bound: Bound
    charged: float
    rounds: int


def canaries_for(epsilon: float) -> int:
    """Return how many canaries an epsilon needs: perfect guesses among 1,000 show 10 at most."""
    return 1000 if epsilon < 6 else 2000


def one_run_audit(
    subject: Subject, contract: Contract, canaries: int, seed: int | None = None
) -> OneRun:
    """Train once with canaries, as the contract says, and guess which were in.

    Args:
        subject: The code.
        contract: The contract; at most three merchants share its noise here.
        canaries: How many.
        seed: Makes the run repeatable; None tests the real source of noise.

    Raises:
        ContractError: There is no room for so many canaries.
    """
    random = np.random.default_rng(seed)
    tried = _with_room(contract, canaries)
    bench = Bench(subject, tried, seed, random)
    codes = _codes(canaries)
    inputs = np.zeros((canaries, tried.inputs))
    inputs[:, -codes.shape[1] :] = codes
    labels = random.integers(0, len(tried.segments.names), canaries)
    included = random.random(canaries) < 0.5
    tables = _tables(bench, inputs[included], labels[included], codes.shape[1])
    run, scores, rounds = subject.training(tried, tables, seed), np.zeros(canaries), 0
    for step in run.steps():
        scores += _evidence(bench, step, inputs, labels, codes)
        rounds += 1
    spent = [to_document(event) for event in run.charged()]
    return OneRun(
        canaries,
        CONFIDENCE,
        lower_bound(np.nan_to_num(scores), included, contract.privacy.delta),
        recompute(spent, contract.privacy.delta),
        rounds,
    )


def lower_bound(
    scores: Float[np.ndarray, " m"], included: Bool[np.ndarray, " m"], delta: float
) -> Bound:
    """Return the best bound of a few numbers of guesses, each paid for (Bonferroni).

    Args:
        scores: Evidence that a canary is in; larger is more.
        included: Which were in, each by an independent fair coin.
        delta: At which epsilon is bounded.
    """
    m, alpha = len(scores), (1 - CONFIDENCE) / len(_SHARES)
    best = Bound(0.0, 0.0, 0, 0)
    for share in _SHARES:
        each = max(1, m // share)
        right = right_guesses(scores, included, each)
        epsilon = gaussian_epsilon(gaussian_mu(m, 2 * each, right, alpha), delta)
        free = distribution_free_epsilon(m, 2 * each, right, delta, alpha)
        free = max(free, best.distribution_free)
        if epsilon > best.epsilon or not best.guesses:
            best = Bound(epsilon, free, 2 * each, right)
        best = Bound(best.epsilon, free, best.guesses, best.right)
    return best


def _with_room(contract: Contract, canaries: int) -> Contract:
    columns = _code_length(canaries)
    if canaries > MAX_CANARIES or columns + len(contract.features) > MAX_FEATURES:
        raise ContractError(
            f"{canaries} canaries need {columns} columns; a contract has {MAX_FEATURES} features "
            f"at most, this one has {len(contract.features)} already (--canaries: at most "
            f"{MAX_CANARIES})"
        )
    merchants = min(noise_shares(contract), _MERCHANTS)
    return twin(
        contract,
        columns,
        federation={"min_merchants": merchants},
        aggregation={"secure": False, "min_survivors": merchants, "colluders": 0},
    )


def _code_length(canaries: int) -> int:
    return int(2 ** math.ceil(math.log2(max(canaries, 2))))


def _codes(canaries: int) -> Float[np.ndarray, "m L"]:
    """Return orthogonal rows of numbers of one size, one a canary."""
    length = _code_length(canaries)
    return np.asarray(linalg.hadamard(length)[:canaries] * min(1.0, _LENGTH / math.sqrt(length)))


def _tables(
    bench: Bench, inputs: Float[np.ndarray, "m F"], labels: Int[np.ndarray, " m"], codes: int
) -> Sequence[Table]:
    """Return every merchant's customers; the canaries that are in are the first one's."""
    contract, random = bench.contract, bench.random
    merchants, width = contract.min_survivors, inputs.shape[1] - codes
    others = np.zeros((_CUSTOMERS, inputs.shape[1]))
    others[:, :width] = random.uniform(-1.0, 1.0, size=(_CUSTOMERS, width))
    segments = len(contract.segments.names)
    teacher = random.normal(size=(width, segments))
    told = (others[:, :width] @ teacher).argmax(axis=1)
    held_out = np.arange(_CUSTOMERS) < _FEWEST_HELD_OUT
    tables = [
        Table(others[m::merchants], told[m::merchants], held_out[m::merchants])
        for m in range(merchants)
    ]
    tables[0] = Table(
        np.concatenate([inputs, tables[0].inputs]),
        np.concatenate([labels, tables[0].labels]),
        np.concatenate([np.zeros(len(labels), dtype=bool), tables[0].held_out]),
    )
    return tables


def _evidence(
    bench: Bench,
    step: Step,
    inputs: Float[np.ndarray, "m F"],
    labels: Int[np.ndarray, " m"],
    codes: Float[np.ndarray, "m L"],
) -> Float[np.ndarray, " m"]:
    """Return each canary's log-likelihood ratio, in against out, of one noisy sum."""
    contract, kind, length = bench.contract, bench.update, codes.shape[1]
    directions, sizes = _first_layer(bench.network, step.parameters, inputs, labels)
    clipped = np.minimum(1.0, contract.privacy.clip_norm / sizes)
    lengths = np.linalg.norm(directions, axis=1)
    size = float(np.linalg.norm(codes[0]))
    expected = clipped * lengths * size
    directions /= np.maximum(lengths, 1e-300)[:, None]
    seen = bench.network.layers(step.total * _unit(contract, step))[0][:, -1 - length : -1]
    found = np.einsum("mh,mh->m", codes @ seen.T, directions) / size
    return _log_ratio(contract, kind, found, expected)


def _unit(contract: Contract, step: Step) -> float:
    """Return what turns a decoded total into a sum of gradients."""
    training = contract.training
    if training.mode == "distributed":
        return 1.0
    batch = max(step.customers_per_merchant, 1.0) * training.sampling_rate
    return -batch / training.local_learning_rate


def _log_ratio(
    contract: Contract,
    kind: Kind,
    found: Float[np.ndarray, " m"],
    expected: Float[np.ndarray, " m"],
) -> Float[np.ndarray, " m"]:
    """Weigh what was found, if a canary enters each of the steps of a sum at the sampling rate."""
    training = contract.training
    merchants = contract.min_survivors if training.mode == "distributed" else 1
    variance = kind.stddev**2 * merchants * training.local_steps
    times = np.arange(training.local_steps + 1)
    chances = stats.binom(training.local_steps, training.sampling_rate).logpmf(times)
    moved = expected[:, None] * times
    exponents = chances + (found[:, None] - moved / 2) * moved / variance
    ratios: Float[np.ndarray, " m"] = special.logsumexp(exponents, axis=1)
    return ratios


def _first_layer(
    network: Network,
    theta: Float[np.ndarray, " P"],
    x: Float[np.ndarray, "m F"],
    y: Int[np.ndarray, " m"],
) -> tuple[Float[np.ndarray, "m H"], Float[np.ndarray, " m"]]:
    """Return the gradient at the first layer's outputs, and the norm of each whole gradient."""
    layers, relu = network.layers(theta), network.activation == "relu"
    inputs = [x]
    for layer in layers[:-1]:
        z = inputs[-1] @ layer[:, :-1].T + layer[:, -1]
        inputs.append(np.maximum(z, 0.0) if relu else np.tanh(z))
    delta = softmax(inputs[-1] @ layers[-1][:, :-1].T + layers[-1][:, -1])
    delta[np.arange(len(y)), y] -= 1.0
    squares = np.zeros(len(x))
    for layer, a in zip(layers[::-1], inputs[::-1], strict=True):
        squares += (delta**2).sum(axis=1) * ((a**2).sum(axis=1) + 1.0)
        if a is not x:
            delta = (delta @ layer[:, :-1]) * ((a > 0) if relu else 1.0 - a**2)
    return delta, np.maximum(np.sqrt(squares), 1e-300)
