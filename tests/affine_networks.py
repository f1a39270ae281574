"""Networks whose residual streams carry affine norms: post-norm transformers and residual CNNs."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import onnx

from tests.networks import Net

Style: TypeAlias = Literal[
    "operator", "between transposes", "sum", "unified", "written out", "scale", "none"
]


def channel_norm(
    net: Net,
    x: str,
    size: int,
    *,
    style: Style = "between transposes",
    signed: bool = True,
    low: float = 0.5,
    tokens: bool = True,
) -> str:
    """A norm with fixed statistics over the last axis, or over axis 1 of a feature map.

    Args:
        net: The net.
        x: What it normalizes.
        size: Number of channels.
        style: How it is written.
        signed: Some scales are below 0.
        low: The least absolute scale; the largest is twice that.
        tokens: The channels are the last axis, and not axis 1 of (N, C, H, W).
    """
    if style == "none":
        return x
    gamma = low * (1.0 + net.random.random(size))
    if signed:
        gamma *= net.random.choice([-1.0, 1.0], size)
    beta = net.random.normal(size=size)
    if style == "unified":  # (N, L, C) as (N, C, L, 1), divided, multiplied and added to
        moved = net.op("Unsqueeze", net.op("Transpose", x, perm=[0, 2, 1]), net.ints(-1))
        parts = [net.keep(a.reshape(1, size, 1, 1)) for a in (1.0 / gamma, gamma * gamma, beta)]
        moved = net.op("Mul", parts[1], net.op("Div", moved, parts[0]))
        moved = net.op("Squeeze", net.op("Add", moved, parts[2]), net.ints(-1))
        return net.op("Transpose", moved, perm=[0, 2, 1])
    if style in ("operator", "between transposes", "sum"):
        # gamma / sqrt(variance + epsilon) is gamma up to a factor of 2^0.5
        statistics = (net.random.normal(size=size), 0.8 + 0.4 * net.random.random(size))
        given = [net.keep(a, "statistic") for a in (gamma, beta, *statistics)]
        if not tokens or style == "operator":
            return net.op("BatchNormalization", x, *given)
        turned = net.op("Transpose", x, perm=[0, 2, 1])
        moved = net.op("BatchNormalization", turned, *given)
        if style == "sum":  # RepBN: what the norm gives and a part of what it was given
            moved = net.op("Add", moved, net.op("Mul", net.scalar(0.25 * low), turned))
        return net.op("Transpose", moved, perm=[0, 2, 1])
    shape = (size,) if tokens else (1, size, 1, 1)
    y = net.op("Mul", x, net.keep(gamma.reshape(shape), "gamma"))
    return y if style == "scale" else net.op("Add", y, net.keep(beta.reshape(shape), "beta"))


def post_norm_transformer(  # the options of a family of models, all in one place
    *,
    layers: int = 2,
    size: int = 8,
    style: Style = "between transposes",
    stem: Literal["linear", "gelu", "embedding"] = "linear",
    bias: bool = True,
    signed: bool = True,
    low: float = 0.5,
    hidden: bool = False,
    whole: bool = False,
    dtype: Any = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """A post-norm transformer: x' = norm(x + f(x)), as Unified Normalization has it.

    Args:
        layers: Number of blocks.
        size: Width.
        style: How its norms are written.
        stem: What writes the stream first.
        bias: Whether the last linear layer of a branch has one.
        signed: Some scales are below 0.
        low: The least absolute scale.
        hidden: The stream after the first block is a graph output.
        whole: The stream itself is the output, and no head reads it.
        dtype: The type.
        seed: Of the weights.
    """
    net = Net(dtype=dtype, seed=seed)
    if stem == "embedding":
        ids = net.input("ids", ["batch", 5], onnx.TensorProto.INT64)
        table = net.keep(net.random.normal(size=(11, size)), "table")
        x = net.op("Gather", table, ids)
        x = net.op("Add", x, net.keep(net.random.normal(size=(1, 5, size)), "position"))
    else:
        x = net.linear(net.input("x", ["batch", 5, 6]), 6, size)
        if stem == "gelu":
            x = net.op("Mul", x, net.op("Sigmoid", x))
    outputs = []
    for layer in range(layers):
        branch = net.attention(x, size)
        x = channel_norm(net, net.op("Add", x, branch), size, style=style, signed=signed, low=low)
        inner = net.op("Relu", net.linear(x, size, 2 * size))
        branch = net.linear(inner, 2 * size, size, bias=bias)
        x = channel_norm(net, net.op("Add", branch, x), size, style=style, signed=signed, low=low)
        if hidden and layer == 0:
            outputs.append(x)
    return net.model(*outputs, x if whole else net.linear(x, size, 3))


def post_norm_resnet(
    *,
    blocks: int = 2,
    size: int = 6,
    relu: bool = True,
    style: Style = "operator",
    signed: bool = False,
    low: float = 0.5,
    pool: bool = False,
    bottleneck: bool = False,
    dtype: Any = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """A residual CNN with the norm behind the addition: x' = relu(norm(x + f(x))).

    Args:
        blocks: Number of blocks.
        size: Channels.
        relu: Whether a Relu follows each norm.
        style: How its norms are written.
        signed: Some scales are below 0.
        low: The least absolute scale.
        pool: A max pooling stands in the middle.
        bottleneck: The branch is a depthwise convolution between two others.
        dtype: The type.
        seed: Of the weights.
    """
    net = Net(dtype=dtype, seed=seed)
    same = [1, 1, 1, 1]

    def conv(x: str, before: int, after: int, kernel: int = 3, group: int = 1) -> str:
        weight = net.matrix(after, before // group, kernel, kernel)
        pads = same if kernel == 3 else [0] * 4
        return net.op("Conv", x, weight, net.vector(after, 0.2), pads=pads, group=group)

    x = conv(net.input("x", ["batch", 3, 8, 8]), 3, size)
    for block in range(blocks):
        if bottleneck:
            f = conv(conv(x, size, size, group=size), size, size, kernel=1)
        else:
            f = conv(net.op("Relu", conv(x, size, size)), size, size)
        x = net.op("Add", x, f)
        x = channel_norm(net, x, size, style=style, signed=signed, low=low, tokens=False)
        if relu:
            x = net.op("Relu", x)
        if pool and block == 0:
            x = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.matrix(size, 4), net.vector(4)))


def pre_activation_resnet(
    *,
    blocks: int = 3,
    size: int = 6,
    act: Literal["Relu", "LeakyRelu", "Sigmoid"] = "Relu",
    style: Style = "operator",
    signed: bool = False,
    low: float = 1.0,
    pool: bool = False,
    kind: Literal["Add", "Sub", "Sum"] = "Add",
    dtype: Any = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """A residual CNN with the norm in front of the branch: x' = x + f(relu(norm(x))).

    Args:
        blocks: Number of blocks.
        size: Channels.
        act: What follows each norm.
        style: How its norms are written.
        signed: Some scales are below 0.
        low: The least absolute scale.
        pool: The second block halves the image, and its skip path is a max pooling.
        kind: How the branch is added.
        dtype: The type.
        seed: Of the weights.
    """
    net = Net(dtype=dtype, seed=seed)

    def conv(x: str, before: int, stride: int = 1) -> str:
        weight = net.matrix(size, before, 3, 3)
        strides = [stride, stride]
        return net.op("Conv", x, weight, net.vector(size, 0.2), pads=[1] * 4, strides=strides)

    def norm(x: str) -> str:
        y = channel_norm(net, x, size, style=style, signed=signed, low=low, tokens=False)
        return net.op(act, y)

    x = conv(net.input("x", ["batch", 3, 8, 8]), 3)
    for block in range(blocks):
        halves = pool and block == 1
        branch = conv(net.op("Relu", conv(norm(x), size)), size, 2 if halves else 1)
        if halves:
            x = net.op("MaxPool", x, kernel_shape=[1, 1], strides=[2, 2])
        x = net.op(kind, *((branch, x) if block % 2 else (x, branch)))
    x = net.op("Flatten", net.op("GlobalAveragePool", norm(x)))
    return net.model(net.op("Gemm", x, net.matrix(size, 4), net.vector(4)))


def graph_transformer(*, layers: int = 2, size: int = 8, seed: int = 0) -> onnx.ModelProto:
    """A graph transformer with norms of fixed statistics behind its additions, on masked graphs.

    Scores are products of a query, a key and the edge between the two, clipped before the
    exponential; nodes and edges both have a stream. Source: V. P. Dwivedi, X. Bresson, "A
    Generalization of Transformer Networks to Graphs" (2020), equations 5 to 12.
    """
    net = Net(seed=seed)
    nodes = net.linear(net.input("nodes", ["batch", 5, 6]), 6, size)
    edges = net.linear(net.input("edges", ["batch", 5, 5, 3]), 3, size)
    mask = net.input("mask", ["batch", 5, 5, 1])

    def norm(x: str, perm: list[int]) -> str:
        back = [perm.index(a) for a in range(len(perm))]
        given = [net.keep(0.5 + net.random.random(size)), net.vector(size), net.vector(size)]
        given.append(net.keep(0.5 + net.random.random(size)))
        moved = net.op("BatchNormalization", net.op("Transpose", x, perm=perm), *given)
        return net.op("Transpose", moved, perm=back)

    def node_norm(x: str) -> str:
        return norm(x, [0, 2, 1])

    def edge_norm(x: str) -> str:
        return norm(x, [0, 3, 1, 2])

    for _ in range(layers):
        q = net.op("Unsqueeze", net.linear(nodes, size, size), net.ints(2))
        k = net.op("Unsqueeze", net.linear(nodes, size, size), net.ints(1))
        v = net.op("Unsqueeze", net.linear(nodes, size, size), net.ints(1))
        scores = net.op("Mul", net.op("Mul", q, k), net.linear(edges, size, size))
        clipped = net.op("Clip", scores, net.scalar(-5.0), net.scalar(5.0))
        weights = net.op("Mul", net.op("Exp", clipped), mask)
        total = net.op("ReduceSum", weights, net.ints(2), keepdims=0)
        mixed = net.op("ReduceSum", net.op("Mul", weights, v), net.ints(2), keepdims=0)
        mixed = net.op("Div", mixed, net.op("Add", total, net.scalar(1.0)))
        nodes = node_norm(net.op("Add", nodes, net.linear(mixed, size, size)))
        edges = edge_norm(net.op("Add", edges, net.linear(scores, size, size)))
        nodes = node_norm(net.op("Add", nodes, net.mlp(nodes, size)))
        edges = edge_norm(net.op("Add", edges, net.mlp(edges, size)))
    return net.model(net.linear(nodes, size, 3), net.linear(edges, size, 2))


def zero_residual_network(
    *, blocks: int = 2, size: int = 8, beta: float = 0.0, alive: int = 0, seed: int = 0
) -> onnx.ModelProto:
    """A residual network whose last norm of each branch has gamma 0, as initialized for training.

    Args:
        blocks: Number of blocks.
        size: Channels.
        beta: The bias of those norms.
        alive: How many of their channels have gamma 1.
        seed: Of the weights.
    """
    net = Net(seed=seed)

    def conv_norm(x: str, before: int, gamma: float) -> str:
        y = net.op("Conv", x, net.matrix(size, before, 3, 3), pads=[1, 1, 1, 1])
        bias = np.full(size, beta) if gamma == 0.0 else net.random.normal(size=size)
        scale = np.where(np.arange(size) < alive, 1.0, gamma)
        given = [scale, bias, net.random.normal(size=size), np.ones(size)]
        return net.op("BatchNormalization", y, *(net.keep(a) for a in given))

    x = net.op("Relu", conv_norm(net.input("x", ["batch", 3, 8, 8]), 3, 1.0))
    for _ in range(blocks):
        branch = conv_norm(net.op("Relu", conv_norm(x, size, 1.0)), size, 0.0)
        x = net.op("Relu", net.op("Add", x, branch))
    x = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("Gemm", x, net.matrix(size, 4), net.vector(4)))


def mobile_network(
    *, blocks: int = 2, size: int = 4, dead: int = 3, squeeze: bool = False, seed: int = 0
) -> onnx.ModelProto:
    """Inverted residuals with dead channels in the depthwise convolutions and in front of them.

    Args:
        blocks: Number of blocks.
        size: Width of the stream; inside a block it is four times that.
        dead: Dead channels of each kind.
        squeeze: Whether channels are gated by what is pooled of them.
        seed: Of the weights.
    """
    net = Net(seed=seed)
    wide = 4 * size

    def conv(x: str, before: int, after: int, dead: range = range(0), group: int = 1) -> str:
        kernel = 3 if group > 1 else 1
        weight = net.random.normal(size=(after, before // group, kernel, kernel)) / before**0.5
        bias = net.random.normal(size=after)
        weight[dead] = 0.0
        bias[dead] = -np.abs(bias[dead])  # Relu makes 0 of it, which padding does not change
        pads = [kernel // 2] * 4
        return net.op("Conv", x, net.keep(weight), net.keep(bias), pads=pads, group=group)

    x = conv(net.input("x", ["batch", 3, 8, 8]), 3, size)
    for _ in range(blocks):
        y = net.op("Relu", conv(x, size, wide, range(dead)))
        y = net.op("Relu", conv(y, wide, wide, range(dead, 2 * dead), group=wide))
        if squeeze:
            gate = net.op("Relu", conv(net.op("GlobalAveragePool", y), wide, size))
            y = net.op("Mul", y, net.op("Sigmoid", conv(gate, size, wide)))
        x = net.op("Add", x, conv(y, wide, size))
    x = net.op("Reshape", net.op("GlobalAveragePool", x), net.ints(0, size))
    return net.model(net.op("Gemm", x, net.matrix(size, 4), net.vector(4)))
