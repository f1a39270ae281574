"""Temporary copies: what changes in them and what does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import storage, variants
from onnxnorm.errors import UsageError
from onnxnorm.truth import Evaluator

X = np.linspace(-1.0, 1.0, 4).astype(np.float32)


def chain() -> storage.Stored:
    """Y = exp(x * w) + x, with an exponent that must not move."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["a"]),
        helper.make_node("Exp", ["a"], ["b"]),
        helper.make_node("Pow", ["b", "p"], ["c"]),
        helper.make_node("Add", ["c", "x"], ["y"]),
    ]
    weights = {
        "w": np.array([0.3, 0.7, 1.1, 0.0], np.float32),
        "p": np.array([0.5, 1.5, 2.5, 3.5], np.float32),
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return storage.from_proto(model)


def test_a_nudge_is_one_ulp_and_leaves_zeros_and_infinities() -> None:
    for dtype in (np.float16, np.float32, np.float64):
        values = np.array([1.5, -3.0, 0.0, np.inf], dtype=dtype)
        moved = variants.nudge(values, np.random.default_rng(0))
        np.testing.assert_array_equal(
            np.abs(moved[:2] - values[:2]), np.spacing(np.abs(values[:2]))
        )
        np.testing.assert_array_equal(moved[2:], values[2:])
    integers = np.arange(3)
    assert variants.nudge(integers, np.random.default_rng(0)) is integers


def test_nudged_weights_are_those_of_arithmetic_only() -> None:
    original = chain()
    before = {t.name: numpy_helper.to_array(t) for t in original.proto.graph.initializer}
    after = {
        t.name: numpy_helper.to_array(t)
        for t in variants.nudged(original, 0).proto.graph.initializer
    }
    assert not np.array_equal(before["w"], after["w"])
    np.testing.assert_array_equal(before["p"], after["p"])


def test_exposed_values_are_outputs_and_the_original_is_untouched() -> None:
    original = chain()
    data = original.proto.SerializeToString()
    out = Evaluator(variants.exposing(original, ["b", "y"])).run({"x": X})
    assert list(out) == ["y", "b"]
    assert original.proto.SerializeToString() == data


def test_a_part_has_only_what_it_needs() -> None:
    part = variants.extracted(chain(), ["a"], ["c"], {"a": (TensorProto.FLOAT, (4,))})
    graph = part.proto.graph
    assert [node.op_type for node in graph.node] == ["Exp", "Pow"]
    assert [value.name for value in graph.input] == ["a"]
    assert [tensor.name for tensor in graph.initializer] == ["p"]
    whole = Evaluator(chain()).run({"x": X}, keep=["a", "c"])
    out = Evaluator(part).run({"a": whole["a"]})
    np.testing.assert_array_equal(out["c"], whole["c"])


def test_a_part_that_does_not_exist_or_has_no_type_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no value 'z'"):
        variants.extracted(chain(), ["a"], ["z"], {})
    with pytest.raises(UsageError, match="type of value 'a'"):
        variants.extracted(chain(), ["a"], ["c"], {})


def test_frozen_random_values_are_inputs() -> None:
    graph = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["r"]),
         helper.make_node("Add", ["x", "r"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [onnx.ValueInfoProto(name="y")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    stored = storage.from_proto(model)
    (node,) = variants.random_nodes(stored)
    first, again = (node.draw(X, [X], (0, 1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    frozen = variants.frozen(stored, {variants.frozen_feed_name(node): first})
    assert variants.random_nodes(frozen) == []
    out = Evaluator(frozen).run({"x": X, "r": first})
    np.testing.assert_array_equal(out["y"], X.astype(np.float64) + first)


def _in_branches(condition: str) -> storage.Stored:
    """A model of two levels: If(condition, x + 1, If(condition, x + 2, x + 3))."""

    def shifted(name: str, by: float) -> onnx.GraphProto:
        value = numpy_helper.from_array(np.array(by, np.float32), "by")
        nodes = [
            helper.make_node("Constant", [], [f"{name}_by"], value=value),
            helper.make_node("Add", ["x", f"{name}_by"], [name]),
        ]
        return helper.make_graph(nodes, name, [], [onnx.ValueInfoProto(name=name)])

    inner = helper.make_node(
        "If", [condition], ["i"], then_branch=shifted("b", 2), else_branch=shifted("c", 3)
    )
    other = helper.make_graph([inner], "other", [], [onnx.ValueInfoProto(name="i")])
    node = helper.make_node(
        "If", [condition], ["y"], then_branch=shifted("a", 1), else_branch=other
    )
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
            helper.make_tensor_value_info("q", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [numpy_helper.from_array(np.array(True), "yes")],
    )
    imports = [helper.make_opsetid("", 17)]
    return storage.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))


def test_a_body_is_entered_whatever_the_inputs_are() -> None:
    stored = _in_branches("q")
    found = variants.bodies(stored)
    assert {str(body) for body in found} == {
        f"the {branch} branch of If '{node}'" for branch in ("then", "else") for node in "yi"
    }
    assert all(body.nested == (body.node == "i") for body in found)
    for body in found:
        copy = variants.forced(stored, body)
        if body.nested:
            assert copy is None
            continue
        assert copy is not None
        for q in (False, True):
            inner = 2 if q else 3
            expected = X.astype(np.float64) + (1 if body.name == "then_branch" else inner)
            out = Evaluator(copy).run({"x": X, "q": np.array(q)})
            np.testing.assert_array_equal(out["y"], expected)


def test_the_branch_that_a_constant_never_takes_is_no_body() -> None:
    assert [body.nested for body in variants.bodies(_in_branches("yes"))] == []
