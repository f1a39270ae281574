"""The operators as functions of the model: schema, and a body in standard ONNX.

    model-local function  onnxnorm::TwoPassSoftmax(X) {axis} = Softmax(X) along axis

A model that calls one of our operators carries its body, so it loads and runs anywhere: where the
library is registered onnxruntime takes the kernel, elsewhere it inlines the body. Three rules keep
that true. The body imports the model's own opset, so it is generated for it. No input is optional,
because an absent one breaks the inlined body: what is optional is an operator of its own, or has a
neutral constant (scale 1, mask 0). Every attribute is spelled out on the node, because defaults in
functions came with IR version 9.

    scale  = [] or [1], of X's type            scale * X
    mask   broadcasts with X, of X's type      scale * X + mask
    axes   any axes of X, in any order         mean and variance over them together

Types: float16, bfloat16, float32, float64. Kernels compute the first three in float32. Softmax
bodies compute in X's type; those of the norms in the type that `stash_type` names, which `node`
chooses (DOUBLE for float64, else FLOAT).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, helper

from onnxnorm.errors import UsageError

DOMAIN: Final = "onnxnorm"
VERSION: Final = 1
IR_VERSION: Final = 8  # the first with functions in a model


@dataclass(frozen=True)
class Operator:
    """One operator: what the table below says of it.

    Attributes:
        name: Its type in the domain `onnxnorm`.
        equation: What it computes.
        inputs: Its inputs, all required.
        attributes: Each attribute, and what `node` writes when it is not given; None: no default.
        opset: The oldest opset of a model that can carry its body.
        body: The nodes of the body at an opset, from `inputs` to "Y".
    """

    name: str
    equation: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    opset: int
    body: Callable[[int], list[NodeProto]]


def function(name: str, opset: int) -> FunctionProto:
    """The operator `name` as a function for a model of `opset`.

    >>> [each.op_type for each in function("TwoPassSoftmax", 17).node][-2:]
    ['Softmax', 'Reshape']

    Raises:
        UsageError: There is no such operator, or its body needs a newer opset.
    """
    operator = _operator(name)
    if opset < operator.opset:
        raise UsageError(
            f"{name} has no body at opset {opset}",
            f"Convert the model to opset {operator.opset} or newer.",
        )
    made = helper.make_function(
        DOMAIN,
        name,
        list(operator.inputs),
        ["Y"],
        operator.body(opset),
        [helper.make_opsetid("", opset)],
        attributes=list(operator.attributes),
    )
    made.doc_string = operator.equation
    return made


def node(
    name: str,
    inputs: Sequence[str],
    output: str,
    *,
    element_type: int = TensorProto.FLOAT,
    label: str | None = None,
    **attributes: Any,
) -> NodeProto:
    """A node output = name(inputs) with every attribute spelled out.

    Args:
        name: The operator.
        inputs: Value names, as many as it has inputs.
        output: The value it makes.
        element_type: Of X, as `TensorProto` numbers it; decides `stash_type`.
        label: The node's name.
        attributes: By name; what has a default may be left out.

    Raises:
        UsageError: No such operator or attribute, one without default is missing, or the number of
            inputs is wrong.
    """
    operator = _operator(name)
    if len(inputs) != len(operator.inputs) or not all(inputs):
        raise UsageError(
            f"{name} was given the inputs {list(inputs)}",
            f"Give each of: {', '.join(operator.inputs)}.",
        )
    stash = TensorProto.DOUBLE if element_type == TensorProto.DOUBLE else TensorProto.FLOAT
    values = {**operator.attributes, **attributes}
    if values.get("stash_type", stash) is None:
        values["stash_type"] = stash
    wrong = sorted(key for key in values if key not in operator.attributes)
    wrong += sorted(key for key, value in values.items() if value is None)
    if wrong:
        raise UsageError(
            f"{name}: {', '.join(wrong)} is missing, or no attribute of it",
            f"Its attributes are: {', '.join(operator.attributes)}.",
        )
    return helper.make_node(
        name, list(inputs), [output], domain=DOMAIN, **({"name": label} if label else {}), **values
    )


def add_functions(model: ModelProto) -> ModelProto:
    """Give a model that calls our operators their bodies and the import of our domain, in place.

    Looks into subgraphs and functions too. The bodies are those of the model's own opset. A model
    below IR version 8 is raised to it, which changes nothing else.

    Returns:
        The model.

    Raises:
        UsageError: It calls an operator that does not exist, or whose body needs a newer opset.
    """
    called = _called(model)
    if not called:
        return model
    opset = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
    present = {f.name for f in model.functions if f.domain == DOMAIN}
    model.functions.extend(function(name, opset) for name in sorted(called - present))
    if all(i.domain != DOMAIN for i in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
    model.ir_version = max(model.ir_version, IR_VERSION)
    return model


def _operator(name: str) -> Operator:
    if name not in OPERATORS:
        raise UsageError(f"no operator {name!r}", f"Use one of: {', '.join(OPERATORS)}.")
    return OPERATORS[name]


def _called(model: ModelProto) -> set[str]:
    found: set[str] = set()
    stack: list[Sequence[NodeProto]] = [model.graph.node, *(f.node for f in model.functions)]
    while stack:
        for each in stack.pop():
            if each.domain == DOMAIN:
                found.add(each.op_type)
            for attribute in each.attribute:
                if attribute.type == AttributeProto.GRAPH:
                    stack.append(attribute.g.node)
                stack.extend(graph.node for graph in attribute.graphs)
    return found


# -- bodies ------------------------------------------------------------------------------------


def _make(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> NodeProto:
    """A node; an attribute given as `Ref` takes the value of the function's own attribute."""
    references = {k: v for k, v in attributes.items() if isinstance(v, _Ref)}
    plain = {k: v for k, v in attributes.items() if k not in references}
    made = helper.make_node(op, list(inputs), [output], **plain)
    for key, reference in references.items():
        made.attribute.append(
            AttributeProto(name=key, type=reference.type, ref_attr_name=reference.name)
        )
    return made


