"""Write a network down as an exporter would: nodes, named parameters, no framework.

Every byte is reproducible on any machine and with any numpy: parameters come from raw 64-bit
draws through additions, multiplications and square roots, which IEEE 754 rounds in one way, and
never from a generator's distributions or from libm.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Shape = Sequence[int | str | None]

_IR_OF_OPSET: Final = ((21, 10), (19, 9), (0, 8))


def ir_version(opset: int) -> int:
    """Return the IR version that our models of this opset declare; functions need 8."""
    return next(ir for first, ir in _IR_OF_OPSET if opset >= first)


def uniform(name: str, shape: Sequence[int], low: float, high: float) -> NDArray[np.float64]:
    """Return low + (high - low) * u with u uniform in [0, 1), drawn from a stream of its own.

    Args:
        name: Names the stream: the same name gives the same numbers, whatever was drawn before.
        shape: Of the result.
        low: The smallest value.
        high: The bound above.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (low + (high - low) * unit).reshape(tuple(shape))


class Network:
    """A graph under construction. Values are their names.

    Args:
        name: Of the graph; also the seed of every parameter.
        opset: Of the default domain.
        dtype: TensorProto type of inputs and parameters.
    """

    def __init__(self, name: str, opset: int = 17, dtype: int = TensorProto.FLOAT) -> None:
        self.name = name
        self.opset = opset
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []

    def input(self, name: str, shape: Shape | None, dtype: int | None = None) -> str:
        """Declare a graph input; shape None says nothing, not even the rank."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype or self.dtype, shape))
        return name

    def output(self, value: str, shape: Shape | None, dtype: int | None = None) -> None:
        """Declare a value as graph output."""
        self.outputs.append(helper.make_tensor_value_info(value, dtype or self.dtype, shape))

    def tensor(self, name: str, values: Any, dtype: int | None = None) -> onnx.TensorProto:
        """Return a tensor of the network's type, or of another, rounded once from float64."""
        numpy_type = helper.tensor_dtype_to_np_dtype(dtype or self.dtype)
        return numpy_helper.from_array(np.asarray(values).astype(numpy_type), name)

    def constant(self, name: str, values: Any, dtype: int | None = None) -> str:
        """Store an initializer."""
        self.initializers.append(self.tensor(name, values, dtype))
        return name

    def parameter(self, name: str, shape: Sequence[int], low: float, high: float) -> str:
        """Store an initializer of uniform draws."""
        return self.constant(name, uniform(f"{self.name}/{name}", shape, low, high))

    def op(self, op_type: str, *inputs: str, out: str | Sequence[str], **attributes: Any) -> str:
        """Append a node and return its first output; the node is named after it."""
        outputs = [out] if isinstance(out, str) else list(out)
        node = helper.make_node(op_type, inputs, outputs, name=f"/{outputs[0]}/{op_type}")
        for key in sorted(attributes):
            node.attribute.append(helper.make_attribute(key, attributes[key]))
        self.nodes.append(node)
        return outputs[0]

    def conv(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        kernel: Sequence[int] = (3, 3),
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
        transposed: bool = False,
        gain: NDArray[np.float64] | float = 1.0,
        weight: str | None = None,
    ) -> str:
        """Append a convolution whose output has about gain^2 times its input's second moment.

        Args:
            x: Its input.
            name: Prefix of its parameters and its output value.
            channels: In and out.
            kernel: Its extent along each spatial axis; padding keeps the extent at stride 1.
            stride: The same along each axis.
            groups: Must divide both channel counts.
            bias: Whether it has one.
            transposed: ConvTranspose, weight [in, out / groups, *kernel].
            gain: One factor, or one for each output channel (not when transposed).
            weight: An initializer to share instead of a new one.
        """
        source, target = channels
        if weight is None:
            shape = (source, target // groups) if transposed else (target, source // groups)
            fan_in = source // groups * math.prod(kernel)
            edge = math.sqrt(3.0 / fan_in)
            values = uniform(f"{self.name}/{name}.weight", (*shape, *kernel), -edge, edge)
            per_channel = np.asarray(gain).reshape((-1,) + (1,) * (len(kernel) + 1))
            weight = self.constant(f"{name}.weight", values * per_channel)
        inputs = [x, weight]
        if bias:
            inputs.append(self.parameter(f"{name}.bias", (target,), -0.3, 0.3))
        return self.op(
            "ConvTranspose" if transposed else "Conv",
            *inputs,
            out=f"{name}.out",
            dilations=[1] * len(kernel),
            group=groups,
            kernel_shape=list(kernel),
            pads=[(k - 1) // 2 for k in kernel] * 2,
            strides=[stride] * len(kernel),
        )

    def norm_parameters(
        self, name: str, channels: int, variance: NDArray[np.float64] | float = 1.0
    ) -> list[str]:
        """Store gamma, beta, running mean and running variance, none of them trivial.

        gamma is in [0.5, 1.5] with one in 16 negated, beta and the mean (in standard deviations)
        in [-0.3, 0.3], the variance within half of what is expected.
        """
        draws = [uniform(f"{self.name}/{name}.{k}", (channels,), 0.0, 1.0) for k in "wbmvs"]
        expected = np.broadcast_to(np.asarray(variance, np.float64), (channels,))
        gamma = (0.5 + draws[0]) * np.where(draws[4] < 1 / 16, -1.0, 1.0)
        return [
            self.constant(f"{name}.weight", gamma),
            self.constant(f"{name}.bias", 0.6 * draws[1] - 0.3),
            self.constant(f"{name}.running_mean", (0.6 * draws[2] - 0.3) * np.sqrt(expected)),
            self.constant(f"{name}.running_var", (0.5 + draws[3]) * expected),
        ]

    def batch_norm(
        self,
        x: str,
        name: str,
        channels: int,
        variance: NDArray[np.float64] | float = 1.0,
        out: str | Sequence[str] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a BatchNormalization; `variance` is what its input is expected to have."""
        parameters = self.norm_parameters(name, channels, variance)
        given = {"epsilon": 1e-5, "momentum": 0.9, **attributes}
        return self.op("BatchNormalization", x, *parameters, out=out or f"{name}.out", **given)

    def conv_batch_norm(
        self,
        x: str,
        name: str,
        channels: tuple[int, int],
        kernel: Sequence[int] = (3, 3),
        *,
        moment: float = 1.0,
        **conv: Any,
    ) -> str:
        """Append Conv and BatchNormalization whose channels differ in scale by up to 16.

        Trained networks have running variances over several orders of magnitude; where they are
        small, an epsilon that was lost or doubled shows in the output.

        Args:
            x: The input value.
            name: Prefix of the convolution; the norm is `<name>.bn`.
            channels: In and out.
            kernel: Spatial extent.
            moment: Second moment of the input.
            **conv: Further arguments of `conv`.
        """
        draw = uniform(f"{self.name}/{name}.gain", (channels[1],), 0.0, 5.0)
        gain = 1.0 / (1 << draw.astype(np.int64))  # 1, 1/2, ... 1/16: exact
        y = self.conv(x, name, channels, kernel, gain=gain, **conv)
        return self.batch_norm(y, f"{name}.bn", channels[1], gain * gain * moment)

    def linear(self, x: str, name: str, features: tuple[int, int], bias: bool = True) -> str:
        """Append x @ W (+ b) with W stored [in, out], as exporters write it for rank 3."""
        edge = math.sqrt(3.0 / features[0])
        y = self.op(
            "MatMul",
            x,
            self.parameter(f"{name}.weight", features, -edge, edge),
            out=f"{name}.product",
        )
        if not bias:
            return y
        return self.op(
            "Add", y, self.parameter(f"{name}.bias", features[1:], -0.3, 0.3), out=f"{name}.out"
        )

    def graph(self) -> onnx.GraphProto:
        """Return what was written so far as a graph."""
        return helper.make_graph(
            self.nodes, self.name, self.inputs, self.outputs, initializer=self.initializers
        )

    def model(self) -> onnx.ModelProto:
        """Return the finished model."""
        domains = sorted({function.domain for function in self.functions})
        imports = [helper.make_opsetid("", self.opset)]
        imports += [helper.make_opsetid(domain, 1) for domain in domains]
        return helper.make_model(
            self.graph(),
            opset_imports=imports,
            ir_version=ir_version(self.opset),
            producer_name="onnxnorm-models",
            functions=self.functions,
        )
