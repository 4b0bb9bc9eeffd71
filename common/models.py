"""The same networks as torch modules: for Opacus, for export, and as a reference."""

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from common.errors import ContractError
from common.network import Network

_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


def torch_module(network: Network, theta: Float[np.ndarray, " P"]) -> nn.Sequential:
    """Return a float64 torch module with the parameters `theta`."""
    layers: list[nn.Module] = []
    for weights in network.layers(theta):
        if layers:
            layers.append(_ACTIVATIONS[network.activation]())
        layer = nn.Linear(weights.shape[1] - 1, weights.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weights[:, :-1])))
            layer.bias.copy_(torch.from_numpy(np.ascontiguousarray(weights[:, -1])))
        layers.append(layer)
    return nn.Sequential(*layers)


def validate_for_privacy(network: Network) -> None:
    """Let Opacus check that every layer treats each customer's row on its own.

    Raises:
        ContractError: Opacus finds a layer that mixes rows.
    """
    from opacus.validators import ModuleValidator

    errors = ModuleValidator.validate(torch_module(network, np.zeros(network.size)), strict=False)
    if errors:
        raise ContractError(f"model: Opacus cannot train it privately: {errors[0]}")