@dataclass(frozen=True)
class _Ref:
    name: str
    type: AttributeProto.AttributeType


_AXIS: Final = _Ref("axis", AttributeProto.INT)
_AXES: Final = _Ref("axes", AttributeProto.INTS)
_EPSILON: Final = _Ref("epsilon", AttributeProto.FLOAT)
_GROUPS: Final = _Ref("num_groups", AttributeProto.INT)
_STASH: Final = _Ref("stash_type", AttributeProto.INT)


def _along_axis(op: str, value: str) -> list[NodeProto]:
    """Y = op(value) along the function's axis, which op itself gets as a constant.

    The short form op(value, axis=@axis) is what the standard means by a reference to an attribute,
    and onnxruntime runs it; but the reference evaluator of onnx 1.23 cannot pass one to an
    operator with a single input. So the value becomes [before, axis, behind] and back.
    """
    return [
        _make("Shape", [value], "shape"),
        _make("Constant", [], "axis_number", value_int=_AXIS),
        _make("Constant", [], "zero", value_ints=[0]),
        _make("Constant", [], "one", value_ints=[1]),
        _make("Constant", [], "end", value_ints=[2**63 - 1]),
        _make("Unsqueeze", ["axis_number", "zero"], "axis_at"),
        _make("Slice", ["shape", "zero", "axis_at"], "sizes_before"),
        _make("Slice", ["shape", "axis_at", "end"], "sizes_from_axis"),
        _make("Slice", ["sizes_from_axis", "zero", "one"], "size_of_axis"),
        _make("Slice", ["sizes_from_axis", "one", "end"], "sizes_behind"),
        # A product over nothing is not defined everywhere, so each has a factor of 1.
        _make("Concat", ["one", "sizes_before"], "factors_before", axis=0),
        _make("Concat", ["one", "sizes_behind"], "factors_behind", axis=0),
        _make("ReduceProd", ["factors_before"], "before", keepdims=1),
        _make("ReduceProd", ["factors_behind"], "behind", keepdims=1),
        _make("Concat", ["before", "size_of_axis", "behind"], "flat_shape", axis=0),
        _make("Reshape", [value, "flat_shape"], "flat", allowzero=1),
        _make(op, ["flat"], "flat_result", axis=1),
        _make("Reshape", ["flat_result", "shape"], "Y", allowzero=1),
    ]


