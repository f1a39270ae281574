"""How a normalization is written down: one function for each kind.

    rms_norm(x) = gamma * x / sqrt(mean(x^2) + epsilon)        center(x) = x - mean(x)

From opset 23 on the standard has RMSNormalization. Below that an RMS norm is the chain of
primitives that onnxruntime fuses into one kernel when it loads a model (seen with onnxruntime
1.31): Pow, ReduceMean, Add, Sqrt, Div, Mul, with Casts around it where the type is narrower than
float32, since x^2 leaves float16 for |x| > 255. Sources: the ONNX operator specification;
onnxruntime's SimplifiedLayerNormFusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue
from onnxnorm.module import Node, Value
from onnxnorm.port import rounded
from onnxnorm.rewrite import Rewriter

NARROW: Final = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def rms_norm(
    rw: Rewriter,
    x: AnyValue,
    gamma: NDArray[np.float64] | None,
    axes: Sequence[int],
    epsilon: float,
    *,
    dtype: np.dtype[Any],
    features: Sequence[int],
    trailing: bool,
    at: Node,
    shift: NDArray[np.float64] | None = None,
) -> None:
    """Let `at` be the RMS norm of x over `axes`, plus `shift` where there is one.

    Args:
        rw: Where it is staged.
        x: What is normalized.
        gamma: The scale, aligned with x from the right; None for none.
        axes: The axes, in the form that the opset's operators take.
        epsilon: Added to the mean square.
        dtype: The element type of x.
        features: The sizes of the normalized axes.
        trailing: Whether the axes are the last ones of x.
        at: The node whose first output it computes from now on.
        shift: Added to the result, aligned as gamma is.
    """
    scale = np.ones(tuple(features)) if gamma is None and trailing else gamma
    weight = None if scale is None else rw.constant("scale", rounded(scale, dtype), at=at)
    last = _Last(rw, at, shift is not None)
    if trailing and at.scope.opsets[""] >= 23:
        inputs: list[AnyValue | None] = [x, weight]
        attrs = {"axis": min(axes), "epsilon": epsilon}
        normed = last("RMSNormalization", inputs, "rms", attrs, end=True)
    else:
        narrow = onnx.helper.np_dtype_to_tensor_dtype(dtype) in NARROW
        work = np.dtype(np.float32) if narrow else dtype
        wide = rw.add("Cast", [x], "wide", attrs={"to": _FLOAT}, at=at) if narrow else x
        two = rw.constant("two", np.asarray(2, dtype=work), at=at)
        square = rw.add("Pow", [wide, two], "square", at=at)
        mean = mean_of(rw, square, axes, "mean_square", at=at)
        small = rw.constant("epsilon", np.asarray(epsilon, dtype=work), at=at)
        variance = rw.add("Add", [mean, small], "variance", at=at)
        root = rw.add("Sqrt", [variance], "root", at=at)
        end = weight is None and not narrow
        normed = last("Div", [wide, root], "normalized", {}, end=end)
        if narrow:
            to = {"to": onnx.helper.np_dtype_to_tensor_dtype(dtype)}
            normed = last("Cast", [normed], "narrow", to, end=weight is None)
        if weight is not None:
            normed = last("Mul", [normed, weight], "scaled", {}, end=True)
    if shift is not None:
        bias = rw.constant("shift", rounded(shift, dtype), at=at)
        rw.replace("Add", [normed, bias], at=at)


_FLOAT: Final = onnx.TensorProto.FLOAT


class _Last:
    """Adds nodes; the one that ends the norm takes the place of `at` unless more follows."""

    def __init__(self, rw: Rewriter, at: Node, more: bool) -> None:
        self.rw, self.at, self.more = rw, at, more

    def __call__(
        self,
        op: str,
        inputs: list[AnyValue | None],
        role: str,
        attrs: dict[str, Any],
        *,
        end: bool,
    ) -> AnyValue:
        if end and not self.more:
            self.rw.replace(op, inputs, attrs=attrs, at=self.at)
            output: Value = self.at.outputs[0]
            return output
        return self.rw.add(op, inputs, role, attrs=attrs, at=self.at)


def center(rw: Rewriter, x: Value, axes: Sequence[int], *, dtype: np.dtype[Any]) -> Value:
    """X - mean(x) over `axes`, right behind what computes x; in float32 where x is narrower."""
    narrow = onnx.helper.np_dtype_to_tensor_dtype(dtype) in NARROW
    wide: Value = rw.add("Cast", [x], "wide", attrs={"to": _FLOAT}, behind=x) if narrow else x
    mean = mean_of(rw, wide, axes, "mean", behind=x)
    centered = rw.add("Sub", [wide, mean], "centered", behind=x)
    if not narrow:
        return centered
    to = {"to": onnx.helper.np_dtype_to_tensor_dtype(dtype)}
    return rw.add("Cast", [centered], "narrow", attrs=to, behind=x)


def mean_of(
    rw: Rewriter,
    x: AnyValue,
    axes: Sequence[int],
    role: str,
    *,
    at: Node | None = None,
    behind: Value | None = None,
) -> Value:
    """ReduceMean that keeps its axes; they are an input from opset 18 on, and an attribute before.

    Before opset 11 axes count from the left.
    """
    scope = behind.scope if behind is not None else (at or rw.root).scope
    assert scope is not None, "every value of a graph has a scope"
    if scope.opsets[""] < 18:
        attrs = {"axes": list(axes), "keepdims": 1}
        return rw.add("ReduceMean", [x], role, attrs=attrs, at=at, behind=behind)
    listed = rw.constant(f"{role}_axes", np.asarray(axes, np.int64), at=at, behind=behind)
    return rw.add("ReduceMean", [x, listed], role, attrs={"keepdims": 1}, at=at, behind=behind)
