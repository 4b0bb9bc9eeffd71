"""The published model as ONNX: inputs [rows, F] float32 -> probabilities [rows, S] float32."""

import numpy as np
from jaxtyping import Float

from common.errors import BundleError
from common.network import Network

_OPSET, _IR_VERSION = 17, 8
_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh"}


def onnx_bytes(network: Network, theta: Float[np.ndarray, " P"]) -> bytes:
    """Return a serialised ONNX model of the network."""
    from onnx import TensorProto, checker, helper, numpy_helper

    nodes, weights, current = [], [], "inputs"
    layers = network.layers(theta)
    for number, layer in enumerate(layers):
        names = [f"weight{number}", f"bias{number}"]
        values = [layer[:, :-1].astype(np.float32), layer[:, -1].astype(np.float32)]
        weights += [numpy_helper.from_array(v, n) for v, n in zip(values, names, strict=True)]
        nodes.append(helper.make_node("Gemm", [current, *names], [f"z{number}"], transB=1))
        current = f"z{number}"
        if number < len(layers) - 1:
            operator = _ACTIVATIONS[network.activation]
            nodes.append(helper.make_node(operator, [current], [f"h{number}"]))
            current = f"h{number}"
    nodes.append(helper.make_node("Softmax", [current], ["probabilities"], axis=1))
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "hansa",
        [helper.make_tensor_value_info("inputs", floats, ["rows", network.dims[0]])],
        [helper.make_tensor_value_info("probabilities", floats, ["rows", network.dims[-1]])],
        weights,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="hansa"
    )
    model.ir_version = _IR_VERSION
    checker.check_model(model)
    return bytes(model.SerializeToString())


def check_parity(
    network: Network, theta: Float[np.ndarray, " P"], model: bytes, tolerance: float = 1e-5
) -> float:
    """Compare ONNX with torch on 256 random inputs; return the largest difference.

    Raises:
        BundleError: The two differ by more than `tolerance`.
    """
    import onnxruntime
    import torch

    from common.models import torch_module

    inputs = np.random.default_rng(0).uniform(-1, 1, (256, network.dims[0])).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
