"""A node in an older opset: what it becomes, what it cannot say, and that both compute the same."""

from __future__ import annotations

import onnx
import pytest
from onnx import parser, printer, shape_inference

from onnxnorm import storage, verifier
from onnxnorm.errors import UsageError
from onnxnorm.older import COMPLETE, added
from onnxnorm.opset import convert
from onnxnorm.testing import assert_parity, text

REDUCTIONS = sorted(op for op in COMPLETE if op.startswith("Reduce"))
CONSTANTS = (
    "<int64[1] last = {-1}, int64[0] none = {}, int64[1] rest = {-1}, float low = {-0.5},"
    " float high = {0.5}, int64[2] two = {2, -1}, int64[4] pads = {0, 1, 0, 0},"
    " float[3] g = {1, 2, 3}, float[3] v = {1, 4, 2}, int64 k = {2}>"
)


def network(node: str, opset: int, inputs: str = "float[2,3,4] x") -> onnx.ModelProto:
    element = "int64" if "Shape" in node and "Reshape" not in node else inputs.partition("[")[0]
    element = "double" if "Cast" in node else element
    made = parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : {opset}]> main ({inputs}) => ({element}[] y)'
        f" {CONSTANTS} {{ {node} }}"
    )
    return shape_inference.infer_shapes(made)


def lowered(node: str, old: int, new: int, inputs: str = "float[2,3,4] x") -> onnx.ModelProto:
    """The model in the older opset, which the checker accepts as it did the newer."""
    before = network(node, old, inputs)
    done = convert(storage.from_proto(before), new, "onnx", (1, 31)).stored
    assert verifier.checker_complaint(storage.from_proto(before)) is None
    assert verifier.checker_complaint(done) is None
    assert_parity(before, done.complete())
    return done.complete()


def only(made: onnx.ModelProto) -> str:
    (node,) = (n for n in made.graph.node if "y" in n.output)
    return str(printer.to_text(node)).strip().removeprefix('[""] ')


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize(
    ("node", "attributes"),
    [
        ("(x, last)", "<axes: ints = [-1]> "),
        ("<keepdims = 0> (x, last)", "<keepdims: int = 0, axes: ints = [-1]> "),
        ("<noop_with_empty_axes = 1> (x, last)", "<axes: ints = [-1]> "),
        ("<noop_with_empty_axes = 0> (x)", ""),
        ("(x, none)", ""),
        ("(x, )", ""),
    ],
)
def test_axes_become_an_attribute(op: str, node: str, attributes: str) -> None:
    positive = node.replace("(x", "(p") if op == "ReduceLogSum" else node
    before = f"p = Exp (x) y = {op} {positive}"
    value = "p" if op == "ReduceLogSum" else "x"
    made = lowered(before, 18, 12 if op == "ReduceSum" else 13)
    assert only(made) == f"y = {op} {attributes}({value})"


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("node", ["(x)", "(x, )", "(x, none)"])
def test_a_reduction_over_no_axes_is_what_it_reads_or_is_refused(op: str, node: str) -> None:
    node = f"y = {op} <noop_with_empty_axes = 1, keepdims = 0> {node}"
    version = 12 if op == "ReduceSum" else 13
    if op in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"):
        assert only(lowered(node, 18, version)) == "y = Identity (x)"
    else:
        with pytest.raises(UsageError, match="noop_with_empty_axes is not known there"):
            lowered(node, 18, version)


