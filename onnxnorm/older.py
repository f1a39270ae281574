"""A node in the words of an older opset, where only its spelling differs.

    ReduceMax (x, axes = {-1})            ->  ReduceMax <axes = [-1]> (x)               below 18
    ReduceMax <noop_with_empty_axes> (x)  ->  Identity (x)                              below 18
    Softmax <axis = 1> (x)                ->  Transpose, Softmax <axis = 2>, Transpose  below 13
    Reshape <allowzero = 0> (x, shape)    ->  Reshape (x, shape)                        below 14
    Clip (x, lowest, highest)             ->  Clip <min = lowest, max = highest> (x)    below 11
    Constant <value_float = v> ()         ->  Constant <value = {v}> ()                 below 12

`onnx.version_converter` has no way down for these, or leaves attributes that the older definition
does not have. What an attribute says beyond the older definition is a reason to refuse.

Source: the changelog of the ONNX operators, https://onnx.ai/onnx/operators/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from onnx import AttributeProto, helper, numpy_helper

from onnxnorm.storage import Array

_EMPTY: Final = "noop_with_empty_axes"
# Where the axes became an input; the others of the family followed ReduceSum.
_AXES_BECAME_INPUT: Final[Mapping[str, int]] = {
    **{
        f"Reduce{kind}": 18
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    "ReduceSum": 13,
    "Squeeze": 13,
    "Unsqueeze": 13,
}
# Reductions of one element that are that element; of the others the specification leaves open
# whether their function is applied where nothing is reduced.
_KEEP_ONE: Final = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
# Attributes that came with a later definition, and the value that says what was so before; an
# absent one says it too. None: every entry is 1.
_ADDED: Final[Mapping[str, Mapping[str, Any]]] = {
    "ArgMax": {"select_last_index": 0},
    "ArgMin": {"select_last_index": 0},
    "AveragePool": {"ceil_mode": 0, "dilations": None},
    "Cast": {"saturate": 1, "round_mode": b"up"},
    "CastLike": {"saturate": 1, "round_mode": b"up"},
    "DepthToSpace": {"mode": b"DCR"},
    "GRU": {"layout": 0},
    "GatherND": {"batch_dims": 0},
    "LSTM": {"layout": 0},
    "LpPool": {"ceil_mode": 0, "dilations": None},
    "MaxPool": {"ceil_mode": 0, "dilations": None, "storage_order": 0},
    "RNN": {"layout": 0},
    "Reshape": {"allowzero": 0},
    "ScatterElements": {"reduction": b"none"},
    "ScatterND": {"reduction": b"none"},
    "Shape": {"start": 0},
    "TopK": {"largest": 1, "sorted": 1},
}
# Without a value that says what was so before.
_ADDED_FREE: Final[Mapping[str, tuple[str, ...]]] = {"Shape": ("end",)}
# Values that an attribute of the same definition had not yet.
_LATER_VALUES: Final[Mapping[tuple[str, str], tuple[int, tuple[bytes, ...]]]] = {
    ("Pad", "mode"): (19, (b"wrap",)),
    ("Resize", "coordinate_transformation_mode"): (19, (b"half_pixel_symmetric",)),
    ("ScatterElements", "reduction"): (18, (b"max", b"min")),
    ("ScatterND", "reduction"): (18, (b"max", b"min")),
}
# Before 11 an axis counts from the front; Gather, Scatter and OneHot counted both ways before.
_NEGATIVE_SINCE: Final = 11
_AXIS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("ArgMax", "ArgMin", "Compress", "Concat", "Flatten", "Hardmax"), "axis"),
    **dict.fromkeys(("LogSoftmax", "Softmax", "Split", "TopK"), "axis"),
    **dict.fromkeys(_AXES_BECAME_INPUT, "axes"),
}


_BROADCAST: Final = ("Max", "Mean", "Min", "Sum")
# Before 13 these take all axes from theirs on as one.
_FLATTENED: Final = ("Hardmax", "LogSoftmax", "Softmax")
# What `respelled` knows all differences of.
COMPLETE: Final = frozenset(
    (*_AXES_BECAME_INPUT, *_FLATTENED, "BatchNormalization", "Clip", "Constant")
)


@dataclass(frozen=True)
class Unsaid:
    """Why an older opset has no words for a node."""

    reason: str


@dataclass(frozen=True)
class Known:
    """What is known of the values of a node, by name.

    Attributes:
        constant: The array of a constant; None for a value known only at run time.
        shape: The dims, of which some may be symbols or unknown; None where the rank is not known.
    """

    constant: Callable[[str], Array | None]
    shape: Callable[[str], tuple[int | str | None, ...] | None]

    def rank(self, name: str) -> int | None:
        """The number of axes; None where it is not known."""
        shape = self.shape(name)
        return None if shape is None else len(shape)


def added(op: str) -> frozenset[str]:
    """Attributes that later definitions gave an operator, and that change nothing when absent."""
    return frozenset((*_ADDED.get(op, {}), *_ADDED_FREE.get(op, ())))


def respelled(
    node: onnx.NodeProto, old: int, new: int, known: Known
) -> Sequence[onnx.NodeProto] | Unsaid:
    """A node as the older opset spells it, as far as this module knows a spelling.

    Args:
        node: An operator of ONNX's own domain; it is not changed.
        old: The opset that it is of.
        new: The opset that is wanted, an older one.
        known: What is known of its inputs and outputs.

    Returns:
        Nodes of the same outputs, `node` itself where there is nothing to respell; or the reason
        why the older opset cannot say it.
    """
    later = _later_value(node, new) or _parameter(node, new)
    if later is not None:
        return later
    made = onnx.NodeProto()
    made.CopyFrom(node)
    if node.op_type in _FLATTENED and new < 13 <= old:
        return _along_one_axis(made, new, known)
    complaint: Unsaid | None = None
    became_input = _AXES_BECAME_INPUT.get(node.op_type)
    if became_input is not None and new < became_input <= old:
        complaint = _axes_to_attribute(made, known)
    elif node.op_type == "Constant" and new < 12:
        _value_to_tensor(made)
    elif node.op_type == "Clip" and new < 11 <= old:
        complaint = _limits_to_attributes(made, known)
    elif node.op_type in _BROADCAST and new < 8:
        shapes = {known.shape(name) for name in node.input}
        if len(shapes) > 1 or not all(_known(shape) for shape in shapes):
            complaint = Unsaid("its operands may differ in shape, which is so since 8")
    elif node.op_type == "BatchNormalization" and new < 14 <= old:
        more = sum(map(bool, node.output)) > 1
        complaint = Unsaid("it has further outputs") if more else _drop(made, "training_mode", 0)
    else:
        for name, neutral in _ADDED.get(node.op_type, {}).items():
            if not _has(node.op_type, new, name):
                complaint = complaint or _drop(made, name, neutral)
        for name in _ADDED_FREE.get(node.op_type, ()):
            if not _has(node.op_type, new, name) and _attribute(made, name) is not None:
                complaint = Unsaid(f"there is no attribute {name} there")
    if complaint is None and new < _NEGATIVE_SINCE:
        complaint = _count_from_the_front(made, known)
    if complaint is not None:
        return complaint
    return [node if made == node else made]


def _known(shape: tuple[int | str | None, ...] | None) -> bool:
    return shape is not None and all(isinstance(dim, int) for dim in shape)


def _has(op: str, opset: int, attribute: str) -> bool:
    return attribute in onnx.defs.get_schema(op, opset, "").attributes


def _attribute(node: onnx.NodeProto, name: str) -> AttributeProto | None:
    """An attribute with its value; none for one that is a parameter of a function."""
    return next((a for a in node.attribute if a.name == name and not a.ref_attr_name), None)


def _remove(node: onnx.NodeProto, *names: str) -> None:
    kept = [a for a in node.attribute if a.name not in names]
    del node.attribute[:]
    node.attribute.extend(kept)


def _later_value(node: onnx.NodeProto, new: int) -> Unsaid | None:
    for (op, name), (since, values) in _LATER_VALUES.items():
        found = _attribute(node, name) if op == node.op_type and new < since else None
        if found is not None and found.s in values:
            return Unsaid(f"there is no {name} '{found.s.decode()}' before {since}")
    return None


def _parameter(node: onnx.NodeProto, new: int) -> Unsaid | None:
    """Whether a parameter of the function decides what the node is there."""
    unknown = {a.name for a in node.attribute if not _has(node.op_type, new, a.name)}
    unknown |= {
        n for (op, n), (since, _) in _LATER_VALUES.items() if op == node.op_type and new < since
    }
    if new < _NEGATIVE_SINCE:
        unknown.add(_AXIS.get(node.op_type, ""))
    if any(a.ref_attr_name and a.name in unknown for a in node.attribute):
        return Unsaid("an attribute of it is a parameter of the model-local function")
    return None


def _drop(node: onnx.NodeProto, name: str, neutral: object) -> Unsaid | None:
    """Leave an attribute out that says what was so before there was one."""
    found = _attribute(node, name)
    if found is None:
        return None
    value = helper.get_attribute_value(found)
    same = all(entry == 1 for entry in value) if neutral is None else value == neutral
    if not same:
        said = value.decode(errors="replace") if isinstance(value, bytes) else value
        return Unsaid(f"there is no attribute {name} there, and it is {said}")
    _remove(node, name)
    return None


def _axes_to_attribute(node: onnx.NodeProto, known: Known) -> Unsaid | None:
    empty = _attribute(node, _EMPTY)
    keeps = empty is not None and empty.i != 0
    given = node.input[1] if len(node.input) > 1 else ""
    axes: Array | None = np.zeros(0, np.int64) if not given else known.constant(given)
    if axes is None:
        return Unsaid("its axes are known only when it runs")
    _remove(node, _EMPTY)
    del node.input[1:]
    if axes.size:
        node.attribute.append(helper.make_attribute("axes", [int(a) for a in axes.reshape(-1)]))
    elif keeps and node.op_type not in _KEEP_ONE:
        return Unsaid(f"it has no axes, and {_EMPTY} is not known there")
    elif keeps:
        node.op_type = "Identity"
        del node.attribute[:]
    return None


def _value_to_tensor(node: onnx.NodeProto) -> None:
    for name, element in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_string", object),
        ("value_strings", object),
    ):
        found = _attribute(node, name)
        if found is not None:
            array = np.array(helper.get_attribute_value(found), dtype=element)
            _remove(node, name)
            node.attribute.append(
                helper.make_attribute("value", numpy_helper.from_array(array, node.output[0]))
            )


def _along_one_axis(
    node: onnx.NodeProto, new: int, known: Known
) -> Sequence[onnx.NodeProto] | Unsaid:
    """Let the axis be the last one, which is one axis in every opset."""
    found = _attribute(node, "axis")
    axis, rank = -1 if found is None else found.i, known.rank(node.input[0])
    _remove(node, "axis")
    if rank is None:
        if axis != -1 or new < _NEGATIVE_SINCE:
            return Unsaid(f"its axis is {axis}, and its rank is not known")
        node.attribute.append(helper.make_attribute("axis", -1))
        return [node]
    node.attribute.append(helper.make_attribute("axis", max(rank - 1, 0)))
    if axis % max(rank, 1) >= rank - 1:
        return [node]
    order = list(range(rank))
    order[axis], order[-1] = order[-1], order[axis]
    given, result = node.input[0], node.output[0]
    node.input[0], node.output[0] = "turned", "alone"
    return [
        helper.make_node("Transpose", [given], ["turned"], perm=order),
        node,
        helper.make_node("Transpose", ["alone"], [result], perm=order),
    ]


def _limits_to_attributes(node: onnx.NodeProto, known: Known) -> Unsaid | None:
    """Say a limit that is absent too: the older definition clips at the largest float there."""
    limits = {"min": -np.inf, "max": np.inf}
    for value, name in zip(node.input[1:], limits, strict=False):
        limit = known.constant(value) if value else None
        if limit is not None:
            limits[name] = float(limit.reshape(()))
        elif value:
            return Unsaid(f"its {name} is known only when it runs")
        if float(np.float32(limits[name])) != limits[name]:
            return Unsaid(f"its {name} is no float32, which the attribute is")
    del node.input[1:]
    node.attribute.extend(helper.make_attribute(name, limit) for name, limit in limits.items())
    return None


def _count_from_the_front(node: onnx.NodeProto, known: Known) -> Unsaid | None:
    if node.op_type == "Slice":
        axes = known.constant(node.input[3]) if len(node.input) > 3 and node.input[3] else None
        if axes is not None and (axes < 0).any():
            return Unsaid(f"its axes count from the back, which is so since {_NEGATIVE_SINCE}")
        return None
    name = _AXIS.get(node.op_type)
    found = _attribute(node, name) if name is not None else None
    if found is None:
        return None
    values = found.ints if found.type == AttributeProto.INTS else [found.i]
    if all(value >= 0 for value in values):
        return None
    rank = known.rank(node.output[0] if node.op_type == "Unsqueeze" else node.input[0])
    if rank is None:
        return Unsaid(f"{found.name} counts from the back, and its rank is not known")
    counted = [value + rank if value < 0 else value for value in values]
    if found.type == AttributeProto.INTS:
        del found.ints[:]
        found.ints.extend(counted)
    else:
        found.i = counted[0]
    return None
