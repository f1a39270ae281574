"""The operators that are normalizations by themselves, and one row for each in a graph.

Subgraphs that compute a normalization without such an operator are not listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from onnxnorm.facts import Facts
from onnxnorm.module import Node

Axes: TypeAlias = "tuple[int, ...] | None"


@dataclass(frozen=True)
class Norm:
    """One normalization of the model as given.

    Attributes:
        kind: `layer_norm`, `rms_norm`, `batch_norm`, `group_norm`, `instance_norm`, `l2_norm`,
            `softmax` or `log_softmax`.
        node: The node that computes it.
        input: Name of the value that is normalized.
        output: Name of the result.
        axes: The axes that the statistics are taken over; non-negative where the rank is known,
            None where it is needed and unknown.
        epsilon: Added to the variance; None where the kind has none, or a caller of the function
            gives it.
        recognised: False for a near miss: it resembles the kind and is not one.
        reason: For a near miss, the condition that failed.
    """

    kind: str
    node: Node
    input: str
    output: str
    axes: Axes
    epsilon: float | None
    recognised: bool
    reason: str


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


def find_norms(facts: Facts) -> Iterator[Norm]:
    """Every normalization operator of a model, in graph order, the main graph first."""
    for node in facts.module.nodes():
        row = _ROWS.get((node.domain or "", node.op))
        if row is None or not node.inputs or not node.outputs:
            continue
        if node.op == "LpNormalization" and node.attrs.get("p", 2) != 2:
            continue
        kind, axes_of, default_epsilon = row
        known = facts.type(node.inputs[0])
        rank = len(known.shape) if known is not None and known.shape is not None else None
        epsilon = default_epsilon
        if epsilon is not None:
            epsilon = None if node.parameter("epsilon") else node.attrs.get("epsilon", epsilon)
        training = training_reason(node) if kind == "batch_norm" else None
        yield Norm(
            kind=kind,
            node=node,
            input=node.inputs[0].name,
            output=node.outputs[0].name,
            axes=None if node.parameter("axis") else axes_of(node, rank),
            # Attributes are float32; the decimal that was meant is its shortest spelling.
            epsilon=None if epsilon is None else float(f"{epsilon:.7g}"),
            recognised=training is None,
            reason=training or "",
        )


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


def _all_but_channels(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(a for a in range(rank) if a != 1)


def _spatial(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(range(2, rank))


def _all_but_batch(node: Node, rank: int | None) -> Axes:
    return None if rank is None else tuple(range(1, rank))


def _last(node: Node, rank: int | None) -> Axes:
    return (rank - 1,) if rank else (-1,)


_Row: TypeAlias = "tuple[str, Callable[[Node, int | None], Axes], float | None]"
_CONTRIB: Final = "com.microsoft"

# (domain, operator) -> kind, axes, default epsilon; from the operators' schemas. onnxruntime
# keeps SimplifiedLayerNormalization in ONNX's own domain.
_ROWS: Final[dict[tuple[str, str], _Row]] = {
    ("", "BatchNormalization"): ("batch_norm", _all_but_channels, 1e-5),
    ("", "LayerNormalization"): ("layer_norm", _from_axis(-1), 1e-5),
    ("", "RMSNormalization"): ("rms_norm", _from_axis(-1), 1e-5),
    ("", "SimplifiedLayerNormalization"): ("rms_norm", _from_axis(-1), 1e-5),
    ("", "InstanceNormalization"): ("instance_norm", _spatial, 1e-5),
    ("", "GroupNormalization"): ("group_norm", _all_but_batch, 1e-5),
    ("", "LpNormalization"): ("l2_norm", _one_axis(-1), None),
    ("", "Softmax"): ("softmax", _softmax, None),
    ("", "LogSoftmax"): ("log_softmax", _softmax, None),
    (_CONTRIB, "SkipLayerNormalization"): ("layer_norm", _last, 1e-12),
    (_CONTRIB, "EmbedLayerNormalization"): ("layer_norm", _last, 1e-12),
    (_CONTRIB, "SimplifiedLayerNormalization"): ("rms_norm", _from_axis(-1), 1e-5),
    (_CONTRIB, "SkipSimplifiedLayerNormalization"): ("rms_norm", _last, 1e-12),
}
