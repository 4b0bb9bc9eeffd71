"""Every way to learn the same segments, on the same customers, side by side.

The figures are measured by the simulator with full sight of the held-out customers: they say
how good a method is and are themselves neither private nor for release.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from clients.features import encode
from clients.release import noisy_sum
from clients.table import CustomerTable
from clients.training import clipped_gradient_sum
from common import statements
from common.contract import Contract, Training
from common.fixed_point import STEPS_PER_UNIT, from_lattice, lattice_step
from common.network import network_of
from common.noise import NoiseSource
from common.plan import plan_of
from common.start import starting_parameters
from server.optimizers import Optimizer
from simulations.datasets import Dataset
from simulations.federation import assemble, public_delta, tables_of, training_customers
from simulations.result import Comparison, ComparisonRow, Spread
from simulations.rounds import run_rounds
from simulations.scores import Scores, scores_of

# Full-batch Adam without clipping, chosen on synthetic customers (benchmarks/defaults.py).
PLAIN_ALONE = {
    "linear": Training(rounds=25, learning_rate=0.03, averaging=0.0),
    "mlp": Training(rounds=25, learning_rate=0.01, averaging=0.0),
}
PLAIN_POOLED = {
    "linear": Training(rounds=400, learning_rate=0.1, averaging=0.0),
    "mlp": Training(rounds=100, learning_rate=0.03, averaging=0.0),
}
# The same from trained parameters.
STARTED_ALONE = dict.fromkeys(PLAIN_ALONE, Training(rounds=10, learning_rate=0.001, averaging=0.0))
STARTED_POOLED = {
    **PLAIN_POOLED,
    "mlp": Training(rounds=50, learning_rate=0.001, averaging=0.0),
}
_NO_CLIPPING = 1e12
_STARTED = (
    "Every method starts from the parameters that the contract names; 'start' is what they tell "
    "before anything is learned. Those of `hansa pretrain` were trained on generated customers."
)
_SIZE_GROUPS = 3


@dataclass(frozen=True)
class Merchants:
    """All merchants' customers of one split, stacked (R customers)."""

    x: Float[np.ndarray, "R F"]
    y: Int[np.ndarray, " R"]
    previous: Int[np.ndarray, " R"] | None
    merchant: Int[np.ndarray, " R"]
    test: np.ndarray  # bool [R]
    count: int

    def rows(self, merchant: int, *, test: bool) -> np.ndarray:
        """Return the indices of one merchant's training or held-out customers."""
        return np.flatnonzero((self.merchant == merchant) & (self.test == test))


@dataclass(frozen=True)
class Question:
    """What is compared: the data, the contract, at which epsilons, over how many splits."""

    dataset: Dataset
    contract: Contract
    epsilons: tuple[float, ...]
    seeds: int


Answer = tuple[str, float | None, Float[np.ndarray, "T S"]]  # method, epsilon, probabilities


def compare(question: Question, on_step: Callable[[str], None]) -> Comparison:
    """Measure every method on `question.seeds` splits of persons.

    `on_step` is told in words what is being measured.
    """
    scores: dict[tuple[str, float | None], list[Scores]] = {}
    customers: list[int] = []
    ranges: list[tuple[int, int]] = []  # training customers of a merchant in each size group
    deltas: list[float] = []
    for seed in range(question.seeds):
        contract = question.contract.revised(training={"split_seed": seed})
        tables = tables_of(question.dataset, contract)
        merchants = _stacked(list(tables.values()), contract)
        customers.append(training_customers(list(tables.values())))
        deltas.append(public_delta(customers[-1]))
        contract = contract.revised(privacy={"delta": deltas[-1]})
        groups, found_ranges = _size_groups(merchants)
        ranges = [
            (min(a[0], b[0]), max(a[1], b[1]))
            for a, b in zip(ranges or found_ranges, found_ranges, strict=True)
        ]
        group_of_row = groups[merchants.merchant[merchants.test]]
        for method, epsilon, probabilities in _answers(question, contract, merchants, on_step):
            found = scores_of(merchants.y[merchants.test], probabilities, group_of_row, len(ranges))
            scores.setdefault((method, epsilon), []).append(found)
    return Comparison(
        data=question.dataset.name,
        partition=question.dataset.partition,
        label=question.dataset.label,
        seeds=question.seeds,
        merchants=merchants.count,
        customers=round(float(np.mean(customers))),
        delta=max(deltas),
        sizes=tuple(f"{low} to {high}" for low, high in ranges),
        rows=tuple(_row(*key, found) for key, found in scores.items()),
        secure=question.contract.aggregation.secure,
        notes=(question.dataset.provenance, *_notes(question.contract)),
    )


