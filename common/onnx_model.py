"""The network as ONNX: as it is published, and as a merchant applies it to its customers."""

from typing import Any

import numpy as np
from jaxtyping import Float

from common.network import Network

_OPSET, _IR_VERSION = 17, 8
_Named = tuple[str, list[Any]]
_ACTIVATIONS = {"relu": "Relu", "tanh": "Tanh"}


def onnx_bytes(network: Network, theta: Float[np.ndarray, " P"]) -> bytes:
    """Return the published model: `inputs` [rows, F] -> `probabilities` [rows, S], float32."""
    from onnx import helper

    nodes, weights = _layers(network, theta)
    nodes.append(helper.make_node("Softmax", [_last(network)], ["probabilities"], axis=1))
    inputs, outputs = ["rows", network.dims[0]], ["rows", network.dims[-1]]
    return _serialised(nodes, weights, ("inputs", inputs), ("probabilities", outputs))


def onnx_logits_bytes(network: Network, theta: Float[np.ndarray, " P"]) -> bytes:
    """Return the same up to the last layer: `inputs` [rows, F] -> `logits` [S, rows], float32."""
    from onnx import helper

    nodes, weights = _layers(network, theta)
    nodes.append(helper.make_node("Transpose", [_last(network)], ["logits"], perm=[1, 0]))
    inputs, outputs = ["rows", network.dims[0]], [network.dims[-1], "rows"]
    return _serialised(nodes, weights, ("inputs", inputs), ("logits", outputs))


def onnx_exponential_bytes() -> bytes:
    """Return a model that does no more than `numbers` -> `exponentials` of any matrix, float32."""
    from onnx import helper

    node = helper.make_node("Exp", ["numbers"], ["exponentials"])
    shape = ["segments", "rows"]
    return _serialised([node], [], ("numbers", shape), ("exponentials", shape))


def onnx_session(model: bytes) -> Any:
    """Return an `onnxruntime.InferenceSession` that runs a serialised model on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _last(network: Network) -> str:
    return f"z{len(network.dims) - 2}"


def _layers(network: Network, theta: Float[np.ndarray, " P"]) -> tuple[list[Any], list[Any]]:
    """Return the nodes from `inputs` to the last layer's logits, and their weights."""
    from onnx import helper, numpy_helper

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
    return nodes, weights


def _serialised(nodes: list[Any], weights: list[Any], inputs: _Named, outputs: _Named) -> bytes:
    from onnx import TensorProto, checker, helper

    given, found = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (inputs, outputs)
    )
    graph = helper.make_graph(nodes, "hansa", [given], [found], weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="hansa"
    )
    model.ir_version = _IR_VERSION
    checker.check_model(model)
    return bytes(model.SerializeToString())
