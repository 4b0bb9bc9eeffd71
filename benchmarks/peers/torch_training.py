"""The model and one merchant's epoch in PyTorch, with and without Opacus."""

import warnings

import numpy as np
import torch
from torch import nn


def model_of(layers: "list[tuple[np.ndarray, np.ndarray]]") -> nn.Sequential:
    """Return the classifier with these parameters."""
    parts: list[nn.Module] = []
    for weights, bias in layers:
        linear = nn.Linear(weights.shape[1], weights.shape[0])
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weights))
            linear.bias.copy_(torch.from_numpy(bias))
        parts += [linear, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def layers_of(model: nn.Module) -> "list[tuple[np.ndarray, np.ndarray]]":
    """Return a model's parameters, layer by layer."""
    values = [one.detach().numpy() for one in model.parameters()]
    return list(zip(values[::2], values[1::2], strict=True))


def epoch(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int, learning_rate: float
) -> None:
    """Take one epoch of shuffled batches, without privacy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    order = torch.randperm(len(x))
    for start in range(0, len(x), batch):
        rows = order[start : start + batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()


class PrivateEpoch:
    """One epoch of DP-SGD by Opacus, hooks and optimizer made once for all merchants.

    Poisson batches; a model and an engine for every merchant, as Flower's example makes them,
    would take longer.
    """

    def __init__(self, model: nn.Module, clip_norm: float, noise_multiplier: float) -> None:
        from opacus import GradSampleModule

        warnings.filterwarnings("ignore")  # Opacus' hooks warn about inputs without gradients
        self.model = model
        self._module = GradSampleModule(model, loss_reduction="mean")
        self._clip_norm, self._noise_multiplier = clip_norm, noise_multiplier

    def __call__(
        self, x: torch.Tensor, y: torch.Tensor, batch: int, steps: int, learning_rate: float
    ) -> None:
        """Take the steps."""
        from opacus.optimizers import DPOptimizer

        optimizer = DPOptimizer(
            torch.optim.SGD(self._module.parameters(), lr=learning_rate),
            noise_multiplier=self._noise_multiplier,
            max_grad_norm=self._clip_norm,
            expected_batch_size=batch,
        )
        for _ in range(steps):
            rows = (torch.rand(len(x)) < batch / len(x)).nonzero().flatten()
            optimizer.zero_grad()
            nn.functional.cross_entropy(self._module(x[rows]), y[rows]).backward()
            optimizer.step()
