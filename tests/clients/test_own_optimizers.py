"""A merchant's own optimizers: those of torch, each merchant alone, no memory, no divergence."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.own_optimizers import OwnOptimizer, scale_of
from common.contract import ADAM_DECAYS, ADAM_EPSILON, Training
from common.network import MAX_PARAMETER

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "momentum": {"local_momentum": 0.9},
    "adam": {"local_optimizer": "adam"},
}
settings_of = st.sampled_from(sorted(SETTINGS))


def training_of(name: str, **changes: Any) -> Training:
    """Return settings of an optimizer."""
    return Training(mode="local", **{"local_learning_rate": 0.07, **SETTINGS[name], **changes})


def torch_steps(
    training: Training, start: np.ndarray, gradients: list[np.ndarray]
) -> list[np.ndarray]:
    """Return the parameters after each step of torch's optimizer, FedProx' term in the loss."""
    theta = torch.from_numpy(start.copy()).requires_grad_()
    rate, stepper = training.local_learning_rate, torch.optim.Optimizer
    if training.local_optimizer == "adam":
        stepper = torch.optim.Adam([theta], lr=rate, betas=ADAM_DECAYS, eps=ADAM_EPSILON)
    else:
        stepper = torch.optim.SGD([theta], lr=rate, momentum=training.local_momentum)
    found = []
    for gradient in gradients:
        stepper.zero_grad()
        pull = training.proximal / 2 * ((theta - torch.from_numpy(start)) ** 2).sum()
        (pull + (torch.from_numpy(gradient) * theta).sum()).backward()
        stepper.step()
        found.append(theta.detach().numpy().copy())
    return found


@given(
    settings_of,
    st.sampled_from([0.0, 0.3, 5.0]),
    st.integers(1, 50),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
    st.integers(0, 2**32),
)
@settings(deadline=None)
def test_is_that_of_torch(name: str, proximal: float, steps: int, size: float, seed: int) -> None:
    """Every step, for gradients of any size, some of them 0, with and without a proximal pull."""
    generator = np.random.default_rng(seed)
    start = generator.normal(size=(2, 30))
    gradients = list(generator.normal(size=(steps, 2, 30)) * size)
    for gradient in gradients:
        gradient[:, generator.random(30) < 0.2] = 0.0
    training = training_of(name, proximal=proximal)
    optimizer = OwnOptimizer(training, start)
    for gradient, expected in zip(gradients, torch_steps(training, start, gradients), strict=True):
        optimizer.step(gradient.copy())
        if np.abs(expected).max() > MAX_PARAMETER:
            return
        np.testing.assert_allclose(optimizer.theta, expected, rtol=1e-10, atol=1e-11 * size)


@given(settings_of, st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
@settings(deadline=None)
def test_each_like_alone(name: str, length: int, merchants: int, seed: int) -> None:
    """Row k of K is, to the last bit, what the merchant gets alone."""
    generator = np.random.default_rng(seed)
    training = training_of(name, proximal=0.5)
    start = generator.normal(size=(merchants, length))
    many = OwnOptimizer(training, start)
    each = [OwnOptimizer(training, start[k : k + 1]) for k in range(merchants)]
    for _ in range(9):
        gradients = generator.normal(size=start.shape)
        for k, one in enumerate(each):
            one.step(gradients[k : k + 1].copy())
        many.step(gradients)
    assert np.array_equal(many.theta, np.concatenate([one.theta for one in each]))


@pytest.mark.parametrize("name", SETTINGS)
def test_what_fills_up_stays_zero(name: str) -> None:
    """Where start and gradients are 0, so are parameters, and no number is undefined."""
    optimizer = OwnOptimizer(training_of(name, proximal=0.5), np.zeros((2, 6)))
    for _ in range(1000):
        gradient = np.ones((2, 6))
        gradient[:, ::2] = 0.0
        optimizer.step(gradient)
    assert not optimizer.theta[:, ::2].any()
    assert optimizer.theta[:, 1::2].all()


@pytest.mark.parametrize("name", SETTINGS)
def test_takes_no_memory(name: str) -> None:
    """All buffers are made once: a step takes less than one vector."""
    optimizer = OwnOptimizer(training_of(name, proximal=0.5), np.zeros((4, 10_000)))
    gradient = np.ones((4, 10_000))
    optimizer.step(gradient)
    tracemalloc.start()
    optimizer.step(gradient)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < gradient.nbytes / 10


@pytest.mark.parametrize("name", SETTINGS)
def test_the_start_is_left_alone(name: str) -> None:
    """Steps move a copy; two optimizers of one start know nothing of each other."""
    start = np.linspace(-1, 1, 5)[None]
    before, training = start.copy(), training_of(name)
    one, other = OwnOptimizer(training, start), OwnOptimizer(training, start)
    one.step(np.ones((1, 5)))
    one.step(np.ones((1, 5)))
    other.step(np.ones((1, 5)))
    other.step(np.ones((1, 5)))
    assert np.array_equal(start, before)
    assert np.array_equal(one.theta, other.theta)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("rate", [1e-9, 1.0, 1e9])
@pytest.mark.parametrize("batch", [5e-324, 1.0, 1e308])
def test_never_diverges(name: str, rate: float, batch: float) -> None:
    """Whatever the sums, the divisor and the settings, parameters stay within the bound."""
    training = training_of(name, local_learning_rate=rate, proximal=0.5 / rate / 1e3)
    optimizer = OwnOptimizer(training, np.full((1, 4), MAX_PARAMETER))
    for step in range(1000):
        multiples = np.array([[2.0**52, -(2.0**52), (-1.0) ** step, 0.0]])
        optimizer.step(multiples * scale_of(1e9, batch))
    assert (np.abs(optimizer.theta) <= MAX_PARAMETER).all()
