"""Transformers in plain ONNX, small and with random weights: what tests of streams run on.

`transformer` builds every placement of the norms that the literature has, and `Net` what is not one
of them. Weights are drawn so that the streams have a mean: a wrong conversion is then far off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Placement: TypeAlias = Literal["pre", "post", "mix", "peri"]
Stem: TypeAlias = Literal["embedding", "patches", "linear", "gelu", "input"]


@dataclass
class Net:
    """A graph in the making; every method adds nodes and returns the name of the result.

    Attributes:
        opset: The opset.
        dtype: The type of all real values.
        seed: Of the weights.
    """

    opset: int = 17
    dtype: Any = np.float32
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, onnx.TensorProto] = field(default_factory=dict)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self._count = 0

    def name(self, role: str) -> str:
        """A name that nothing has."""
        self._count += 1
        return f"{role}_{self._count}"

    def keep(self, array: NDArray[Any], role: str = "w", name: str | None = None) -> str:
        """An initializer; real values take the type of the net."""
        array = np.asarray(array)
        if array.dtype.kind == "f":
            array = array.astype(self.dtype)
        name = name or self.name(role)
        self.weights[name] = numpy_helper.from_array(array, name)
        return name

    def ints(self, *values: int) -> str:
        """A list of integers."""
        return self.keep(np.asarray(values, dtype=np.int64), "ints")

    def scalar(self, value: float) -> str:
        """A real number."""
        return self.keep(np.asarray(value, dtype=np.float64), "scalar")

    def matrix(self, *shape: int) -> str:
        """Random weights whose columns have different means."""
        fan = int(np.prod(shape[:-1])) or 1
        values = self.random.normal(size=shape) / np.sqrt(fan) + self.random.normal(size=1) * 0.1
        return self.keep(values, "weight")

    def vector(self, size: int, center: float = 0.0) -> str:
        """A random bias, or scale around `center`."""
        return self.keep(center + self.random.normal(size=size) * 0.5, "vector")

    def input(self, name: str, shape: Sequence[int | str], element: int | None = None) -> str:
        """A graph input."""
        kind = element or helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, list(shape)))
        return name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attrs: Any) -> str:
        """A node with one output."""
        output = name or self.name(kind.lower())
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attrs))
        return output

    def many(self, kind: str, *inputs: str, outputs: int, **attrs: Any) -> list[str]:
        """A node with several outputs."""
        names = [self.name(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=names[0], **attrs))
        return names

    def linear(self, x: str, size: int, out: int, *, bias: bool = True) -> str:
        """X W + b."""
        y = self.op("MatMul", x, self.matrix(size, out))
        return self.op("Add", y, self.vector(out, 0.3)) if bias else y

    def norm(
        self, x: str, size: int, *, affine: bool = True, uniform: bool = False, bias: bool = True
    ) -> str:
        """A layer norm over the last axis."""
        gamma = np.ones(size) if not affine else 1.0 + 0.3 * self.random.normal(size=size)
        if uniform:
            gamma = np.full(size, 0.75)
        inputs = [x, self.keep(gamma, "gamma")]
        if affine and bias:
            inputs.append(self.vector(size, 0.2))
        return self.op("LayerNormalization", *inputs, axis=-1, epsilon=1e-5)

    def attention(
        self,
        x: str,
        size: int,
        heads: int = 2,
        memory: str | None = None,
        *,
        key_bias: bool = True,
        mask: str | None = None,
    ) -> str:
        """Self attention, or attention to `memory`; heads are split and merged."""
        source = memory or x
        each = size // heads
        split = self.ints(0, 0, heads, each)
        q, k, v = (
            self.op(
                "Transpose",
                self.op("Reshape", self.linear(s, size, size, bias=b), split),
                perm=p,
            )
            for s, p, b in (
                (x, [0, 2, 1, 3], True),
                (source, [0, 2, 3, 1], key_bias),
                (source, [0, 2, 1, 3], True),
            )
        )
        scores = self.op("Mul", self.op("MatMul", q, k), self.scalar(each**-0.5))
        if mask is not None:
            scores = self.op("Add", scores, mask)
        mixed = self.op("MatMul", self.op("Softmax", scores, axis=-1), v)
        merged = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        return self.linear(self.op("Reshape", merged, self.ints(0, 0, size)), size, size)

    def mlp(self, x: str, size: int) -> str:
        """Two linear layers with a Relu between them."""
        return self.linear(self.op("Relu", self.linear(x, size, 2 * size)), 2 * size, size)

    def model(self, *outputs: str) -> onnx.ModelProto:
        """The model with these outputs, their shapes inferred."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            self.nodes,
            "net",
            self.inputs,
            [helper.make_tensor_value_info(o, kind, None) for o in outputs],
            list(self.weights.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model)
        types = {o.name: o for o in inferred.graph.output}
        for output in model.graph.output:
            output.CopyFrom(types[output.name])
        return model


