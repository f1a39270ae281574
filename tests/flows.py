"""Random networks of linear operators, affine maps and what stands between them in the wild.

`network(seed)` draws one: convolutions of every kind, batch normalizations and chains of Mul, Add,
Sub and Div in every place, residual additions, Concat and Split, pools, resizes, pads, ReLUs,
layout changes, norms and softmax. Sizes are small and sizes of axes are different primes where the
operators allow it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from tests.networks import Net

Shape = tuple[int, ...]


@dataclass
class Flows:
    """A network in the making: values with their shapes, behind a batch of unknown size.

    Attributes:
        net: Where nodes and weights go.
        rng: What draws.
    """

    net: Net
    rng: np.random.Generator
    values: list[tuple[str, Shape]] = field(default_factory=list)

    def vector(self, n: int, axis: int, *, positive: bool = False) -> str:
        """One number for each channel, in a shape that broadcasts along an axis from the right."""
        signs = 1.0 if positive or self.rng.random() < 0.6 else self.rng.choice([-1.0, 1.0], n)
        values = self.rng.uniform(0.5, 2.0, n) * signs
        return self.net.keep(values.reshape(-1, *(1,) * (-axis - 1)), "vector")

    def weight(self, *shape: int) -> str:
        """A weight that keeps the size of what it multiplies."""
        fan = max(1, int(np.prod(shape[1:])))
        return self.net.keep(self.rng.normal(size=shape) / np.sqrt(fan), "weight")

    def conv(self, x: str, shape: Shape) -> tuple[str, Shape]:
        c, h, w = shape
        group = int(self.rng.choice([g for g in (1, 2, c) if c % g == 0]))
        # The reference evaluator, for types that onnxruntime has not, has no grouped ConvTranspose.
        plain = self.net.dtype in (np.float64, ml_dtypes.bfloat16)
        k, pad = (1, 0) if min(h, w) < 3 else [(1, 0), (3, 1), (3, 0), (2, 0)][self.rng.integers(4)]
        out = group * int(self.rng.integers(1, 3)) if group > 1 else int(self.rng.choice([2, 4, 6]))
        if self.rng.random() < 0.2 and not (plain and group > 1):
            inputs = [x, self.weight(c, out // group if out % group == 0 else 1, 2, 2)]
            made = (out // group if out % group == 0 else 1) * group
            if self.rng.random() < 0.5:
                inputs.append(self.vector(made, -1))
            y = self.net.op("ConvTranspose", *inputs, group=group, strides=[2, 2])
            return y, (made, 2 * h, 2 * w)
        inputs = [x, self.weight(out, c // group, k, k)]
        if self.rng.random() < 0.5:
            inputs.append(self.vector(out, -1))
        attrs: dict[str, Any] = {"group": group, "pads": [pad] * 4}
        if pad and self.rng.random() < 0.3:
            attrs = {"group": group, "auto_pad": "SAME_UPPER"}
        y = self.net.op("Conv", *inputs, **attrs)
        return y, (out, h + 2 * pad - k + 1, w + 2 * pad - k + 1)

    def affine(self, x: str, shape: Shape) -> tuple[str, Shape]:
        axis, n = (-3, shape[0]) if len(shape) == 3 else (-1, shape[-1])
        kind = self.rng.integers(5)
        if kind == 0 and (len(shape) == 3 or len(shape) == 1):
            parameters = [self.vector(n, -1) for _ in range(3)]
            parameters.append(self.vector(n, -1, positive=True))
            return self.net.op("BatchNormalization", x, *parameters, epsilon=1e-3), shape
        ops = [["Mul"], ["Mul", "Add"], ["Sub", "Div"], ["Add"], ["Mul", "Add", "Mul"]][kind]
        positive = bool(self.rng.random() < 0.4)
        for op in ops:
            whole = self.rng.random() < 0.15
            by = self.net.scalar(1.5) if whole else self.vector(n, axis, positive=positive)
            x = self.net.op(op, *((by, x) if op == "Mul" and whole else (x, by)))
        return x, shape

    def layout(self, x: str, shape: Shape) -> tuple[str, Shape]:
        if len(shape) == 2:  # tokens to an image of one row
            t, c = shape
            y = self.net.op("Transpose", x, perm=[0, 2, 1])
            return self.net.op("Reshape", y, self.net.ints(0, c, t, 1)), (c, t, 1)
        if len(shape) == 1:
            return self.net.op("Reshape", x, self.net.ints(0, 1, shape[0])), (1, shape[0])
        c, h, w = shape
        kind = self.rng.integers(4)
        if kind == 0:
            y = self.net.op("Reshape", x, self.net.ints(0, c, h * w))
            return self.net.op("Transpose", y, perm=[0, 2, 1]), (h * w, c)
        if kind == 1:
            y = self.net.op("Transpose", x, perm=[0, 2, 3, 1])
            return self.net.op("Reshape", y, self.net.ints(0, h * w, c)), (h * w, c)
        if kind == 2 and c % 4 == 0:
            mode = str(self.rng.choice(["DCR", "CRD"]))
            y = self.net.op("DepthToSpace", x, blocksize=2, mode=mode)
            return y, (c // 4, 2 * h, 2 * w)
        if kind == 3 and h % 2 == 0 and w % 2 == 0:
            return self.net.op("SpaceToDepth", x, blocksize=2), (4 * c, h // 2, w // 2)
        return self.net.op("Identity", x), shape

    def local(self, x: str, shape: Shape) -> tuple[str, Shape]:
        """What acts on every channel alike."""
        kind = self.rng.integers(9)
        if kind == 0:
            return self.net.op("Relu", x), shape
        if kind == 1:
            return self.net.op("LeakyRelu", x, alpha=0.1), shape
        if kind == 2:
            return self.net.op("Sigmoid", x), shape
        if len(shape) != 3 or min(shape[1:]) < 3:
            return self.net.op("Neg", x), shape
        c, h, w = shape
        if kind == 3:
            y = self.net.op("MaxPool", x, kernel_shape=[3, 3], pads=[1] * 4)
            return y, shape
        if kind == 4:
            counted = int(self.rng.integers(2))
            y = self.net.op(
                "AveragePool", x, kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=counted
            )
            return y, shape
        if kind == 5:
            y = self.net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])
            return y, (c, (h - 2) // 2 + 1, (w - 2) // 2 + 1)
        if kind == 6:
            scales = self.net.keep(np.asarray([1, 1, 2, 2], np.float32), name=self.net.name("up"))
            self.net.weights[scales].CopyFrom(
                onnx.numpy_helper.from_array(np.asarray([1, 1, 2, 2], np.float32), scales)
            )
            y = self.net.op("Resize", x, "", scales, mode="nearest")
            return y, (c, 2 * h, 2 * w)
        if kind == 7:
            mode = str(self.rng.choice(["constant", "reflect"]))
            inputs = [x, self.net.ints(0, 0, 1, 0, 0, 0, 0, 1)]
            if mode == "constant" and self.rng.random() < 0.5:
                inputs.append(self.net.scalar(0.5))
            return self.net.op("Pad", *inputs, mode=mode), (c, h + 1, w + 1)
        begin, end = self.net.ints(0), self.net.ints(h - 1)
        return self.net.op("Slice", x, begin, end, self.net.ints(2)), (c, h - 1, w)

    def part(self, x: str, shape: Shape) -> tuple[str, Shape]:
        """Some of the channels."""
        axis, n = (1, shape[0]) if len(shape) == 3 else (len(shape), shape[-1])
        if n < 2:
            return self.net.op("Identity", x), shape
        cut = n // 2
        low, high = (
            (k, *shape[1:]) if len(shape) == 3 else (*shape[:-1], k) for k in (cut, n - cut)
        )
        if self.rng.random() < 0.5:
            names = self.net.many("Split", x, self.net.ints(cut, n - cut), outputs=2, axis=axis)
            self.values.append((names[0], low))
            return names[1], high
        ends = self.net.ints(0), self.net.ints(cut), self.net.ints(axis)
        return self.net.op("Slice", x, *ends), low

    def norm(self, x: str, shape: Shape) -> tuple[str, Shape]:
        if len(shape) == 3:
            kind = self.rng.integers(2)
            if kind == 0:
                inputs = [self.vector(shape[0], -1), self.vector(shape[0], -1)]
                return self.net.op("InstanceNormalization", x, *inputs), shape
            mean = self.net.op("ReduceMean", x, axes=[2, 3])
            return self.net.op("Sub", x, mean), shape
        if self.rng.random() < 0.3:
            return self.net.op("Softmax", x, axis=-1), shape
        inputs = [self.vector(shape[-1], -1), self.vector(shape[-1], -1)]
        return self.net.op("LayerNormalization", x, *inputs, axis=-1), shape

    def linear(self, x: str, shape: Shape) -> tuple[str, Shape]:
        if len(shape) == 3:
            return self.conv(x, shape)
        n, out = shape[-1], int(self.rng.choice([3, 5]))
        if len(shape) == 1 and self.rng.random() < 0.5:
            transposed = int(self.rng.integers(2))
            w = self.weight(out, n) if transposed else self.weight(n, out)
            inputs = [x, w, self.vector(out, -1)][: int(self.rng.integers(2, 4))]
            y = self.net.op("Gemm", *inputs, transB=transposed, alpha=0.5, beta=2.0)
            return y, (out,)
        y = self.net.op("MatMul", x, self.weight(n, out))
        if self.rng.random() < 0.5:
            y = self.net.op("Add", y, self.vector(out, -1))
        return y, (*shape[:-1], out)

    def pooled(self, x: str, shape: Shape) -> tuple[str, Shape]:
        if len(shape) == 3:
            y = self.net.op("GlobalAveragePool", x)
            return self.net.op("Flatten", y), (shape[0],)
        if len(shape) == 2:
            return self.net.op("ReduceMean", x, axes=[1], keepdims=0), (shape[1],)
        return x, shape

    def join(self, x: str, shape: Shape) -> tuple[str, Shape]:
        """A sum or a Concat with an earlier value, or with another branch of the same."""
        same = [v for v in self.values if v[1] == shape and v[0] != x]
        other = same[self.rng.integers(len(same))][0] if same else x
        kind = self.rng.integers(4)
        if kind == 0:
            axis = 1 if len(shape) == 3 else len(shape)
            grown = (2 * shape[0], *shape[1:]) if len(shape) == 3 else (*shape[:-1], 2 * shape[-1])
            return self.net.op("Concat", x, other, axis=axis), grown
        return self.net.op("Sub" if kind == 1 else "Add", other, x), shape

    def step(self) -> None:
        """One more operator behind one of the last values."""
        x, shape = self.values[-1 - int(self.rng.integers(min(2, len(self.values))))]
        if int(np.prod(shape)) > 4000:
            return
        kinds = [
            (self.linear, 0.26), (self.affine, 0.32), (self.local, 0.14), (self.join, 0.12),
            (self.layout, 0.06), (self.part, 0.04), (self.norm, 0.04), (self.pooled, 0.02),
        ]  # fmt: skip
        total = np.asarray([k[1] for k in kinds])
        chosen = kinds[self.rng.choice(len(kinds), p=total / total.sum())][0]
        self.values.append(chosen(x, shape))


def network(
    seed: int, dtype: Any = np.float32, steps: int = 12, *, tokens: bool = False
) -> onnx.ModelProto:
    """A random network; every value that nobody reads is an output.

    Args:
        seed: Of all that is drawn.
        dtype: The type of all values.
        steps: Number of operators, or small groups of them.
        tokens: Start with tokens, and not with an image or tokens.
    """
    net = Net(opset=17, dtype=dtype, seed=seed)
    flows = Flows(net, np.random.default_rng(seed))
    image = bool(flows.rng.random() < 0.75) and not tokens
    shape: Shape = (4, 7, 6) if image else (5, 4)
    x = net.input("x", ["batch", *shape])
    flows.values.append((x, shape))
    for _ in range(steps):
        flows.step()
    read = {name for node in net.nodes for name in node.input}
    ends = [v for v, _ in flows.values if v not in read and v != "x"]
    return net.model(*dict.fromkeys(ends)) if ends else net.model(net.op("Identity", "x"))