@pytest.mark.parametrize(
    ("node", "old", "new", "after"),
    [
        ("y = Reshape <allowzero = 0> (x, two)", 17, 13, "y = Reshape (x, two)"),
        ("y = Reshape (x, two)", 14, 13, "y = Reshape (x, two)"),
        ("y = Shape <start = 0> (x)", 17, 13, "y = Shape (x)"),
        ("y = Cast <to = 11, saturate = 1> (x)", 21, 13, "y = Cast <to: int = 11> (x)"),
        ("y = Squeeze (z, last) z = Unsqueeze (x, last)", 17, 12, None),
        ("z = Unsqueeze (x, last) y = Relu (z)", 17, 9, None),
        ("y = Softmax (x)", 13, 12, "y = Softmax <axis: int = 2> (x)"),
        ("y = LogSoftmax <axis = -2> (x)", 13, 9, None),
        ("y = Hardmax <axis = 0> (x)", 14, 7, None),
        ("y = Max (x, x)", 13, 7, "y = Max (x, x)"),
        ("y = Concat <axis = -1> (x, x)", 17, 9, "y = Concat <axis: int = 2> (x, x)"),
        ("y = ReduceMean (x, last)", 18, 9, "y = ReduceMean <axes: ints = [2]> (x)"),
        ("y = Clip (x, low, high)", 17, 9, "y = Clip <min: float = -0.5, max: float = 0.5> (x)"),
        ("y = MaxPool <kernel_shape = [2], ceil_mode = 0, dilations = [1]> (x)", 17, 9, None),
        ("y = BatchNormalization <training_mode = 0> (x, g, g, g, v)", 17, 9, None),
        ("c = Constant <value_float = 2.0> () y = Mul (x, c)", 17, 11, None),
    ],
)
def test_what_is_only_spelled_otherwise(node: str, old: int, new: int, after: str | None) -> None:
    if node.startswith("y = Squeeze"):
        node = "z = Unsqueeze (x, last) y = Squeeze (z, last)"
    made = lowered(node, old, new)
    if after is not None:
        assert only(made) == after


@pytest.mark.parametrize(
    ("node", "old", "new", "reason"),
    [
        ("y = Reshape <allowzero = 1> (x, two)", 17, 13, "no attribute allowzero there"),
        ("y = Shape <start = 1> (x)", 17, 13, "no attribute start there, and it is 1"),
        ("y = Shape <end = 2> (x)", 17, 13, "no attribute end there"),
        ('y = Pad <mode = "wrap"> (x, pads, , two)', 19, 18, "no mode 'wrap' before 19"),
        ("s = Shape (x) y = Mul (s, s)", 17, 6, "is not one that can be converted to"),
        ("z = MatMul (x, w) y = Relu (z)", 17, 12, "not defined for bfloat16 there"),
        ("m = ReduceMax (x, a) y = Relu (m)", 18, 13, "its axes are known only when it runs"),
        ("y = Max (x, high)", 13, 7, "its operands may differ in shape"),
        ("y = Clip (x, l)", 17, 9, "its min is known only when it runs"),
    ],
)
def test_what_it_cannot_say(node: str, old: int, new: int, reason: str) -> None:
    inputs = "float[2,3,4] x, int64[1] a, float l"
    if "MatMul" in node:
        inputs = "bfloat16[2,3] x, bfloat16[3,2] w"
    with pytest.raises(UsageError, match=reason):
        convert(storage.from_proto(network(node, old, inputs)), new, "onnx", (1, 31))


def test_an_unknown_rank_is_no_reason_to_guess_an_axis() -> None:
    with pytest.raises(UsageError, match="counts from the back, and its rank is not known"):
        lowered("y = Concat <axis = -1> (x, x)", 17, 9, "float[] x")


def test_a_parameter_of_a_function_is_no_attribute_to_drop() -> None:
    made = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        main (float[2,3] x) => (float[N,M] y) <int64[2] s = {3, 2}> { y = local.f <z = 1> (x, s) }
        <domain: "local", opset_import: ["" : 17]>
        f <z> (v, s) => (w) { w = Reshape <allowzero: int = @z> (v, s) }
        """
    )
    with pytest.raises(UsageError, match="a parameter of the model-local function"):
        convert(storage.from_proto(made), 13, "onnx", (1, 31))


@pytest.mark.parametrize("element", ["float16", "double"])
def test_limits_of_a_clip_are_of_its_type(element: str) -> None:
    before = network("y = Clip <min = -0.5> (x)", 10, f"{element}[2,3] x")
    done = convert(storage.from_proto(before), 11, "onnx", (1, 31)).stored
    assert verifier.checker_complaint(done) is None, text(done)


def test_attributes_that_came_later_are_named_as_they_are() -> None:
    """Each is one of the newest definition, and none of the first that is converted to."""
    for op in ("Cast", "CastLike", "GRU", "LSTM", "MaxPool", "RNN", "Reshape", "Shape", "TopK"):
        first = next(v for v in range(7, 30) if onnx.defs.has(op, v, ""))
        newest = onnx.defs.get_schema(op, "").attributes
        assert added(op)
        assert added(op) <= set(newest)
        assert not added(op) & set(onnx.defs.get_schema(op, first, "").attributes) - {
            "storage_order"
        }