def einsum_attention(
    net: Net, x: str, size: int, form: str = "flax", heads: int = 2, *, key_bias: bool = True
) -> str:
    """Attention whose every product is an Einsum, as Flax has it: weights are (d, h, e), (h, e, d).

    Args:
        net: Where it is added.
        x: What it reads.
        size: Number of features.
        form: "flax"; "swapped", with the weight first and heads in front of tokens; "ellipsis"; or
            "flat", with the heads split behind the projection.
        heads: Number of heads.
        key_bias: Whether the keys have one.
    """
    each = size // heads
    project, gather = {
        "flax": ("bsd,dhe->bshe", "bshe,hed->bsd"),
        "swapped": ("dhe,bsd->bhse", "hed,bhse->bsd"),
        "ellipsis": ("...d,dhe->...he", "...he,hed->...d"),
        "flat": ("bsd,de->bse", "bse,ed->bsd"),
    }[form]
    first = form == "swapped"

    def product(value: str, shape: tuple[int, ...], bias: tuple[int, ...], equation: str) -> str:
        operands = [net.matrix(*shape), value]
        y = net.op("Einsum", *(operands if first else operands[::-1]), equation=equation)
        return net.op("Add", y, net.keep(net.random.normal(size=bias) + 0.3)) if bias else y

    whole = {"flat": (size,), "swapped": (heads, 1, each)}.get(form, (heads, each))
    weight = (size, size) if form == "flat" else (size, heads, each)
    q, k, v = (
        product(x, weight, () if name == "k" and not key_bias else whole, project) for name in "qkv"
    )
    if form == "flat":
        q, k, v = (net.op("Reshape", each_, net.ints(0, 0, heads, each)) for each_ in (q, k, v))
    at = "hq", "hk"
    left, right = at if form == "swapped" else (a[::-1] for a in at)
    scores = net.op("Einsum", q, k, equation=f"b{left}e,b{right}e->bhqk")
    weights = net.op("Softmax", net.op("Mul", scores, net.scalar(each**-0.5)), axis=-1)
    mixed = net.op("Einsum", weights, v, equation=f"bhqk,b{right}e->b{left}e")
    if form == "flat":
        mixed = net.op("Reshape", mixed, net.ints(0, 0, size))
    out = (size, size) if form == "flat" else (heads, each, size)
    return product(mixed, out, (size,), gather)


