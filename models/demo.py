"""The demonstration model: a person re-identification network on a quarter-width MobileNetV2.

As torch leaves it when BatchNormalization is kept: 54 of them, 52 directly behind a convolution.
The two others must stay. `data_bn` normalises the raw pixels (as MXNet's networks do) and has no
convolution before it; `bottleneck` is the BNNeck of re-identification (Luo et al. 2019,
arXiv:1903.07071), whose convolution has a second reader: the feature before the norm is an output
of the network, compared by Euclidean distance, and the one behind it feeds the classifier.

onnxruntime folds Conv + BatchNormalization by itself when it loads a model, so what folding ahead
of time buys here is a smaller file, fewer nodes and a session that starts sooner, and no measurable
latency.
"""

from __future__ import annotations

import onnx

from models.network import Network

# expansion, output channels, repeats, first stride: the paper's table 2 (arXiv:1801.04381) with
# its channels times 0.25, rounded to multiples of 8 and never below 90 % as in its reference code
STAGES = (
    (1, 8, 1, 1),
    (6, 8, 2, 2),
    (6, 8, 3, 2),
    (6, 16, 4, 2),
    (6, 24, 3, 1),
    (6, 40, 3, 2),
    (6, 80, 1, 1),
)
RELU6_MOMENT = 0.6  # E[min(max(z, 0), 6)^2] of z about standard normal
IDENTITIES = 100


def demo(name: str = "demo", size: int = 96) -> onnx.ModelProto:
    """Build the demonstration model, about 0.4 million parameters.

    Args:
        name: Of the graph; another name gives other weights.
        size: Height and width of its input `pixels`, [batch, 3, size, size], values in [0, 255].
    """
    net = Network(name)
    low, high = net.constant("relu6.low", 0.0), net.constant("relu6.high", 6.0)

    def relu6(x: str) -> str:
        return net.op("Clip", x, low, high, out=f"{x.removesuffix('.out')}.relu6")

    x = net.input("pixels", ["batch", 3, size, size])
    x = net.batch_norm(net.op("Div", x, net.constant("range", 64.0), out="scaled"), "data_bn", 3)
    x = relu6(net.conv_batch_norm(x, "features.0.conv", (3, 8), stride=2))
    channels, block, moment = 8, 1, RELU6_MOMENT
    for expansion, target, repeats, first_stride in STAGES:
        for repeat in range(repeats):
            prefix, stride = f"features.{block}", first_stride if repeat == 0 else 1
            y, hidden = x, channels * expansion
            if expansion > 1:
                y = net.conv_batch_norm(
                    y, f"{prefix}.expand", (channels, hidden), (1, 1), moment=moment
                )
                y, moment = relu6(y), RELU6_MOMENT
            y = net.conv_batch_norm(
                y,
                f"{prefix}.depthwise",
                (hidden, hidden),
                stride=stride,
                groups=hidden,
                moment=moment,
            )
            y = net.conv_batch_norm(
                relu6(y), f"{prefix}.project", (hidden, target), (1, 1), moment=RELU6_MOMENT
            )
            shortcut = stride == 1 and channels == target
            x = net.op("Add", x, y, out=f"{prefix}.sum") if shortcut else y
            # each branch adds a unit of variance to the stream, more or less
            moment = 1.0 + (moment if shortcut else 0.0)
            channels, block = target, block + 1
    x = relu6(net.conv_batch_norm(x, "features.last", (channels, 1280), (1, 1), moment=moment))
    x = net.op("GlobalAveragePool", x, out="pooled")
    feature = net.conv(x, "reduce", (1280, 128), (1, 1), bias=True)
    net.output(net.op("Flatten", feature, out="embedding", axis=1), ["batch", 128])
    x = net.op("Flatten", net.batch_norm(feature, "bottleneck", 128), out="normalised", axis=1)
    classes = net.parameter("classifier.weight", (IDENTITIES, 128), -0.2, 0.2)
    bias = net.parameter("classifier.bias", (IDENTITIES,), -0.1, 0.1)
    net.output(net.op("Gemm", x, classes, bias, out="logits", transB=1), ["batch", IDENTITIES])
    return net.model()
