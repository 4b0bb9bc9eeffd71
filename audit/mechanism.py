"""Tests of the mechanism: does the code that answers for a merchant do what is accounted for?

Fed with generated customers, neighbouring tables and parameters that a malicious coordinator
might choose, the real code has to show the clip norm, the scale, shape, freshness and
independence of its noise, its sampling, its encoding and its book-keeping.

Every random test has a false-alarm rate of at most `PER_TEST`, all together at most
`FALSE_ALARM` (Bonferroni); the others never alarm without cause.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int, UInt
from scipy import stats

from audit import probes
from audit.bench import Bench, Check, Kind, certain_check, question, random_check
from audit.noise import noise_tests, several_steps_tests
from audit.statistics import binomial_p_value
from audit.subject import Subject, Table, twin
from common.contract import ADAM_EPSILON, Contract, Feature
from common.events import PoissonGaussianSum
from common.plan import EVALUATION

COLUMNS = 512  # added to the contract's inputs
_STEPS = 60  # whose batches are looked at
_ADAM_RATE, _CLEAR = 0.01, 100  # a learning rate; lattice steps above which rounding is small


def mechanism_tests(
    subject: Subject, contract: Contract, seed: int | None = None
) -> tuple[Check, ...]:
    """Try out the mechanism that a contract asks for.

    Args:
        subject: The code.
        contract: The contract. Steps that a merchant takes on its own are tried one by one, and
            once as many in a row as the contract says.
        seed: Makes the checks repeatable; None tests the real source of noise.
    """
    random = np.random.default_rng(seed)
    single, steps = (
        twin(contract, COLUMNS, **_single_steps(contract)),
        contract.training.local_steps,
    )
    bench = Bench(subject, single, seed, random)
    fine = twin(single, 0, training={"sampling_rate": 1.0}, aggregation={"ring_bits": 64})
    coarse = twin(single, 0, training={"sampling_rate": 1.0}, aggregation={"ring_bits": 32})
    checks = [
        *encoding_tests(Bench(subject, contract, seed, random)),
        *ring_tests(bench),
        *noise_tests(bench, whole_run=steps == 1),
        *sensitivity_tests(Bench(subject, fine, seed, random), "64 bits"),
        *sensitivity_tests(Bench(subject, coarse, seed, random), "32 bits"),
    ]
    if single.training.sampling_rate < 1.0:
        checks += sampling_tests(bench)
    if contract.training.local_optimizer == "adam":
        checks.append(adam_test(bench))
    if steps > 1:
        several = twin(single, 0, training={"local_steps": steps})
        checks += several_steps_tests(Bench(subject, several, seed, random))
    return tuple(checks)


def _single_steps(contract: Contract) -> dict[str, dict[str, object]]:
    if contract.training.mode == "distributed":
        return {}
    return {"training": {"local_steps": 1, "local_learning_rate": 1.0, "proximal": 0.0}}


def encoding_tests(bench: Bench) -> list[Check]:
    """Raw values, however large, become inputs in [-1, 1], each row on its own."""
    columns = {feature.name: _raw(feature) for feature in bench.contract.features}
    rows = max(map(len, columns.values()))
    columns = {
        name: [values[i % len(values)] for i in range(rows)] for name, values in columns.items()
    }
    inputs = bench.subject.encoded(bench.contract, columns)
    largest = float(np.abs(inputs).max()) if np.isfinite(inputs).all() else math.inf
    alone = [
        bench.subject.encoded(bench.contract, {name: [v[i]] for name, v in columns.items()})
        for i in range(rows)
    ]
    moved = float(np.abs(np.concatenate(alone) - inputs).max())
    return [
        certain_check(
            "encoding: bounds", largest, 1.0,
            f"{rows} customers with values of up to 1e12: the largest input is {largest:.3g}.",
        ),
        certain_check(
            "encoding: rows apart", moved, 0.0,
            f"A customer's inputs move by {moved:.3g} where all others are left out.",
        ),
    ]  # fmt: skip


def _raw(feature: Feature) -> list[object]:
    """Return values of a feature, proper ones and absurd ones."""
    kind, missing = feature.kind, feature.missing
    if kind == "category":
        values: list[object] = list(feature.categories)
    elif kind == "flag":
        values = [0.0, 1.0]
    else:
        low, high = feature.low, feature.high
        values = [low, high, (low + high) / 2, -1e12, 1e12]
    return values if missing == "refuse" else [*values, None]


def ring_tests(bench: Bench) -> list[Check]:
    """Whole numbers survive the ring, alone and summed, up to its largest."""
    worst = 0
    for kind in bench.kinds:
        reach = 2 ** (kind.lattice.ring_bits - 1)
        numbers = bench.random.integers(-reach // 4, reach // 4, size=(4, 64))
        numbers[0, :2] = reach // 4, -reach // 4
        numbers[:, 2] = 0
        numbers[0, 3:5] = reach - 1, -reach
        numbers[1:, 3:5] = 0
        parts = [kind.lattice.to_ring(row) for row in numbers]
        total = kind.lattice.from_ring(np.sum(parts, axis=0, dtype=kind.lattice.dtype))
        worst = max(worst, int(np.abs(total - numbers.sum(axis=0)).max()))
    return [
        certain_check(
            "ring: sums", float(worst), 0.0,
            f"Sums of four vectors in the ring are off by {worst} steps at most.",
        )
    ]  # fmt: skip


def sensitivity_tests(bench: Bench, ring: str) -> list[Check]:
    """Add one extreme customer, under equal noise, and see how far it moves a release.

    The finer the lattice, the less is allowed for rounding; so it is done in both rings.
    """
    kinds = [kind for kind in bench.kinds if kind.label != "evaluation"]
    return [_sensitivity_check(bench, kind, ring) for kind in kinds]


def _sensitivity_check(bench: Bench, kind: Kind, ring: str) -> Check:
    """Compare the farthest move with what the ledger's event and the rounding allow."""
    length = kind.release.length
    rounding = math.sqrt(length) * abs(kind.unit) if kind.unit < 0 else 0.0
    allowed = kind.sensitivity + rounding
    farthest, count = 0.0, 0
    for moved in _moves(bench, kind):
        farthest, count = max(farthest, float(np.linalg.norm(moved * kind.unit))), count + 1
    claimed = kind.release.event.sensitivity
    return certain_check(
        f"{kind.label}: sensitivity, {ring}", farthest, allowed,
        f"{count} extreme customers moved it by {farthest:.6g} at most; {claimed:.6g} is accounted "
        f"for, {allowed:.6g} with rounding.",
    )  # fmt: skip