def transformer(  # the shapes of a family of models, all in one place
    *,
    layers: int = 2,
    size: int = 16,
    placement: Placement = "pre",
    stem: Stem = "linear",
    parallel: bool = False,
    shared: bool = False,
    tied: bool = False,
    layer_scale: bool = False,
    depth_scale: bool = False,
    hidden: bool = False,
    uniform: bool = False,
    affine: bool = True,
    opset: int = 17,
    dtype: Any = np.float32,
    seed: int = 0,
) -> onnx.ModelProto:
    """A transformer.

    Args:
        layers: Number of blocks of attention and MLP.
        size: Width of the stream.
        placement: Where the norms stand. "mix" is post in the first half, pre in the second.
        stem: What writes the stream first.
        parallel: Attention and MLP read one norm and are added together.
        shared: All blocks share their weights, and each has its own norms.
        tied: The head is the transposed embedding table.
        layer_scale: A constant for each feature stands before each residual addition.
        depth_scale: Each norm is followed by the scalar 1 / sqrt(layer).
        hidden: The stream after the first block is a graph output too.
        uniform: Every gamma is a multiple of ones.
        affine: Norms have gamma and beta.
        opset: The opset.
        dtype: The type.
        seed: Of the weights.
    """
    net = Net(opset, dtype, seed)
    x = _stem(net, stem, size)
    outputs = []

    def norm(x: str, layer: int) -> str:
        y = net.norm(x, size, affine=affine, uniform=uniform)
        return net.op("Mul", y, net.scalar((layer + 1) ** -0.5)) if depth_scale else y

    def add(x: str, branch: str) -> str:
        if layer_scale:
            branch = net.op("Mul", branch, net.vector(size, 0.5))
        return net.op("Add", x, branch)

    kept: tuple[Any, int] | None = None
    for layer in range(layers):
        if shared:
            # The weights of a block are drawn again from the same state, and named the same.
            state, count = kept or (net.random.bit_generator.state, 1000)
            kept = (state, count)
        post = placement == "post" or (placement == "mix" and layer < layers // 2)
        branches = (net.attention, net.mlp)
        if parallel:
            normed = norm(x, layer)
            both = net.op("Add", net.attention(normed, size), net.mlp(normed, size))
            x = add(x, both)
        else:
            for branch in branches:
                if post:
                    x = norm(add(x, branch(x, size)), layer)
                elif placement == "peri":
                    x = add(x, norm(branch(norm(x, layer), size), layer))
                else:
                    x = add(x, branch(norm(x, layer), size))
        if hidden and layer == 0:
            outputs.append(net.op("Identity", x))
    if placement != "post":
        x = norm(x, 0)
    if tied:
        table = next(n for n in net.weights if n.startswith("table"))
        logits = net.op("MatMul", x, net.op("Transpose", table, perm=[1, 0]))
    else:
        logits = net.linear(x, size, 7)
    model = net.model(logits, *outputs)
    return _shared(model) if shared else model


def _stem(net: Net, stem: Stem, size: int) -> str:
    if stem == "embedding":
        ids = net.input("ids", ["batch", 6], onnx.TensorProto.INT64)
        table = net.keep(net.random.normal(size=(11, size)) + 0.4, name="table")
        words = net.op("Gather", table, ids)
        return net.op("Add", words, net.keep(net.random.normal(size=(1, 6, size)) + 0.2))
    if stem == "patches":
        image = net.input("image", ["batch", 3, 8, 8])
        patches = net.op(
            "Conv", image, net.matrix(size, 3, 4, 4), net.vector(size, 0.3), strides=[4, 4]
        )
        flat = net.op("Reshape", patches, net.ints(0, size, -1))
        tokens = net.op("Transpose", flat, perm=[0, 2, 1])
        first = net.op("Slice", tokens, net.ints(0), net.ints(1), net.ints(1))
        token = net.keep(net.random.normal(size=(1, 1, size)) + 0.5)
        empty = net.op("Mul", first, net.scalar(0.0))
        whole = net.op("Concat", net.op("Add", empty, token), tokens, axis=1)
        return net.op("Add", whole, net.keep(net.random.normal(size=(1, 5, size)) + 0.2))
    if stem == "input":
        return net.input("x", ["batch", 5, size])
    x = net.linear(net.input("x", ["batch", 5, 8]), 8, size)
    return net.op("Mul", x, net.op("Sigmoid", x)) if stem == "gelu" else x


def _shared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Let the matrices of every block be those of the first, as exporters of ALBERT store them."""
    first: dict[tuple[int, ...], list[str]] = {}
    weights = {t.name: t for t in model.graph.initializer}
    used: dict[str, int] = {}
    matmuls = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    per_block = 6  # q, k, v, o and two of the MLP
    body = matmuls[1:-1]
    for at, node in enumerate(body):
        node.input[1] = body[at % per_block].input[1]
    for node in model.graph.node:
        for name in node.input:
            used[name] = used.get(name, 0) + 1
    for name in [n for n in weights if n not in used]:
        model.graph.initializer.remove(weights[name])
    del first
    return model


def encoder_decoder(*, size: int = 16, layers: int = 1, seed: int = 0) -> onnx.ModelProto:
    """An encoder with a GELU-like stem, and a decoder with a tied table, as Whisper has them."""
    net = Net(seed=seed)
    x = _stem(net, "gelu", size)
    for _ in range(layers + 1):
        x = net.op("Add", x, net.attention(net.norm(x, size), size))
        x = net.op("Add", x, net.mlp(net.norm(x, size), size))
    memory = net.norm(x, size)
    y = _stem(net, "embedding", size)
    for _ in range(layers):
        y = net.op("Add", y, net.attention(net.norm(y, size), size))
        y = net.op("Add", y, net.attention(net.norm(y, size), size, memory=memory))
        y = net.op("Add", y, net.mlp(net.norm(y, size), size))
    head = net.op("Transpose", "table", perm=[1, 0])
    return net.model(net.op("MatMul", net.norm(y, size), head))