def _answers(
    question: Question, contract: Contract, merchants: Merchants, on_step: Callable[[str], None]
) -> Iterator[Answer]:
    """Yield every method's probabilities for the held-out customers."""
    seed = contract.training.split_seed
    where = f"split {seed + 1} of {question.seeds}"
    segments = len(contract.segments.names)
    test = merchants.test
    majority = np.bincount(merchants.y[~test], minlength=segments).argmax()
    yield "majority", None, np.eye(segments)[np.full(test.sum(), majority)]
    if merchants.previous is not None:
        known = merchants.previous[test]  # nothing to go by: the most common segment
        yield "last-period", None, np.eye(segments)[np.where(known >= 0, known, majority)]
    start = question.dataset.start
    if contract.model.start is not None:
        first = starting_parameters(contract, start)
        yield "start", None, network_of(contract).probabilities(first, merchants.x[test])
    on_step(f"{where}: every merchant alone")
    yield "alone", None, _alone(contract, merchants, start, private=False)
    on_step(f"{where}: all customers in one place")
    yield "pooled", None, _pooled(contract, merchants, start, private=False)
    for epsilon in question.epsilons:
        private = contract.revised(privacy={"epsilon": epsilon})
        on_step(f"{where}: every merchant alone, epsilon {epsilon:g}")
        yield "alone", epsilon, _alone(private, merchants, start, private=True)
        for mode in ("local", "distributed"):
            on_step(f"{where}: federated {mode}, epsilon {epsilon:g}")
            yield mode, epsilon, _federated(question.dataset, private, mode, merchants)
        on_step(f"{where}: all customers in one place, epsilon {epsilon:g}")
        yield "pooled", epsilon, _pooled(private, merchants, start, private=True)


def _stacked(tables: list[CustomerTable], contract: Contract) -> Merchants:
    known = [table.labels >= 0 for table in tables]
    previous = [
        table.previous[k]
        for table, k in zip(tables, known, strict=True)
        if table.previous is not None
    ]
    return Merchants(
        x=np.concatenate([encode(t, contract)[k] for t, k in zip(tables, known, strict=True)]),
        y=np.concatenate([t.labels[k] for t, k in zip(tables, known, strict=True)]),
        previous=np.concatenate(previous) if len(previous) == len(tables) else None,
        merchant=np.repeat(np.arange(len(tables)), [int(k.sum()) for k in known]),
        test=np.concatenate([t.held_out[k] for t, k in zip(tables, known, strict=True)]),
        count=len(tables),
    )


def _alone(
    contract: Contract, merchants: Merchants, start: bytes | None, *, private: bool
) -> Float[np.ndarray, "T S"]:
    """Train one model a merchant on its own customers; each scores its own held-out ones."""
    network = network_of(contract)
    result = np.zeros((len(merchants.y), network.dims[-1]))
    plain = PLAIN_ALONE if contract.model.start is None else STARTED_ALONE
    for merchant in range(merchants.count):
        rows, test = (merchants.rows(merchant, test=t) for t in (False, True))
        theta = train_centrally(
            contract,
            merchants.x[rows],
            merchants.y[rows],
            plain[contract.model.family],
            private=private,
            start=start,
        )
        result[test] = network.probabilities(theta, merchants.x[test])
    return np.asarray(result[merchants.test])


def _pooled(
    contract: Contract, merchants: Merchants, start: bytes | None, *, private: bool
) -> Float[np.ndarray, "T S"]:
    """Train one model on all customers in one place, which nobody would allow."""
    train = ~merchants.test
    plain = PLAIN_POOLED if contract.model.start is None else STARTED_POOLED
    theta = train_centrally(
        contract,
        merchants.x[train],
        merchants.y[train],
        plain[contract.model.family],
        private=private,
        start=start,
    )
    return network_of(contract).probabilities(theta, merchants.x[merchants.test])


