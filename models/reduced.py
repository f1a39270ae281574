"""Real architectures at a width that tests can afford, made without torch.

Their topology is that of the published network; only channels, depth and resolution are small.
"""

from __future__ import annotations

import math
from typing import Literal

import onnx
from onnx import TensorProto

from models.network import Network


def densenet(name: str, layers: tuple[int, ...] = (3, 3), growth: int = 8) -> onnx.ModelProto:
    """DenseNet-BC: Concat -> BN -> Relu -> Conv1x1 -> BN -> Relu -> Conv3x3 (arXiv:1608.06993).

    Half of its norms read a convolution, half a concatenation or a pooling.
    """
    net = Network(name)
    x = net.input("image", ["batch", 3, 32, 32])
    channels = 2 * growth
    x = net.conv_batch_norm(x, "conv0", (3, channels))
    x = net.op("Relu", x, out="relu0")
    x = net.op("MaxPool", x, out="pool0", kernel_shape=[2, 2], strides=[2, 2])
    for stage, count in enumerate(layers):
        for layer in range(count):
            prefix = f"block{stage}.layer{layer}"
            y = net.op("Relu", net.batch_norm(x, f"{prefix}.norm1", channels), out=f"{prefix}.r1")
            y = net.conv_batch_norm(y, f"{prefix}.conv1", (channels, 4 * growth), (1, 1))
            y = net.conv(
                net.op("Relu", y, out=f"{prefix}.r2"), f"{prefix}.conv2", (4 * growth, growth)
            )
            x = net.op("Concat", x, y, out=f"{prefix}.concat", axis=1)
            channels += growth
        if stage + 1 < len(layers):
            prefix = f"transition{stage}"
            y = net.op("Relu", net.batch_norm(x, f"{prefix}.norm", channels), out=f"{prefix}.r")
            y = net.conv(y, f"{prefix}.conv", (channels, channels // 2), (1, 1))
            x = net.op("AveragePool", y, out=f"{prefix}.pool", kernel_shape=[2, 2], strides=[2, 2])
            channels //= 2
    x = net.op("Relu", net.batch_norm(x, "norm5", channels), out="relu5")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, out="pooled"), out="flat", axis=1)
    weight = net.parameter("classifier.weight", (10, channels), -0.3, 0.3)
    bias = net.parameter("classifier.bias", (10,), -0.3, 0.3)
    net.output(net.op("Gemm", x, weight, bias, out="logits", transB=1), ["batch", 10])
    return net.model()


def preactivation_resnet(name: str, width: int = 8, stages: int = 3) -> onnx.ModelProto:
    """ResNet v2: BN -> Relu -> Conv -> BN -> Relu -> Conv, then Add (arXiv:1603.05027).

    The stem's convolution feeds both a norm and the shortcut, so that norm has to stay.
    """
    net = Network(name)
    x = net.conv(net.input("image", ["batch", 3, 32, 32]), "stem", (3, width))
    channels = width
    for stage in range(stages):
        target, stride = width << stage, 1 if stage == 0 else 2
        prefix = f"stage{stage}"
        y = net.op("Relu", net.batch_norm(x, f"{prefix}.bn1", channels), out=f"{prefix}.r1")
        shortcut = x
        if stride > 1:
            shortcut = net.conv(y, f"{prefix}.shortcut", (channels, target), (1, 1), stride=stride)
        y = net.conv_batch_norm(y, f"{prefix}.conv1", (channels, target), stride=stride)
        y = net.conv(net.op("Relu", y, out=f"{prefix}.r2"), f"{prefix}.conv2", (target, target))
        x = net.op("Add", shortcut, y, out=f"{prefix}.sum")
        channels = target
    x = net.op("Relu", net.batch_norm(x, "bn", channels), out="relu")
    x = net.op("Flatten", net.op("GlobalAveragePool", x, out="pooled"), out="flat", axis=1)
    weight = net.parameter("classifier.weight", (10, channels), -0.3, 0.3)
    net.output(net.op("Gemm", x, weight, out="logits", transB=1), ["batch", 10])
    return net.model()