def _softmax(op: str) -> Callable[[int], list[NodeProto]]:
    return lambda opset: _along_axis(op, "X")


def _masked(op: str) -> Callable[[int], list[NodeProto]]:
    return lambda opset: [
        _make("Mul", ["X", "scale"], "scaled"),
        _make("Add", ["scaled", "mask"], "masked"),
        *_along_axis(op, "masked"),
    ]


def _mean(opset: int, value: str, output: str, axes: _Ref | list[int]) -> list[NodeProto]:
    """ReduceMean, whose axes became an input with opset 18."""
    if opset < 18:
        return [_make("ReduceMean", [value], output, axes=axes, keepdims=1)]
    return [
        _make("Constant", [], f"{output}_axes", value_ints=axes),
        _make("ReduceMean", [value, f"{output}_axes"], output, keepdims=1),
    ]


def _normalize(
    opset: int, value: str, output: str, axes: _Ref | list[int], *, centered: bool
) -> list[NodeProto]:
    """Y = (value - mean) / sqrt(variance + epsilon)."""
    nodes = []
    if centered:
        nodes += _mean(opset, value, "mean", axes)
        nodes.append(_make("Sub", [value, "mean"], "centered"))
        value = "centered"
    nodes.append(_make("Mul", [value, value], "squared"))
    nodes += _mean(opset, "squared", "variance", axes)
    return [
        *nodes,
        _make("Constant", [], "epsilon_float", value_float=_EPSILON),
        _make("CastLike", ["epsilon_float", "variance"], "eps"),
        _make("Add", ["variance", "eps"], "guarded"),
        _make("Sqrt", ["guarded"], "deviation"),
        _make("Div", [value, "deviation"], output),
    ]


def _channel(*, centered: bool) -> Callable[[int], list[NodeProto]]:
    def body(opset: int) -> list[NodeProto]:
        nodes = [
            _make("Cast", ["X"], "stashed", to=_STASH),
            *_normalize(opset, "stashed", "normalized", _AXES, centered=centered),
            _make("CastLike", ["scale", "stashed"], "stashed_scale"),
            _make("Mul", ["normalized", "stashed_scale"], "scaled"),
        ]
        last = "scaled"
        if centered:
            nodes.append(_make("CastLike", ["bias", "stashed"], "stashed_bias"))
            nodes.append(_make("Add", ["scaled", "stashed_bias"], "shifted"))
            last = "shifted"
        return [*nodes, _make("CastLike", [last, "X"], "Y")]

    return body