def _moves(bench: Bench, kind: Kind) -> Iterator[Int[np.ndarray, " P"]]:
    """Yield answers with a customer less the ones without, in lattice steps."""
    held_out = kind.release.stage == EVALUATION
    width, last = bench.contract.inputs, len(bench.contract.segments.names) - 1
    thetas = [theta.clip(-1e6, 1e6) for theta in probes.hostile(bench.network, bench.random)]
    for background in probes.backgrounds(width, bench.random):
        base = probes.table_of(background, label=last, held_out=held_out)
        before = _answers(bench, kind, base, thetas)
        for row in probes.extremes(width, bench.random):
            one = probes.table_of(row[None], label=last, held_out=held_out)
            after = _answers(bench, kind, probes.joined(base, one), thetas)
            for with_it, without in zip(after, before, strict=True):
                yield kind.lattice.from_ring(with_it - without)


def _answers(
    bench: Bench, kind: Kind, table: Table, thetas: Sequence[Float[np.ndarray, " P"]]
) -> list[UInt[np.ndarray, " P"]]:
    questions = [question(kind, k, theta) for k, theta in enumerate(thetas)]
    return bench.answers("neighbour", table, questions, same_noise=True)[0]


def sampling_tests(bench: Bench) -> list[Check]:
    """See who enters a step: each customer by a coin flip of its own, at the rate charged."""
    kind = bench.update
    rate = kind.release.event.sampling_rate if isinstance(
        kind.release.event, PoissonGaussianSum
    ) else 1.0  # fmt: skip
    inside = _sampled(bench, kind)
    steps, rows = inside.shape
    sizes, count = inside.sum(axis=1), int(inside.sum())
    both = int((inside[0::2] & inside[1::2]).sum())
    low, high = (int(edge) for edge in stats.binom(rows, rate).ppf([0.35, 0.65]))
    middling = int(((sizes >= low) & (sizes <= high)).sum())
    law = stats.binom(rows, rate)
    chance = float(law.cdf(high) - law.cdf(low - 1))
    return [
        random_check(
            "sampling: rate", count / inside.size, rate, binomial_p_value(count, inside.size, rate),
            f"{count:,} of {inside.size:,} chances were taken, {rate * inside.size:,.0f} are "
            "expected at the rate that is accounted for.",
        ),
        random_check(
            "sampling: sizes vary", middling / steps, chance,
            binomial_p_value(middling, steps, chance),
            f"{middling} of {steps} steps have {low} to {high} customers, {chance * steps:.1f} are "
            "expected of Poisson sampling; all or none would be batches of a fixed size.",
        ),
        random_check(
            "sampling: steps apart", both / (inside.size / 2), rate**2,
            binomial_p_value(both, inside.size // 2, rate**2),
            f"{both} customers were in both of two steps, {rate**2 * inside.size / 2:.1f} are "
            "expected.",
        ),
    ]  # fmt: skip


def adam_test(bench: Bench) -> Check:
    """Adam's first step, under equal noise, is what the noisy sum of plain SGD's step gives.

    Whatever else entered it, such as a sum without noise, would turn some numbers round.
    """
    kind, random, training = bench.update, bench.random, bench.contract.training
    adam = {"local_optimizer": "adam", "local_learning_rate": _ADAM_RATE}
    own = replace(bench, contract=bench.contract.revised(training=adam))
    table = probes.table_of(random.uniform(-1.0, 1.0, size=(8, bench.contract.inputs)), label=1)
    asked = [question(kind, 0, probes.loud(bench.network))]
    plain, step = (
        kind.lattice.from_ring(one.answers("adam", table, asked, same_noise=True)[0][0])
        for one in (bench, own)
    )
    seen = np.abs(plain) >= _CLEAR
    gradient = -plain[seen] * kind.lattice.step / training.local_learning_rate
    expected = -_ADAM_RATE * gradient / (np.abs(gradient) + ADAM_EPSILON) / kind.lattice.step
    wrong = int((np.abs(step[seen] - expected) > 2.0 + 1e-3 * np.abs(expected)).sum())
    return certain_check(
        "update: Adam's step", float(wrong + (not seen.any())), 0.0,
        f"{wrong} of {int(seen.sum()):,} numbers of Adam's first step do not follow from the "
        "noisy sum.",
    )  # fmt: skip


def _sampled(bench: Bench, kind: Kind) -> Bool[np.ndarray, "K R"]:
    """Return which customers were in which step.

    Each customer has a column of its own. Where its label is 0 its gradient is zero; the same
    noise over the same number of customers cancels, and what is left in a column tells.
    """
    width, rows = bench.contract.inputs, min(COLUMNS, bench.contract.inputs)
    inputs = np.zeros((rows, width))
    own = np.arange(width - rows, width)
    inputs[np.arange(rows), own] = 1.0
    questions = [question(kind, k, probes.loud(bench.network)) for k in range(_STEPS)]
    seen, unseen = (
        bench.answers("s", probes.table_of(inputs, label=label), questions, same_noise=True)[0]
        for label in (1, 0)
    )
    units = bench.network.dims[1]
    inside = np.zeros((_STEPS, rows), dtype=bool)
    for k, (one, other) in enumerate(zip(seen, unseen, strict=True)):
        moved = kind.lattice.from_ring(one - other)[: units * (width + 1)]
        lengths = np.linalg.norm(moved.reshape(units, width + 1)[:, own].astype(float), axis=0)
        inside[k] = lengths > max(0.5 * lengths.max(), 4 * math.sqrt(units))
    return inside
