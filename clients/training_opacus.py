"""The same sum with Opacus' per-sample gradients: slower, for any module Opacus validates."""

import numpy as np
import torch
from jaxtyping import Float, Int
from opacus import GradSampleModule

from common.models import torch_module
from common.network import Network

_BLOCK_ROWS = 1024  # per-sample gradients are [rows, P]


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
    for start in range(0, len(x), _BLOCK_ROWS):
        module.zero_grad(set_to_none=True)
        # Opacus' backward hooks warn where no input requires a gradient
        inputs = torch.from_numpy(x[start : start + _BLOCK_ROWS]).requires_grad_()
        logits = module(inputs)
        labels = torch.from_numpy(y[start : start + _BLOCK_ROWS])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        torch.autograd.backward(loss)
        rows = _flat_gradients(module, len(labels))
        norms = torch.linalg.vector_norm(rows, dim=1)
        factor = (clip_norm / (norms + 1e-6)).clamp(max=1.0)
        total += factor @ rows
    return total.numpy()


def _flat_gradients(module: GradSampleModule, rows: int) -> torch.Tensor:
    """Return [rows, P] in the flat layout: [out, in + 1] a layer, the bias last."""
    weights = [p.grad_sample for name, p in module.named_parameters() if name.endswith("weight")]
    biases = [p.grad_sample for name, p in module.named_parameters() if name.endswith("bias")]
    return torch.cat(
        [
            torch.cat([w, b.unsqueeze(2)], dim=2).reshape(rows, -1)
            for w, b in zip(weights, biases, strict=True)
        ],
        dim=1,
    )
