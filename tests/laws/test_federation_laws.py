"""Laws over the whole way of the data, on random federations (hypothesis)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.release import noisy_sum
from clients.training import clipped_gradient_sum
from clients.training_opacus import clipped_gradient_sum_opacus
from clients.worker import confusion_counts, profile_sums
from common.accounting import epsilon
from common.events import GaussianSum
from common.fixed_point import (
    STEPS_PER_UNIT,
    Lattice,
    from_lattice,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)
from common.network import Network
from common.noise import NoiseSource
from simulations.datasets import load
from simulations.federation import assemble
from simulations.rounds import run_rounds

networks = st.builds(
    Network,
    st.lists(st.integers(1, 8), min_size=2, max_size=4).map(tuple),
    st.sampled_from(["relu", "tanh"]),
)
seeds = st.integers(0, 2**32)
clip_norms = st.floats(1e-3, 1e3)
scales = st.sampled_from([0.0, 1e-6, 1.0, 100.0, 9e5])
fineness = st.sampled_from([2**6, 2**11, STEPS_PER_UNIT])  # lattice steps in one sensitivity


def problem(network: Network, rows: int, seed: int, scale: float) -> tuple[np.ndarray, ...]:
    """Return parameters, inputs and labels."""
    generator = np.random.default_rng(seed)
    return (
        generator.uniform(-scale, scale, network.size),
        generator.uniform(-1, 1, (rows, network.dims[0])),
        generator.integers(0, network.dims[-1], rows),
    )


@settings(max_examples=120, deadline=None)
@given(networks, st.integers(1, 30), seeds, clip_norms, scales, fineness)
def test_rounded_gradient_sums_of_neighbours(
    network: Network, rows: int, seed: int, clip_norm: float, scale: float, steps: int
) -> None:
    """Neighbouring tables differ, rounded to the lattice, by the lattice's sensitivity at most."""
    theta, x, y = problem(network, rows, seed, scale)
    step, gone = lattice_step(clip_norm, steps), seed % rows
    whole = to_lattice(clipped_gradient_sum(network, theta, x, y, clip_norm), step)
    fewer = (np.delete(x, gone, axis=0), np.delete(y, gone))
    without = to_lattice(clipped_gradient_sum(network, theta, *fewer, clip_norm), step)
    moved = np.linalg.norm(from_lattice(whole - without, step))
    assert moved <= lattice_sensitivity(clip_norm, network.size, steps)


@settings(max_examples=60, deadline=None)
@given(networks, st.integers(1, 30), seeds, scales)
def test_counts_and_profiles_of_neighbours(
    network: Network, rows: int, seed: int, scale: float
) -> None:
    """One customer moves confusion counts and profile sums by at most one."""
    theta, x, y = problem(network, rows, seed, scale)
    segments, gone = network.dims[-1], seed % rows
    kept = np.arange(rows) != gone
    guess, fewer = network.predictions(theta, x), network.predictions(theta, x[kept])
    counts = confusion_counts(y, guess, segments) - confusion_counts(y[kept], fewer, segments)
    assert np.linalg.norm(counts) == 1.0
    profiles = profile_sums(x, guess, segments) - profile_sums(x[kept], fewer, segments)
    assert np.linalg.norm(profiles) <= 1.0 + 1e-9


@settings(max_examples=40, deadline=None)
@given(networks, st.integers(0, 30), seeds, clip_norms, st.sampled_from([1e-3, 1.0, 10.0]))
def test_kernel_is_opacus(
    network: Network, rows: int, seed: int, clip_norm: float, scale: float
) -> None:
    """On any network and table the kernel's sum is Opacus' to 1e-12 a customer."""
    arguments = (network, *problem(network, rows, seed, scale), clip_norm)
    np.testing.assert_allclose(
        clipped_gradient_sum(*arguments),
        clipped_gradient_sum_opacus(*arguments),
        rtol=1e-10,
        atol=1e-12 * clip_norm * max(rows, 1),
    )


@settings(max_examples=40, deadline=None)
@given(
    networks,
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    seeds,
    fineness,
    st.sampled_from([32, 64]),
)
def test_merchants_add_up_to_the_union(
    network: Network, sizes: list[int], seed: int, steps: int, bits: int
) -> None:
    """The sum of merchants' parts is the pooled customers' sum plus the sum of their noise.

    In the ring too, in which the parts travel.
    """
    theta, x, y = problem(network, sum(sizes), seed, 1.0)
    ends = np.cumsum(sizes)
    step = lattice_step(1.0, steps)
    lattice = Lattice(step, bits)
    settings_ = {"sensitivity": 1.0, "noise_multiplier": 2.0, "contributors": len(sizes)}
    settings_["steps"] = steps
    total = np.zeros(network.size, dtype=lattice.dtype)
    noise = np.zeros(network.size, dtype=lattice.dtype)
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        part = slice(end - size, end)
        exact = clipped_gradient_sum(network, theta, x[part].copy(), y[part].copy(), 1.0)
        for target, values in ((total, exact), (noise, np.zeros(network.size))):
            source = NoiseSource.seeded(seed, number)
            part = noisy_sum(values, noise=source, **settings_)  # type: ignore[arg-type]
            np.add(target, lattice.to_ring(part), out=target)
    pooled = clipped_gradient_sum(network, theta, x, y, 1.0)
    error = np.abs(from_lattice(lattice.from_ring(total - noise), step) - pooled)
    assert np.all(error <= 0.51 * step * len(sizes))