def unet(name: str, width: int = 8) -> onnx.ModelProto:
    """U-Net with norms behind its convolutions and transposed convolutions (arXiv:1505.04597)."""
    net = Network(name)

    def double(x: str, prefix: str, source: int, target: int) -> str:
        for half in (1, 2):
            x = net.conv_batch_norm(x, f"{prefix}.conv{half}", (source, target), bias=half == 1)
            x, source = net.op("Relu", x, out=f"{prefix}.relu{half}"), target
        return x

    x = double(net.input("image", ["batch", 1, 32, 32]), "down0", 1, width)
    skips = [x]
    for level in (1, 2):
        x = net.op("MaxPool", x, out=f"pool{level}", kernel_shape=[2, 2], strides=[2, 2])
        x = double(x, f"down{level}", width << (level - 1), width << level)
        skips.append(x)
    for level in (1, 0):
        wide, narrow = width << (level + 1), width << level
        weight = net.parameter(f"up{level}.weight", (wide, narrow, 2, 2), -0.3, 0.3)
        bias = net.parameter(f"up{level}.bias", (narrow,), -0.3, 0.3)
        x = net.op(
            "ConvTranspose", x, weight, bias, out=f"up{level}", kernel_shape=[2, 2], strides=[2, 2]
        )
        x = net.op("Relu", net.batch_norm(x, f"up{level}.bn", narrow), out=f"up{level}.relu")
        x = net.op("Concat", x, skips[level], out=f"up{level}.skip", axis=1)
        x = double(x, f"up{level}.double", wide, narrow)
    net.output(net.conv(x, "mask", (width, 2), (1, 1), bias=True), ["batch", 2, 32, 32])
    return net.model()


Norm = Literal["layer_norm", "decomposed_layer_norm", "rms_norm"]


class _Transformer(Network):
    """Blocks of attention and perceptron over [batch, tokens, width]."""

    def __init__(self, name: str, opset: int, norm: Norm, width: int, heads: int) -> None:
        super().__init__(name, opset)
        self.norm_kind, self.width, self.heads = norm, width, heads

    def norm(self, x: str, name: str) -> str:
        """Append the norm in the spelling that exporters use at this opset."""
        gamma = self.parameter(f"{name}.weight", (self.width,), 0.5, 1.5)
        if self.norm_kind == "layer_norm":
            beta = self.parameter(f"{name}.bias", (self.width,), -0.3, 0.3)
            return self.op("LayerNormalization", x, gamma, beta, out=f"{name}.out", axis=-1)
        centred = x
        if self.norm_kind == "decomposed_layer_norm":
            mean = self.op("ReduceMean", x, out=f"{name}.mean", axes=[-1], keepdims=1)
            centred = self.op("Sub", x, mean, out=f"{name}.centred")
        power = self.constant(f"{name}.two", 2.0)
        square = self.op("Pow", centred, power, out=f"{name}.square")
        variance = self.op("ReduceMean", square, out=f"{name}.variance", axes=[-1], keepdims=1)
        epsilon = self.constant(f"{name}.epsilon", 1e-5)
        root = self.op(
            "Sqrt", self.op("Add", variance, epsilon, out=f"{name}.safe"), out=f"{name}.root"
        )
        y = self.op("Div", centred, root, out=f"{name}.unit")
        y = self.op("Mul", y, gamma, out=f"{name}.scaled")
        if self.norm_kind == "rms_norm":
            return y
        beta = self.parameter(f"{name}.bias", (self.width,), -0.3, 0.3)
        return self.op("Add", y, beta, out=f"{name}.out")

    def attention(self, x: str, name: str) -> str:
        """Append softmax(q k' / sqrt(d)) v over `heads` heads."""
        size = self.width // self.heads
        split = self.constant(f"{name}.split", [0, 0, self.heads, size], TensorProto.INT64)
        merge = self.constant(f"{name}.merge", [0, 0, self.width], TensorProto.INT64)
        parts = []
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            y = self.linear(x, f"{name}.{part}", (self.width, self.width))
            y = self.op("Reshape", y, split, out=f"{name}.{part}.split")
            parts.append(self.op("Transpose", y, out=f"{name}.{part}.heads", perm=order))
        scores = self.op("MatMul", parts[0], parts[1], out=f"{name}.scores")
        scale = self.constant(f"{name}.scale", 1 / math.sqrt(size))
        scores = self.op("Mul", scores, scale, out=f"{name}.scaled")
        weights = self.op("Softmax", scores, out=f"{name}.softmax", axis=-1)
        y = self.op("MatMul", weights, parts[2], out=f"{name}.mixed")
        y = self.op("Transpose", y, out=f"{name}.tokens", perm=[0, 2, 1, 3])
        y = self.op("Reshape", y, merge, out=f"{name}.merged")
        return self.linear(y, f"{name}.proj", (self.width, self.width))

    def perceptron(self, x: str, name: str) -> str:
        """Append two linear layers with a ReLU between them."""
        y = self.linear(x, f"{name}.fc1", (self.width, 2 * self.width))
        y = self.op("Relu", y, out=f"{name}.relu")
        return self.linear(y, f"{name}.fc2", (2 * self.width, self.width))

    def block(self, x: str, name: str, post: bool) -> str:
        """Append one block, its norms before the branches or behind the sums."""
        for branch, append in (("attn", self.attention), ("mlp", self.perceptron)):
            path = f"{name}.{branch}"
            y = append(x if post else self.norm(x, f"{path}.norm"), path)
            x = self.op("Add", x, y, out=f"{path}.sum")
            x = self.norm(x, f"{path}.norm") if post else x
        return x


