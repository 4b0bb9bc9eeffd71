"""The coordinator's steps against torch and against their formulas."""

from typing import Any

import numpy as np
import pytest
import torch

from common.contract import Training
from server.optimizers import Optimizer

STEPS = 30


def gradients() -> np.ndarray:
    """Draw gradients of very different sizes."""
    random = np.random.default_rng(3)
    return random.normal(size=(STEPS, 6)) * 10.0 ** np.arange(-3, 3)


def steps_of_torch(optimizer: str, **settings: Any) -> list[np.ndarray]:
    """Return the parameters after each of torch's steps."""
    theta = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    stepper = getattr(torch.optim, optimizer)([theta], **settings)
    found = []
    for gradient in gradients():
        theta.grad = torch.from_numpy(gradient)
        stepper.step()
        found.append(theta.detach().numpy().copy())
    return found


def steps_of_ours(training: Training) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return parameters and published parameters after each of our steps."""
    optimizer = Optimizer(training, np.linspace(-1, 1, 6))
    thetas, published = [], []
    for gradient in gradients():
        optimizer.step(gradient)
        thetas.append(optimizer.theta)
        published.append(optimizer.published)
    return thetas, published


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_sgd_is_the_sgd_of_torch(momentum: float) -> None:
    """Every step equals torch's, with and without momentum."""
    ours, _ = steps_of_ours(Training(optimizer="sgd", learning_rate=0.07, momentum=momentum))
    np.testing.assert_allclose(ours, steps_of_torch("SGD", lr=0.07, momentum=momentum), rtol=1e-12)


def test_adam_is_the_adam_of_torch() -> None:
    """Every step equals torch's with betas 0.9 and 0.99."""
    ours, _ = steps_of_ours(Training(optimizer="adam", learning_rate=0.07))
    expected = steps_of_torch("Adam", lr=0.07, betas=(0.9, 0.99), eps=1e-8)
    np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)


def test_yogi_follows_its_formula() -> None:
    """The second moment moves by a fixed share of the square, towards it (Reddi et al. 2021)."""
    ours, _ = steps_of_ours(Training(optimizer="yogi", learning_rate=0.07))
    theta, first, second = np.linspace(-1, 1, 6), np.zeros(6), np.zeros(6)
    for number, gradient in enumerate(gradients(), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = second - 0.01 * gradient**2 * np.sign(second - gradient**2)
        corrected = first / (1 - 0.9**number), second / (1 - 0.99**number)
        theta = theta - 0.07 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        np.testing.assert_allclose(ours[number - 1], theta, rtol=1e-10)
        assert (second >= 0).all()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_what_is_published_is_the_weighted_mean_of_the_steps(decay: float) -> None:
    """Averaging is the exponential average, its weights adding up to one from the first step on."""
    training = Training(optimizer="sgd", learning_rate=0.07, averaging=decay)
    thetas, published = steps_of_ours(training)
    for number in range(1, STEPS + 1):
        weights = decay ** np.arange(number - 1, -1, -1)
        expected = np.average(thetas[:number], axis=0, weights=weights)
        np.testing.assert_allclose(published[number - 1], expected, rtol=1e-9)


def test_without_averaging_the_last_step_is_published() -> None:
    """Decay 0 publishes the last parameters."""
    thetas, published = steps_of_ours(Training(averaging=0.0))
    np.testing.assert_array_equal(thetas, published)


def test_before_the_first_step_the_start_is_published() -> None:
    """There is nothing to average yet."""
    optimizer = Optimizer(Training(averaging=0.9), np.arange(3.0))
    np.testing.assert_array_equal(optimizer.published, np.arange(3.0))


def test_the_start_is_not_written_to() -> None:
    """The caller's array stays as it is."""
    start = np.ones(6)
    optimizer = Optimizer(Training(), start)
    optimizer.step(np.ones(6))
    assert (start == 1.0).all()


@pytest.mark.parametrize("optimizer", ["adam", "yogi"])
def test_a_gradient_of_zero_moves_nothing(optimizer: str) -> None:
    """No division by zero where a parameter never had a gradient."""
    stepper = Optimizer(Training(optimizer=optimizer), np.ones(2))
    stepper.step(np.array([0.0, 1.0]))
    assert stepper.theta[0] == 1.0
    assert np.isfinite(stepper.theta).all()