def _group(*, silu: bool) -> Callable[[int], list[NodeProto]]:
    def body(opset: int) -> list[NodeProto]:
        nodes = [
            # [N, C, ...] -> [N, groups, C / groups * ...]; allowzero: sizes of 0 are sizes.
            _make("Shape", ["X"], "shape"),
            _make("Shape", ["X"], "batch", start=0, end=1),
            _make("Shape", ["X"], "item", start=1),
            _make("ReduceProd", ["item"], "elements", keepdims=1),
            _make("Constant", [], "groups", value_int=_GROUPS),
            _make("Constant", [], "zero", value_ints=[0]),
            _make("Unsqueeze", ["groups", "zero"], "group_count"),
            _make("Div", ["elements", "group_count"], "group_size"),
            _make("Concat", ["batch", "group_count", "group_size"], "grouped_shape", axis=0),
            _make("Cast", ["X"], "stashed", to=_STASH),
            _make("Reshape", ["stashed", "grouped_shape"], "grouped", allowzero=1),
            *_normalize(opset, "grouped", "normalized_groups", [2], centered=True),
            _make("Reshape", ["normalized_groups", "shape"], "normalized", allowzero=1),
            # [C] -> [C, 1, ...]
            _make("Shape", ["X"], "channels", start=1, end=2),
            _make("Shape", ["X"], "spatial", start=2),
            _make("Shape", ["spatial"], "spatial_rank"),
            _make(
                "ConstantOfShape",
                ["spatial_rank"],
                "ones",
                value=helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            ),
            _make("Concat", ["channels", "ones"], "channel_shape", axis=0),
            _make("CastLike", ["scale", "stashed"], "stashed_scale"),
            _make("CastLike", ["bias", "stashed"], "stashed_bias"),
            _make("Reshape", ["stashed_scale", "channel_shape"], "wide_scale", allowzero=1),
            _make("Reshape", ["stashed_bias", "channel_shape"], "wide_bias", allowzero=1),
            _make("Mul", ["normalized", "wide_scale"], "scaled"),
            _make("Add", ["scaled", "wide_bias"], "shifted"),
        ]
        last = "shifted"
        if silu:
            # x / (1 + e^-x), because onnxruntime 1.23 makes x * sigmoid(x) an operator that has no
            # kernel in float64.
            nodes += [
                _make("Neg", ["shifted"], "negative"),
                _make("Exp", ["negative"], "power"),
                _make("Constant", [], "one_float", value_float=1.0),
                _make("CastLike", ["one_float", "power"], "one"),
                _make("Add", ["power", "one"], "divisor"),
                _make("Div", ["shifted", "divisor"], "gated"),
            ]
            last = "gated"
        return [*nodes, _make("CastLike", [last, "X"], "Y")]

    return body


_NORM: Final = {"axes": None, "epsilon": 1e-5, "stash_type": None}
_GROUPED: Final = {"num_groups": None, "epsilon": 1e-5, "stash_type": None}

# A new operator is a row here, a row in csrc/operators.cc, and its kernel.
OPERATORS: Final[Mapping[str, Operator]] = {
    each.name: each
    for each in (
        Operator(
            "TwoPassSoftmax",
            "Y = exp(X) / sum(exp(X)) along axis",
            ("X",),
            {"axis": -1},
            14,
            _softmax("Softmax"),
        ),
        Operator(
            "TwoPassLogSoftmax",
            "Y = X - log(sum(exp(X))) along axis",
            ("X",),
            {"axis": -1},
            14,
            _softmax("LogSoftmax"),
        ),
        Operator(
            "TwoPassMaskedSoftmax",
            "Y = softmax(scale * X + mask) along axis",
            ("X", "scale", "mask"),
            {"axis": -1},
            14,
            _masked("Softmax"),
        ),
        Operator(
            "TwoPassMaskedLogSoftmax",
            "Y = log(softmax(scale * X + mask)) along axis",
            ("X", "scale", "mask"),
            {"axis": -1},
            14,
            _masked("LogSoftmax"),
        ),
        Operator(
            "ChannelLayerNormalization",
            "Y = (X - mean) / sqrt(variance + epsilon) * scale + bias, over axes",
            ("X", "scale", "bias"),
            _NORM,
            15,
            _channel(centered=True),
        ),
        Operator(
            "ChannelRMSNormalization",
            "Y = X / sqrt(mean(X^2) + epsilon) * scale, over axes",
            ("X", "scale"),
            _NORM,
            15,
            _channel(centered=False),
        ),
        Operator(
            "GroupNormalization",
            "Y = (X - mean) / sqrt(variance + epsilon) * scale + bias, over groups of channels",
            ("X", "scale", "bias"),
            _GROUPED,
            15,
            _group(silu=False),
        ),
        Operator(
            "GroupNormalizationSilu",
            "Y = Z * sigmoid(Z), Z = GroupNormalization(X, scale, bias)",
            ("X", "scale", "bias"),
            _GROUPED,
            15,
            _group(silu=True),
        ),
    )
}