def _federated(
    dataset: Dataset, contract: Contract, mode: str, merchants: Merchants
) -> Float[np.ndarray, "T S"]:
    """Run the real federation, messages and ledgers included."""
    contract = in_mode(contract, mode)
    with tempfile.TemporaryDirectory(prefix="hansa-compare-") as folder:
        federation = assemble(dataset, contract, Path(folder), None)
        outcome = run_rounds(federation, Path(folder), lambda _report: None)
        for member in federation.members:
            member.worker.ledger.close()
    return network_of(contract).probabilities(outcome.parameters, merchants.x[merchants.test])


def in_mode(contract: Contract, mode: str) -> Contract:
    """Return the contract in another mode; keys that only mode 'local' knows are reset."""
    if mode == "local":
        return contract.revised(training={"mode": mode})
    return contract.revised(
        training={
            "mode": mode,
            "sampling_rate": 1.0,
            "local_steps": 1,
            "proximal": 0.0,
            "local_optimizer": "sgd",
            "local_momentum": 0.0,
        }
    )


def train_centrally(
    contract: Contract,
    x: Float[np.ndarray, "R F"],
    y: Int[np.ndarray, " R"],
    plain: Training,
    *,
    private: bool,
    start: bytes | None = None,
) -> Float[np.ndarray, " P"]:
    """Train on customers in one place with the contract's network, from where the contract starts.

    Private training takes the contract's rounds as full-batch steps with the noise of its plan,
    all of it in one place; it divides by the number of customers with noise, like a run.
    Training without privacy follows `plain`: no clipping, no noise.
    """
    if private:
        contract = in_mode(contract, "distributed")
    network, noise = network_of(contract), NoiseSource.fresh()
    first = starting_parameters(contract, start)
    optimizer = Optimizer(contract.training if private else plain, first)
    plan, clip_norm = plan_of(contract), contract.privacy.clip_norm if private else _NO_CLIPPING
    customers = float(len(y))
    if private:
        census = noisy_sum(
            np.array([customers]),
            sensitivity=1.0,
            noise_multiplier=plan.census.event.noise_multiplier,
            contributors=1,
            noise=noise,
        )
        customers = max(float(from_lattice(census, lattice_step(1.0))[0]), 1.0)
    for _ in range(optimizer.training.rounds):
        total = clipped_gradient_sum(network, optimizer.theta, x, y, clip_norm)
        if private:
            noisy = noisy_sum(
                total,
                sensitivity=clip_norm,
                noise_multiplier=plan.update.event.noise_multiplier,
                contributors=1,
                noise=noise,
                steps=STEPS_PER_UNIT,  # in one place no ring limits the lattice
            )
            total = from_lattice(noisy, lattice_step(clip_norm, STEPS_PER_UNIT))
        optimizer.step(total / customers)
    return optimizer.published


def _size_groups(merchants: Merchants) -> tuple[Int[np.ndarray, " K"], list[tuple[int, int]]]:
    """Put merchants into groups of like size; return each one's group and the groups' ranges."""
    sizes = np.bincount(merchants.merchant[~merchants.test], minlength=merchants.count)
    count = min(_SIZE_GROUPS, merchants.count)
    order = np.argsort(sizes, kind="stable")
    groups = np.zeros(merchants.count, dtype=np.int64)
    ranges = []
    for number, part in enumerate(np.array_split(order, count)):
        groups[part] = number
        ranges.append((int(sizes[part].min()), int(sizes[part].max())))
    return groups, ranges


def _row(method: str, epsilon: float | None, found: list[Scores]) -> ComparisonRow:
    groups = range(len(found[0].by_group))
    return ComparisonRow(
        method=method,
        epsilon=epsilon,
        accuracy=_spread([s.accuracy for s in found]),
        macro_f1=_spread([s.macro_f1 for s in found]),
        auc=_spread([s.auc for s in found]),
        by_size=tuple(_spread([s.by_group[g] for s in found]) for g in groups),
    )


def _spread(values: list[float]) -> Spread:
    return Spread(
        float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    )


def _notes(contract: Contract) -> tuple[str, ...]:
    return (
        "Epsilon is for one customer of one merchant and for the whole run: training, "
        "evaluation, census and profiles.",
        "'alone' and 'pooled' without privacy are trained without clipping or noise, with steps "
        "and learning rate chosen on synthetic customers.",
        *((_STARTED,) if contract.model.start is not None else ()),
        *((statements.MASKED_COMPARED,) if contract.aggregation.secure else ()),
    )
