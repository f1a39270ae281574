"""Small models around Conv -> BatchNormalization: every geometry, type, spelling and scope.

Each function returns a fresh ModelProto; its arguments are what tests vary. `models.RECIPES` names
the combinations that are kept.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from models.network import Network, uniform


def conv_batch_norm(
    name: str,
    rank: int = 2,
    *,
    channels: tuple[int, int] = (4, 6),
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
    stride: int = 1,
    dtype: int = TensorProto.FLOAT,
    opset: int = 17,
    epsilon: float = 1e-5,
) -> onnx.ModelProto:
    """Feed x to Conv or ConvTranspose -> BatchNormalization -> Relu, in 1, 2 or 3 dimensions."""
    net = Network(name, opset, dtype)
    x = net.input("x", ["batch", channels[0], *[9] * rank])
    y = net.conv(
        x,
        "conv",
        channels,
        [3] * rank,
        groups=groups,
        bias=bias,
        transposed=transposed,
        stride=stride,
    )
    y = net.batch_norm(y, "bn", channels[1], epsilon=epsilon)
    net.output(net.op("Relu", y, out="y"), ["batch", channels[1], *[None] * rank])
    return net.model()


def shared_weight(name: str, levels: int = 3) -> onnx.ModelProto:
    """One convolution weight, a norm of its own for each level: the head of a pyramid detector."""
    net = Network(name)
    weight = net.parameter("head.weight", (8, 8, 3, 3), -0.2, 0.2)
    bias = net.parameter("head.bias", (8,), -0.3, 0.3)
    for level in range(levels):
        size = 16 >> level
        x = net.input(f"level{level}", ["batch", 8, size, size])
        y = net.op(
            "Conv", x, weight, bias, out=f"conv{level}", kernel_shape=[3, 3], pads=[1, 1, 1, 1]
        )
        y = net.batch_norm(y, f"bn{level}", 8)
        net.output(net.op("Relu", y, out=f"head{level}"), ["batch", 8, size, size])
    return net.model()


def shared_result(name: str, as_output: bool = False) -> onnx.ModelProto:
    """A convolution whose result somebody else reads: a shortcut, or the caller."""
    net = Network(name)
    x = net.input("x", ["batch", 4, 8, 8])
    conv = net.conv(x, "stem", (4, 6))
    y = net.op("Relu", net.batch_norm(conv, "bn", 6), out="branch")
    if as_output:
        net.output(conv, ["batch", 6, 8, 8])
    else:
        y = net.op("Add", conv, y, out="y")
    net.output(y, ["batch", 6, 8, 8])
    return net.model()


def training_mode(name: str) -> onnx.ModelProto:
    """A norm that normalises by the batch's own statistics."""
    net = Network(name)
    y = net.conv(net.input("x", [2, 4, 8, 8]), "conv", (4, 6))
    y = net.batch_norm(y, "bn", 6, out=["y", "running_mean", "running_var"], training_mode=1)
    net.output(y, [2, 6, 8, 8])
    return net.model()


def dynamic_scale(name: str) -> onnx.ModelProto:
    """A norm whose gamma is computed from an input, as conditional networks do."""
    net = Network(name)
    x, style = net.input("x", ["batch", 4, 8, 8]), net.input("style", [6])
    conv = net.conv(x, "conv", (4, 6))
    _, beta, mean, variance = net.norm_parameters("bn", 6)
    gamma = net.op("Sigmoid", style, out="gamma")
    y = net.op("BatchNormalization", conv, gamma, beta, mean, variance, out="y")
    net.output(y, ["batch", 6, 8, 8])
    return net.model()


def zero_variance(name: str) -> onnx.ModelProto:
    """An epsilon of 0 and one dead channel: gamma / sqrt(variance + epsilon) is infinite."""
    net = Network(name)
    conv = net.conv(net.input("x", ["batch", 4, 8, 8]), "conv", (4, 6))
    variance = np.ones(6)
    variance[2] = 0.0
    y = net.batch_norm(conv, "bn", 6, variance, epsilon=0.0)
    net.output(y, ["batch", 6, 8, 8])
    return net.model()


