"""The published ONNX model is held against torch before it is published."""

import numpy as np
from jaxtyping import Float

from common.errors import BundleError
from common.network import Network
from common.onnx_model import onnx_session


def check_parity(
    network: Network, theta: Float[np.ndarray, " P"], model: bytes, tolerance: float = 1e-5
) -> float:
    """Compare ONNX with torch on 256 random inputs; return the largest difference.

    Raises:
        BundleError: The two differ by more than `tolerance`.
    """
    import torch

    from common.models import torch_module

    inputs = np.random.default_rng(0).uniform(-1, 1, (256, network.dims[0])).astype(np.float32)
    session = onnx_session(model)
    found = session.run(None, {"inputs": inputs})[0]
    with torch.no_grad():
        module = torch_module(network, theta)
        expected = torch.softmax(module(torch.from_numpy(inputs.astype(np.float64))), dim=1)
    difference = float(np.abs(found - expected.numpy()).max())
    if not difference <= tolerance:
        raise BundleError(
            f"model.onnx differs from torch by {difference:.2g} (allowed: {tolerance:g}); "
            "the bundle was not written"
        )
    return difference
