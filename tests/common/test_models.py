"""Tests of the torch modules: the same network, which Opacus accepts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common.models
from common.errors import ContractError
from common.models import torch_module, validate_for_privacy
from common.network import Network

networks = st.builds(
    Network,
    st.lists(st.integers(1, 9), min_size=2, max_size=5).map(tuple),
    st.sampled_from(["relu", "tanh"]),
)


@settings(max_examples=30, deadline=None)
@given(networks, st.integers(0, 2**32))
def test_forward_equals_numpy(network: Network, seed: int) -> None:
    """Torch and numpy give the same probabilities to 1e-12."""
    generator = np.random.default_rng(seed)
    theta, x = generator.normal(size=network.size), generator.uniform(-1, 1, (6, network.dims[0]))
    with torch.inference_mode():
        ours = torch_module(network, theta)(torch.from_numpy(x)).softmax(1).numpy()
    np.testing.assert_allclose(ours, network.probabilities(theta, x), rtol=1e-12, atol=1e-12)


def test_keeps_its_own_parameters() -> None:
    """Training the module does not write into the caller's vector."""
    theta = np.zeros(Network((2, 2)).size)
    module = torch_module(Network((2, 2)), theta)
    with torch.no_grad():
        module[0].weight.fill_(1.0)
    assert not theta.any()


@pytest.mark.parametrize("dims", [(3, 2), (3, 4, 2), (3, 4, 5, 6, 2)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_opacus_accepts(dims: tuple[int, ...], activation: str) -> None:
    """Opacus finds no layer that mixes customers."""
    validate_for_privacy(Network(dims, activation))


def test_opacus_refuses_mixing_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that looks at other rows is refused in words."""
    monkeypatch.setitem(common.models._ACTIVATIONS, "relu", lambda: torch.nn.BatchNorm1d(4))
    with pytest.raises(ContractError, match="cannot train it privately"):
        validate_for_privacy(Network((3, 4, 2)))