def spelled_constants(name: str, spelling: str) -> onnx.ModelProto:
    """Parameters as Constant nodes, behind Identity nodes, or as initializers that are inputs.

    Args:
        name: Of the model.
        spelling: "node", "identity" or "input"; the last is how files before IR version 4 have it,
            and there a caller may override them.
    """
    net = Network(name)
    conv = net.conv(net.input("x", ["batch", 4, 8, 8]), "conv", (4, 6), bias=True)
    y = net.batch_norm(conv, "bn", 6)
    net.output(y, ["batch", 6, 8, 8])
    model = net.model()
    graph = model.graph
    if spelling == "input":
        for tensor in graph.initializer:
            graph.input.append(
                helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        return model
    added = []
    for tensor in list(graph.initializer):
        if spelling == "node":
            added.append(helper.make_node("Constant", [], [tensor.name], value=tensor))
            graph.initializer.remove(tensor)
        else:
            original = tensor.name
            tensor.name = f"{original}.stored"
            added.append(helper.make_node("Identity", [tensor.name], [original]))
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def empty_bias(name: str) -> onnx.ModelProto:
    """A bias slot that is there and empty."""
    model = conv_batch_norm(name, bias=False)
    model.graph.node[0].input.append("")
    return model


def chain(name: str) -> onnx.ModelProto:
    """Two norms in a row behind one convolution, then one before the next."""
    net = Network(name)
    y = net.conv(net.input("x", ["batch", 4, 8, 8]), "conv1", (4, 6))
    y = net.batch_norm(net.batch_norm(y, "bn1", 6), "bn2", 6)
    y = net.batch_norm(net.op("Relu", y, out="relu"), "bn3", 6)
    net.output(net.conv(y, "conv2", (6, 5)), ["batch", 5, 8, 8])
    return net.model()


def _branch(name: str, x: str, outer: Network | None) -> onnx.GraphProto:
    """Return a body that reads x from outside; its parameters are its own, or those of `outer`."""
    body = Network(name)
    y = body.batch_norm(body.conv(x, f"{name}.conv", (4, 4)), f"{name}.bn", 4)
    body.output(body.op("Relu", y, out=f"{name}.y"), ["batch", 4, 8, 8])
    if outer is not None:
        outer.initializers.extend(body.initializers)
        body.initializers = []
    return body.graph()


def in_if(name: str) -> onnx.ModelProto:
    """A norm in each branch of an If; one branch keeps its weights in the outer graph."""
    net = Network(name)
    x = net.input("x", ["batch", 4, 8, 8])
    flag = net.input("flag", [], TensorProto.BOOL)
    y = net.op(
        "If",
        flag,
        out="y",
        then_branch=_branch("then", x, None),
        else_branch=_branch("else", x, net),
    )
    net.output(y, ["batch", 4, 8, 8])
    return net.model()


def in_loop(name: str, trips: int = 3) -> onnx.ModelProto:
    """A norm in a Loop body, over a carried value: the unrolled depth of a recurrent refiner."""
    net = Network(name)
    x = net.input("x", ["batch", 4, 8, 8])
    body = Network("body")
    body.input("trip", [], TensorProto.INT64)
    body.input("going", [], TensorProto.BOOL)
    body.input("state", ["batch", 4, 8, 8])
    y = body.batch_norm(body.conv("state", "conv", (4, 4)), "bn", 4)
    still = body.op("Identity", "going", out="still")
    body.output(still, [], TensorProto.BOOL)
    body.output(body.op("Relu", y, out="next"), ["batch", 4, 8, 8])
    count = net.constant("trips", trips, TensorProto.INT64)
    yes = net.constant("yes", True, TensorProto.BOOL)
    net.output(net.op("Loop", count, yes, x, out="y", body=body.graph()), ["batch", 4, 8, 8])
    return net.model()


def in_scan(name: str) -> onnx.ModelProto:
    """A norm in a Scan body: one convolution for each frame of a clip."""
    net = Network(name)
    clip = net.input("clip", [3, 2, 4, 8, 8])
    body = Network("body")
    frame = body.input("frame", [2, 4, 8, 8])
    y = body.batch_norm(body.conv(frame, "conv", (4, 4)), "bn", 4)
    body.output(y, [2, 4, 8, 8])
    y = net.op("Scan", clip, out="y", body=body.graph(), num_scan_inputs=1)
    net.output(y, [3, 2, 4, 8, 8])
    return net.model()


def in_function(name: str) -> onnx.ModelProto:
    """A model-local function ConvNorm, called twice: once constants inside, once as arguments."""
    net = Network(name)
    x = net.input("x", ["batch", 4, 8, 8])
    imports = [helper.make_opsetid("", net.opset)]
    inner = Network("inner")
    y = inner.batch_norm(inner.conv("u", "conv", (4, 4)), "bn", 4)
    for tensor in inner.initializers:  # a function has no initializers
        inner.nodes.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    constants_inside = helper.make_function(
        "models.blocks", "ConvNormInside", ["u"], [y], inner.nodes, imports
    )
    arguments = ["u", "w", "gamma", "beta", "mean", "variance"]
    nodes = [
        helper.make_node("Conv", ["u", "w"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["c", *arguments[2:]], ["v"], epsilon=1e-3),
    ]
    as_arguments = helper.make_function(
        "models.blocks", "ConvNorm", arguments, ["v"], nodes, imports
    )
    net.functions = [as_arguments, constants_inside]
    weight = net.parameter("w", (4, 4, 3, 3), -0.3, 0.3)
    first = net.op("ConvNormInside", x, out="first")
    net.nodes[-1].domain = "models.blocks"
    net.op("ConvNorm", first, weight, *net.norm_parameters("outer", 4), out="y")
    net.nodes[-1].domain = "models.blocks"
    net.output("y", ["batch", 4, 8, 8])
    return net.model()


def mixed_types(name: str) -> onnx.ModelProto:
    """float16 activations with float32 norm parameters, which opset 15 allows."""
    net = Network(name, dtype=TensorProto.FLOAT16)
    conv = net.conv(net.input("x", ["batch", 4, 8, 8]), "conv", (4, 6))
    net.dtype = TensorProto.FLOAT
    y = net.batch_norm(conv, "bn", 6)
    net.output(y, ["batch", 6, 8, 8], TensorProto.FLOAT16)
    return net.model()


def no_nodes(name: str) -> onnx.ModelProto:
    """A graph with no nodes, whose output is its input."""
    net = Network(name)
    net.output(net.input("x", ["batch", 3]), ["batch", 3])
    return net.model()


def odd_sizes(name: str) -> onnx.ModelProto:
    """A scalar, a tensor without elements and a batch that may be empty."""
    net = Network(name)
    x, scalar = net.input("x", ["batch", 4, 8, 8]), net.input("scalar", [])
    nothing = net.constant("nothing", np.zeros((0, 6, 8, 8)))
    y = net.batch_norm(net.conv(x, "conv", (4, 6)), "bn", 6)
    y = net.op("Concat", y, nothing, out="joined", axis=0)
    net.output(net.op("Mul", y, scalar, out="y"), ["batch", 6, 8, 8])
    return net.model()


def quantized_conv(name: str) -> onnx.ModelProto:
    """A QDQ model: int8 weight and uint8 activations around Conv, a float norm behind it."""
    net = Network(name)
    x = net.input("x", ["batch", 4, 8, 8])
    scale = net.constant("x.scale", 1 / 64)
    zero = net.constant("x.zero", 128, TensorProto.UINT8)
    q = net.op("QuantizeLinear", x, scale, zero, out="x.quantized")
    y = net.op("DequantizeLinear", q, scale, zero, out="x.again")
    stored = np.floor(uniform(f"{name}/weight", (6, 4, 3, 3), -127.0, 128.0))
    weight = net.op(
        "DequantizeLinear",
        net.constant("weight.stored", stored, TensorProto.INT8),
        net.constant("weight.scale", uniform(f"{name}/scale", (6,), 1 / 512, 1 / 256)),
        net.constant("weight.zero", np.zeros(6), TensorProto.INT8),
        out="weight",
        axis=0,
    )
    y = net.op("Conv", y, weight, out="conv", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    net.output(net.batch_norm(y, "bn", 6), ["batch", 6, 8, 8])
    return net.model()


def dynamically_quantized(name: str) -> onnx.ModelProto:
    """Conv and norm in front of a dynamically quantized MatMul, whose roundings flip easily."""
    net = Network(name)
    y = net.conv_batch_norm(net.input("x", ["batch", 4, 8, 8]), "stem", (4, 8))
    y = net.op("Flatten", net.op("Relu", y, out="relu"), out="flat", axis=1)
    net.op("DynamicQuantizeLinear", y, out=["q", "q.scale", "q.zero"])
    stored = np.floor(uniform(f"{name}/weight", (512, 10), -127.0, 128.0))
    weight = net.constant("weight.stored", stored, TensorProto.INT8)
    net.op("MatMulInteger", "q", weight, "q.zero", out="product")
    y = net.op("Cast", "product", out="product.float", to=TensorProto.FLOAT)
    y = net.op("Mul", y, "q.scale", out="rescaled")
    net.output(net.op("Mul", y, net.constant("scale", 1 / 512), out="y"), ["batch", 10])
    return net.model()


def random_noise(name: str) -> onnx.ModelProto:
    """A random operator without a seed: two runs of the model differ by themselves."""
    net = Network(name)
    y = net.conv_batch_norm(net.input("x", [2, 4, 8, 8]), "stem", (4, 6))
    noise = net.op("RandomNormalLike", y, out="noise", mean=0.0, scale=0.5)
    net.output(net.op("Add", y, noise, out="y"), [2, 6, 8, 8])
    return net.model()


def labels(name: str) -> onnx.ModelProto:
    """Logits and their ArgMax: an integer output that may only change where logits tie."""
    net = Network(name)
    y = net.conv_batch_norm(net.input("x", ["batch", 4, 8, 8]), "stem", (4, 6))
    y = net.op("GlobalAveragePool", net.op("Relu", y, out="relu"), out="pooled")
    y = net.op("Flatten", y, out="logits", axis=1)
    net.output(y, ["batch", 6])
    net.output(net.op("ArgMax", y, out="label", axis=1, keepdims=0), ["batch"], TensorProto.INT64)
    return net.model()
