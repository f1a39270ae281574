"""The operators that are normalizations by themselves: one row of a table for each.

Subgraphs that compute a normalization without such an operator are found by `onnxnorm.norms`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxnorm.facts import Facts
from onnxnorm.module import Node
from onnxnorm.ops import bodies
from onnxnorm.port import is_real

Axes: TypeAlias = "tuple[int, ...] | None"

DEFAULT_EPSILON: Final = float(np.float32(1e-5))  # BatchNormalization's schema default
PARAMETERS: Final = ("gamma", "beta", "mean", "variance")  # its inputs behind the first


@dataclass(frozen=True)
class Operator:
    """A normalization operator as one node calls it.

    Attributes:
        kind: `layer_norm`, `rms_norm`, `batch_norm`, `group_norm`, `instance_norm`, `l2_norm`,
            `softmax` or `log_softmax`.
        axes: What the statistics are over; None where that needs a rank that is not known.
        epsilon: None where the kind has none, or a caller of the function gives it.
        reason: Why it is a near miss; "" where it is none.
        scale: Index of the input that scales the normalized value; None where there is none.
        bias: Index of the input that is added to it.
    """

    kind: str
    axes: Axes
    epsilon: float | None
    reason: str
    scale: int | None
    bias: int | None


def norm_operator(node: Node, rank: int | None) -> Operator | None:
    """What a node is, if it is a normalization; `rank` is that of its input, where known."""
    row = _ROWS.get((node.domain or "", node.op))
    if node.op == "MeanVarianceNormalization" and not node.domain:
        return _mean_variance(node, rank)
    if row is None or not node.inputs or not node.outputs or not node.outputs[0].name:
        return None
    kind, axes_of, epsilon, scale, bias = row
    if epsilon is not None:
        epsilon = None if node.parameter("epsilon") else node.attrs.get("epsilon", epsilon)
    reason = training_reason(node) if kind == "batch_norm" else None
    if node.op == "LpNormalization":
        reason = _lp_reason(node)
    return Operator(
        kind,
        None if node.parameter("axis", "axes") else axes_of(node, rank),
        epsilon,
        reason or "",
        scale,
        bias,
    )


def _mean_variance(node: Node, rank: int | None) -> Operator | None:
    """MeanVarianceNormalization adds its epsilon, 1e-9, to the deviation and not to the variance.

    Source: its function body in the ONNX operator specification.
    """
    if not node.inputs or node.parameter("axes"):
        return None
    axes = node.attrs.get("axes", [0, 2, 3])
    axes = tuple(sorted(a % rank for a in axes)) if rank else tuple(axes)
    spatial = rank is not None and rank > 2 and axes == tuple(range(2, rank))
    kind = "batch_norm" if 0 in axes else "instance_norm" if spatial else "layer_norm"
    reason = "epsilon is added to the deviation, outside the root, and not to the variance"
    return Operator(kind, axes, None, reason, None, None)


def _lp_reason(node: Node) -> str | None:
    if node.parameter("p"):
        return "p is a parameter of the function"
    p = node.attrs.get("p", 2)
    return f"p is {p}, where an L2 norm has 2" if p != 2 else None


def training_reason(node: Node) -> str | None:
    """Why a BatchNormalization's statistics are not constant; None where they are.

    The operator says so in a different way in each opset: is_test before 7, the number of
    outputs from 7, training_mode from 14.
    """
    opset = node.scope.opsets[""]
    name = "training_mode" if opset >= 14 else "is_test" if opset < 7 else ""
    if node.parameter(name) is not None:
        return f"{name} is a parameter of the function"
    if opset >= 14:
        training, said = node.attrs.get("training_mode", 0) != 0, "training_mode is set"
    elif opset >= 7:
        training = any(v.name for v in node.outputs[1:])
        said = "it has further outputs, which means training"
    else:
        training, said = node.attrs.get("is_test", 0) == 0, "is_test is not set"
    return f"{said}: its statistics come from the batch" if training else None


def unfixed_reason(node: Node) -> str | None:
    """Why a BatchNormalization is not one fixed map for each channel, as far as the node tells."""
    if reason := training_reason(node):
        return reason
    if name := node.parameter("epsilon", "spatial"):
        return f"{name} is a parameter of the function"
    if node.scope.opsets[""] < 9 and node.attrs.get("spatial", 1) == 0:
        return "spatial is 0: it has statistics for every position"
    return None


def batch_norm_affine(
    node: Node, facts: Facts
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | str:
    """(s, t), vectors in float64, with BatchNormalization(x) = s * x + t; a clause where not known.

        s = gamma / sqrt(variance + epsilon)        t = beta - mean * s

    They need not be finite: that is for the caller to see. Source: the definition of
    BatchNormalization in the ONNX operator specification.
    """
    if reason := unfixed_reason(node):
        return reason
    found: list[NDArray[np.float64]] = []
    for name, value in zip(PARAMETERS, node.inputs[1:], strict=False):
        constant = facts.constant(value)
        if constant is None:
            return f"{name} '{value.name}' is not constant: {facts.why_not_constant(value)}"
        if not is_real(constant.dtype):
            return f"{name} is of type {constant.dtype}"
        found.append(constant.float64())
    shapes = {a.shape for a in found}
    if len(found) != len(PARAMETERS) or len(shapes) != 1 or found[0].ndim != 1:
        return "its parameters are not four vectors of one size"
    gamma, beta, mean, variance = found
    epsilon = float(node.attrs.get("epsilon", DEFAULT_EPSILON))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
        return scale, beta - mean * scale


def _from_axis(default: int) -> Callable[[Node, int | None], Axes]:
    def axes(node: Node, rank: int | None) -> Axes:
        axis = int(node.attrs.get("axis", default))
        if rank is None:
            return (-1,) if axis == -1 else None
        return tuple(range(axis % rank, rank)) if rank else ()

    return axes


def _one_axis(default: int) -> Callable[[Node, int | None], Axes]:
    def axes(node: Node, rank: int | None) -> Axes:
        axis = int(node.attrs.get("axis", default))
        return (axis % rank if rank else axis,)

    return axes


def _softmax(node: Node, rank: int | None) -> Axes:
    # Before opset 13 the input is seen as a matrix: everything from the axis on is one row.
    if node.scope.opsets[""] < 13:
        return _from_axis(1)(node, rank)
    return _one_axis(-1)(node, rank)


def _listed(node: Node, rank: int | None) -> Axes:
    axes = node.attrs.get("axes", ())
    return tuple(sorted(a % rank for a in axes)) if rank else tuple(axes)


def _all_but_channels(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(a for a in range(rank) if a != 1)


def _spatial(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(range(2, rank))


def _all_but_batch(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(range(1, rank))


def _last(node: Node, rank: int | None) -> Axes:
    return (rank - 1,) if rank else (-1,)


_Row: TypeAlias = (
    "tuple[str, Callable[[Node, int | None], Axes], float | None, int | None, int | None]"
)
_CONTRIB: Final = "com.microsoft"

# (domain, operator) -> kind, axes, default epsilon, inputs that scale and shift; from the
# operators' schemas. onnxruntime keeps SimplifiedLayerNormalization in ONNX's own domain.
_ROWS: Final[dict[tuple[str, str], _Row]] = {
    ("", "BatchNormalization"): ("batch_norm", _all_but_channels, 1e-5, 1, 2),
    ("", "LayerNormalization"): ("layer_norm", _from_axis(-1), 1e-5, 1, 2),
    ("", "RMSNormalization"): ("rms_norm", _from_axis(-1), 1e-5, 1, None),
    ("", "SimplifiedLayerNormalization"): ("rms_norm", _from_axis(-1), 1e-5, 1, None),
    ("", "InstanceNormalization"): ("instance_norm", _spatial, 1e-5, 1, 2),
    ("", "GroupNormalization"): ("group_norm", _all_but_batch, 1e-5, 1, 2),
    ("", "LpNormalization"): ("l2_norm", _one_axis(-1), None, None, None),
    ("", "Softmax"): ("softmax", _softmax, None, None, None),
    ("", "LogSoftmax"): ("log_softmax", _softmax, None, None, None),
    (_CONTRIB, "SkipLayerNormalization"): ("layer_norm", _last, 1e-12, 2, 3),
    (_CONTRIB, "EmbedLayerNormalization"): ("layer_norm", _last, 1e-12, 5, 6),
    (_CONTRIB, "SimplifiedLayerNormalization"): ("rms_norm", _from_axis(-1), 1e-5, 1, None),
    (_CONTRIB, "BiasSoftmax"): ("softmax", _from_axis(1), None, None, None),
    (_CONTRIB, "GroupNorm"): ("group_norm", _all_but_batch, 1e-5, 1, 2),
    (_CONTRIB, "SkipGroupNorm"): ("group_norm", _all_but_batch, 1e-5, 1, 2),
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): ("rms_norm", _last, 1e-12, 2, None),
    (bodies.DOMAIN, "TwoPassSoftmax"): ("softmax", _one_axis(-1), None, None, None),
    (bodies.DOMAIN, "TwoPassLogSoftmax"): ("log_softmax", _one_axis(-1), None, None, None),
    (bodies.DOMAIN, "TwoPassMaskedSoftmax"): ("softmax", _one_axis(-1), None, None, None),
    (bodies.DOMAIN, "TwoPassMaskedLogSoftmax"): ("log_softmax", _one_axis(-1), None, None, None),
    (bodies.DOMAIN, "ChannelLayerNormalization"): ("layer_norm", _listed, 1e-5, 1, 2),
    (bodies.DOMAIN, "ChannelRMSNormalization"): ("rms_norm", _listed, 1e-5, 1, None),
    (bodies.DOMAIN, "GroupNormalization"): ("group_norm", _all_but_batch, 1e-5, 1, 2),
    (bodies.DOMAIN, "GroupNormalizationSilu"): ("group_norm", _all_but_batch, 1e-5, 1, 2),
}
