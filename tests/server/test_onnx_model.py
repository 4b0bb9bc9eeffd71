"""The published ONNX model against torch."""

import numpy as np
import onnxruntime
import pytest
import torch

from common.errors import BundleError
from common.models import torch_module
from common.network import Network
from common.onnx_model import onnx_bytes
from server.onnx_model import check_parity

NETWORKS = [
    Network((7, 4)),
    Network((1, 2)),
    Network((7, 16, 4), "relu"),
    Network((7, 16, 4), "tanh"),
    Network((7, 9, 5, 3), "relu"),
    Network((7, 9, 5, 3), "tanh"),
]


def drawn(network: Network, scale: float = 1.0) -> np.ndarray:
    """Draw parameters, as float32 numbers."""
    random = np.random.default_rng(5).normal(size=network.size) * scale
    return random.astype(np.float32).astype(np.float64)


def run_onnx(model: bytes, inputs: np.ndarray) -> np.ndarray:
    """Apply a serialised model."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"inputs": inputs})[0])


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_onnx_gives_the_probabilities_of_torch(network: Network) -> None:
    """To 1e-5, on inputs of its own."""
    theta = drawn(network)
    inputs = np.random.default_rng(6).uniform(-1, 1, (50, network.dims[0])).astype(np.float32)
    with torch.no_grad():
        logits = torch_module(network, theta)(torch.from_numpy(inputs.astype(np.float64)))
    expected = torch.softmax(logits, dim=1).numpy()
    np.testing.assert_allclose(run_onnx(onnx_bytes(network, theta), inputs), expected, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_parity_is_found_where_it_is(network: Network) -> None:
    """The largest difference is returned."""
    theta = drawn(network)
    assert 0 <= check_parity(network, theta, onnx_bytes(network, theta)) <= 1e-5


def test_another_model_is_refused() -> None:
    """A model that differs from torch is never published."""
    network = NETWORKS[2]
    with pytest.raises(BundleError, match=r"model\.onnx differs from torch"):
        check_parity(network, drawn(network), onnx_bytes(network, drawn(network) + 0.01))


def test_parameters_that_are_not_finite_are_refused() -> None:
    """No difference can be told, so there is no parity."""
    network = NETWORKS[0]
    theta = np.full(network.size, np.nan)
    with pytest.raises(BundleError):
        check_parity(network, theta, onnx_bytes(network, theta))


def test_any_number_of_rows_may_be_asked_for() -> None:
    """None, one, or many."""
    network = NETWORKS[2]
    model = onnx_bytes(network, drawn(network))
    for rows in (0, 1, 1000):
        assert run_onnx(model, np.zeros((rows, 7), dtype=np.float32)).shape == (rows, 4)


def test_large_parameters_do_not_overflow() -> None:
    """Softmax is taken safely."""
    network = NETWORKS[0]
    found = run_onnx(onnx_bytes(network, drawn(network, 1e4)), np.ones((3, 7), dtype=np.float32))
    np.testing.assert_allclose(found.sum(axis=1), 1.0, rtol=1e-6)
