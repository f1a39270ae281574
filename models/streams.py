"""Pre-LN transformers at real widths, written down without torch: what benchmarks of streams run.

    GPT-2-like:  E[ids] + P -> n (x + attention(LN x), x + MLP(LN x)) -> LN -> head without a bias
    ViT-like:    patches -> class token, P -> n of these -> LN -> the class token -> head

Linear layers are MatMul and Add, heads are split and merged as exporters do it, and gamma and beta
are not trivial. Heads are 64 features wide.
"""

from __future__ import annotations

import math
from typing import Final

import onnx
from onnx import TensorProto

from models.network import Network

_HEAD: Final = 64
_PATCH: Final = 16
VOCABULARY: Final = 2048


def gpt2(width: int, depth: int = 3, tokens: int = 256, opset: int = 17) -> onnx.ModelProto:
    """A decoder: `ids` int64 [batch, tokens] -> `logits` [batch, tokens, VOCABULARY].

    Args:
        width: Of the stream, a multiple of 64.
        depth: Number of blocks; there are 2 depth + 1 norms.
        tokens: Length of the sequence.
        opset: Of the model.
    """
    net = Network("gpt2_like", opset)
    ids = net.input("ids", ["batch", tokens], TensorProto.INT64)
    table = net.parameter("wte", (VOCABULARY, width), -0.05, 0.07)
    places = net.parameter("wpe", (1, tokens, width), -0.03, 0.04)
    x = net.op("Add", net.op("Gather", table, ids, out="words"), places, out="stem")
    future = [[0.0 if b <= a else -1e9 for b in range(tokens)] for a in range(tokens)]
    mask = net.constant("mask", future)
    x = _blocks(net, x, width, depth, mask)
    head = net.parameter("head", (width, VOCABULARY), -0.05, 0.05)
    net.op("MatMul", _norm(net, x, "final", width), head, out="logits")
    net.output("logits", ["batch", tokens, VOCABULARY])
    return net.model()


def vit(width: int, depth: int = 3, image: int = 224, opset: int = 17) -> onnx.ModelProto:
    """An encoder: `image` [batch, 3, side, side] -> `logits` [batch, 1000].

    Args:
        width: Of the stream, a multiple of 64.
        depth: Number of blocks; there are 2 depth + 1 norms.
        image: Side of the image in pixels, a multiple of 16.
        opset: Of the model.
    """
    net = Network("vit_like", opset)
    pixels = net.input("image", ["batch", 3, image, image])
    edge = math.sqrt(3.0 / (3 * _PATCH * _PATCH))
    weight = net.parameter("patch.weight", (width, 3, _PATCH, _PATCH), -edge, edge)
    bias = net.parameter("patch.bias", (width,), -0.3, 0.3)
    y = net.op("Conv", pixels, weight, bias, out="patch", strides=[_PATCH, _PATCH])
    flat = net.constant("flat", [0, width, -1], TensorProto.INT64)
    y = net.op("Transpose", net.op("Reshape", y, flat, out="flat.out"), out="rows", perm=[0, 2, 1])
    # The class token is repeated to the batch, whose size only the run knows.
    batch = net.op("Shape", pixels, out="batch", start=0, end=1)
    rest = net.constant("rest", [1, width], TensorProto.INT64)
    target = net.op("Concat", batch, rest, out="target", axis=0)
    token = net.parameter("token", (1, 1, width), -0.3, 0.4)
    first = net.op("Expand", token, target, out="first")
    x = net.op("Concat", first, y, out="tokens", axis=1)
    count = (image // _PATCH) ** 2 + 1
    places = net.parameter("places", (1, count, width), -0.3, 0.4)
    x = _blocks(net, net.op("Add", x, places, out="stem"), width, depth, None)
    normed = _norm(net, x, "final", width)
    one = net.constant("class", 0, TensorProto.INT64)
    net.linear(net.op("Gather", normed, one, out="pooled", axis=1), "head", (width, 1000))
    net.output("head.out", ["batch", 1000])
    return net.model()


def _blocks(net: Network, x: str, width: int, depth: int, mask: str | None) -> str:
    for index in range(depth):
        block = f"block.{index}"
        branch = _attention(net, _norm(net, x, f"{block}.ln_1", width), block, width, mask)
        x = net.op("Add", x, branch, out=f"{block}.half")
        normed = _norm(net, x, f"{block}.ln_2", width)
        inner = net.linear(normed, f"{block}.up", (width, 4 * width))
        gate = net.op("Sigmoid", inner, out=f"{block}.sigmoid")
        active = net.op("Mul", inner, gate, out=f"{block}.active")
        branch = net.linear(active, f"{block}.down", (4 * width, width))
        x = net.op("Add", x, branch, out=f"{block}.whole")
    return x


def _norm(net: Network, x: str, name: str, width: int) -> str:
    gamma = net.parameter(f"{name}.weight", (width,), 0.5, 1.5)
    beta = net.parameter(f"{name}.bias", (width,), -0.3, 0.3)
    out = f"{name}.out"
    return net.op("LayerNormalization", x, gamma, beta, out=out, axis=-1, epsilon=1e-5)


def _attention(net: Network, x: str, block: str, width: int, mask: str | None) -> str:
    heads = width // _HEAD
    split = net.constant(f"{block}.split", [0, 0, heads, _HEAD], TensorProto.INT64)
    turned = {}
    for role, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        y = net.linear(x, f"{block}.{role}", (width, width))
        y = net.op("Reshape", y, split, out=f"{block}.{role}.heads")
        turned[role] = net.op("Transpose", y, out=f"{block}.{role}.turned", perm=perm)
    scores = net.op("MatMul", turned["q"], turned["k"], out=f"{block}.products")
    scale = net.constant(f"{block}.scale", _HEAD**-0.5)
    scores = net.op("Mul", scores, scale, out=f"{block}.scores")
    if mask is not None:
        scores = net.op("Add", scores, mask, out=f"{block}.masked")
    weights = net.op("Softmax", scores, out=f"{block}.softmax", axis=-1)
    mixed = net.op("MatMul", weights, turned["v"], out=f"{block}.mixed")
    mixed = net.op("Transpose", mixed, out=f"{block}.back", perm=[0, 2, 1, 3])
    merge = net.constant(f"{block}.merge", [0, 0, width], TensorProto.INT64)
    merged = net.op("Reshape", mixed, merge, out=f"{block}.merged")
    return net.linear(merged, f"{block}.proj", (width, width))