def vision_transformer(
    name: str, opset: int = 17, norm: Norm = "layer_norm", depth: int = 2
) -> onnx.ModelProto:
    """ViT: patches by convolution, class token, pre-norm blocks (arXiv:2010.11929)."""
    net = _Transformer(name, opset, norm, width=32, heads=4)
    x = net.input("image", ["batch", 3, 32, 32])
    weight = net.parameter("patch.weight", (32, 3, 8, 8), -0.1, 0.1)
    bias = net.parameter("patch.bias", (32,), -0.3, 0.3)
    x = net.op("Conv", x, weight, bias, out="patches", kernel_shape=[8, 8], strides=[8, 8])
    shape = net.constant("patch.shape", [0, 32, 16], TensorProto.INT64)
    x = net.op("Transpose", net.op("Reshape", x, shape, out="flat"), out="tokens", perm=[0, 2, 1])
    x = net.op("Add", x, net.parameter("position", (1, 16, 32), -0.5, 0.5), out="embedded")
    for index in range(depth):
        x = net.block(x, f"blocks.{index}", post=False)
    x = net.norm(x, "norm")
    first = net.constant("first", 0, TensorProto.INT64)
    x = net.op("Gather", x, first, out="class", axis=1)
    net.output(net.linear(x, "head", (32, 10)), ["batch", 10])
    return net.model()


def text_encoder(name: str, opset: int = 17, norm: Norm = "layer_norm") -> onnx.ModelProto:
    """BERT: embedded tokens, post-norm blocks (arXiv:1810.04805); integer input, dynamic length."""
    net = _Transformer(name, opset, norm, width=32, heads=4)
    ids = net.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    table = net.parameter("embeddings.weight", (50, 32), -1.0, 1.0)
    x = net.norm(net.op("Gather", table, ids, out="words"), "embeddings.norm")
    for index in range(2):
        x = net.block(x, f"layer.{index}", post=True)
    net.output(x, ["batch", "sequence", 32])
    return net.model()


def text_decoder(name: str, opset: int = 13) -> onnx.ModelProto:
    """Llama: RMS norms before each branch, spelled as primitives (arXiv:2302.13971)."""
    net = _Transformer(name, opset, "rms_norm", width=32, heads=4)
    ids = net.input("input_ids", ["batch", "sequence"], TensorProto.INT64)
    x = net.op("Gather", net.parameter("embed.weight", (50, 32), -1.0, 1.0), ids, out="words")
    for index in range(2):
        x = net.block(x, f"layers.{index}", post=False)
    x = net.linear(net.norm(x, "norm"), "lm_head", (32, 50), bias=False)
    net.output(x, ["batch", "sequence", 50])
    return net.model()
