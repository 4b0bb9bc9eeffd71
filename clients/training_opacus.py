"""The same sum with Opacus' per-sample gradients: much slower, for any module Opacus validates.

One customer at a time: Opacus' matrix products round differently with the number of rows, and a
hostile choice of parameters can blow that up (see `clients.kernel`).
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from opacus import GradSampleModule

from common.models import torch_module, validate_for_privacy
from common.network import Network


def prepare(network: Network) -> None:
    """Let Opacus check the network, and torch use one thread.

    Small batches are slower, and not repeatable, with more threads.

    Raises:
        ContractError: Opacus cannot train it privately.
    """
    validate_for_privacy(network)
    torch.set_num_threads(1)


def clipped_gradient_sum_opacus(
    network: Network,
    theta: Float[np.ndarray, " P"],
    x: Float[np.ndarray, "R F"],
    y: Int[np.ndarray, " R"],
    clip_norm: float,
) -> Float[np.ndarray, " P"]:
    """Sum each customer's clipped gradient; see `clients.training.clipped_gradient_sum`."""
    module = GradSampleModule(torch_module(network, theta), loss_reduction="sum")
    total = torch.zeros(network.size, dtype=torch.float64)
    for row in range(len(x)):
        module.zero_grad(set_to_none=True)
        # Opacus' backward hooks warn where no input requires a gradient
        logits = module(torch.from_numpy(x[row : row + 1]).requires_grad_())
        label = torch.from_numpy(y[row : row + 1])
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits, label, reduction="sum"))
        gradient = _flat_gradient(module)
        norm = torch.linalg.vector_norm(gradient)
        total += gradient * (clip_norm / (norm + 1e-6)).clamp(max=1.0)
    return total.numpy()


def _flat_gradient(module: GradSampleModule) -> torch.Tensor:
    """Return one customer's gradient [P] in the flat layout: [out, in + 1] a layer, bias last."""
    weights = [p.grad_sample for name, p in module.named_parameters() if name.endswith("weight")]
    biases = [p.grad_sample for name, p in module.named_parameters() if name.endswith("bias")]
    return torch.cat(
        [
            torch.cat([w, b.unsqueeze(2)], dim=2).flatten()
            for w, b in zip(weights, biases, strict=True)
        ]
    )