@pytest.mark.parametrize(
    ("ring_bits", "mode", "optimizer"),
    [
        (32, "distributed", "adam"),
        (64, "local", "sgd"),
        pytest.param(32, "distributed", "sgd", marks=pytest.mark.slow),
        pytest.param(32, "local", "sgd", marks=pytest.mark.slow),
        pytest.param(32, "local", "adam", marks=pytest.mark.slow),
        pytest.param(64, "distributed", "sgd", marks=pytest.mark.slow),
        pytest.param(64, "distributed", "adam", marks=pytest.mark.slow),
        pytest.param(64, "local", "adam", marks=pytest.mark.slow),
    ],
)
def test_secure_sums_give_the_model_of_plain_sums(
    tmp_path: Path, ring_bits: int, mode: str, optimizer: str
) -> None:
    """With the same noise the coordinator computes the same bits, whether it sees parts or not.

    The model is linear: it starts at zero, whatever the contract's hash.
    """
    dataset = load("synthetic", preset="smoke", merchants=4)
    found = []
    for secure in (True, False):
        contract = dataset.contract.revised(
            model={"family": "linear"},
            training={"rounds": 3, "mode": mode, "optimizer": optimizer},
            aggregation={"secure": secure, "ring_bits": ring_bits, "min_survivors": 3},
            publication={"evaluate_every": 2},
        )
        folder = tmp_path / str(secure)
        folder.mkdir()
        federation = assemble(replace(dataset, contract=contract), contract, folder, 5)
        found.append(run_rounds(federation, folder, lambda _report: None))
    secure_run, plain_run = found
    assert secure_run.parameters.tobytes() == plain_run.parameters.tobytes()
    assert secure_run.customers == plain_run.customers
    sums = (*secure_run.evaluations, secure_run.profile)
    for one, other in zip(sums, (*plain_run.evaluations, plain_run.profile), strict=True):
        assert one is not None
        assert other is not None
        assert one.total.tobytes() == other.total.tobytes()
        assert (one.merchants, one.stddev) == (other.merchants, other.stddev)


@settings(max_examples=60, deadline=None)
@given(networks, st.integers(1, 20), seeds)
def test_order_of_customers_does_not_matter(network: Network, rows: int, seed: int) -> None:
    """A shuffled table gives the same sum, up to rounding far below one lattice step."""
    theta, x, y = problem(network, rows, seed, 10.0)
    order = np.random.default_rng(seed).permutation(rows)
    one = clipped_gradient_sum(network, theta, x, y, 1.0)
    other = clipped_gradient_sum(network, theta, x[order], y[order], 1.0)
    np.testing.assert_allclose(one, other, atol=1e-3 * lattice_step(1.0))


@given(st.floats(0.5, 50), st.integers(1, 100), st.integers(1, 100))
def test_splitting_noise_over_events_is_neutral(sigma: float, one: int, other: int) -> None:
    """K events at sqrt(k) times the noise cost what a single one costs."""
    single = epsilon([GaussianSum(sigma, 1.0)], 1e-5)
    many = epsilon(
        [GaussianSum(sigma * (one + other) ** 0.5, 1.0, count) for count in (one, other)], 1e-5
    )
    assert many == pytest.approx(single, rel=1e-9)


@pytest.mark.slow
def test_opacus_engine_on_the_edge_of_a_relu() -> None:
    """With engine 'opacus' too, rounding must not decide what everybody else contributes."""
    network, worst = Network((5, 1, 2)), 0.0
    for seed in range(40):
        theta, x, _ = problem(network, 1, seed, 1.0)
        layers = network.layers(theta)
        layers[0][:, -1] = -(x[:1] @ layers[0][:, :-1].T)[0]
        layers[-1][:] *= 100
        x, y = np.tile(x, (33, 1)), np.zeros(33, dtype=np.int64)
        whole = clipped_gradient_sum_opacus(network, theta, x, y, 1.0)
        without = clipped_gradient_sum_opacus(network, theta, x[1:].copy(), y[1:], 1.0)
        worst = max(worst, float(np.linalg.norm(whole - without)))
    assert worst <= 1.0 + 1e-9
