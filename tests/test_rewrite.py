"""The rewriter: staging, names, what is swept away, and where new nodes stand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Node, Value
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.rewrite import Pass, Plan, Rewriter
from onnxnorm.wire import INLINE_LIMIT

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}, float[2] unused = {3.0, 4.0}>
{
   a = Identity (w)
   m = Mul (x, a)
   y = Neg (m)
}
"""


@dataclass(frozen=True)
class At(Pass):
    """Do `change` once at the node that computes `target`."""

    target: str
    change: Callable[[Plan, Rewriter], None]
    name: ClassVar = "at"
    summary: ClassVar = "a pass of these tests"
    equation: ClassVar = "whatever the test says"

    def plan(self, facts: Facts) -> Iterator[Plan]:
        for node in facts.module.nodes():
            if node.outputs[0].name == self.target and not node.site:
                yield Plan(node, (node,), None)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        self.change(plan, rw)


def change(target: str, how: Callable[[Plan, Rewriter], None], source: str = MODEL) -> Run:
    stored = storage.from_proto(parser.parse_model(source))
    return Pipeline([At(target, how)]).run(stored)


def ops(graph: onnx.GraphProto) -> list[str]:
    return [f"{n.op_type}({', '.join(n.input)})->{','.join(n.output)}" for n in graph.node]


def test_the_root_goes_with_all_that_only_it_needed_and_nothing_else() -> None:
    done = change("m", lambda plan, rw: rw.replace("Abs", [plan.root.inputs[0]]))
    graph = done.stored.proto.graph
    assert ops(graph) == ["Abs(x)->m", "Neg(m)->y"]
    assert [t.name for t in graph.initializer] == ["unused"], "what was unused before stays"
    (remark,) = done.applied
    assert remark.removed == ("Mul m", "Identity a")


def test_new_nodes_stand_where_the_root_stood_in_the_order_of_staging() -> None:
    def two(plan: Plan, rw: Rewriter) -> None:
        inner = rw.add("Abs", [plan.root.inputs[0]], "abs")
        rw.replace("Mul", [inner, rw.constant("scale", np.full(2, 5.0, np.float32))])

    done = change("m", two)
    assert ops(done.stored.proto.graph) == [
        "Abs(x)->m_abs",
        "Mul(m_abs, m_scale)->m",
        "Neg(m)->y",
    ]
    assert [n.metadata_props[0].value for n in done.stored.proto.graph.node[:2]] == ["at:m"] * 2
    assert not done.stored.proto.graph.node[2].metadata_props


def test_fresh_names_avoid_every_name_of_every_scope() -> None:
    source = MODEL.replace("a = Identity (w)", "m_abs = Identity (w)\n a = Identity (m_abs)")

    def add(plan: Plan, rw: Rewriter) -> None:
        rw.replace("Abs", [rw.add("Abs", [plan.root.inputs[0]], "abs")])

    done = change("m", add, source)
    assert ops(done.stored.proto.graph) == ["Abs(x)->m_abs_1", "Abs(m_abs_1)->m", "Neg(m)->y"]


def test_absent_inputs_are_empty_names_and_trailing_ones_are_dropped() -> None:
    def clip(plan: Plan, rw: Rewriter) -> None:
        high = rw.constant("high", np.array(3.0, np.float32))
        rw.replace("Clip", [plan.root.inputs[0], None, high])

    assert ops(change("m", clip).stored.proto.graph)[0] == "Clip(x, , m_high)->m"
    only = change("m", lambda plan, rw: rw.replace("Clip", [plan.root.inputs[0], None, None]))
    assert ops(only.stored.proto.graph)[0] == "Clip(x)->m"


def test_what_annotations_and_training_name_stays() -> None:
    stays = "what annotations or training information name"
    for kind in ("none", "annotation", "binding", "step"):
        model = parser.parse_model(MODEL)
        if kind == "annotation":
            entry = model.graph.quantization_annotation.add(
                tensor_name="y"
            ).quant_parameter_tensor_names.add()
            entry.key, entry.value = "SCALE_TENSOR", "w"
        elif kind == "binding":
            entry = model.training_info.add().update_binding.add()
            entry.key, entry.value = "w", "w_next"
        elif kind == "step":
            step = model.training_info.add().algorithm
            step.node.append(onnx.helper.make_node("Neg", ["w"], ["w_next"]))
        rule = At("m", lambda plan, rw: rw.replace("Abs", [plan.root.inputs[0]]))
        done = Pipeline([rule]).run(storage.from_proto(model))
        names = [t.name for t in done.stored.proto.graph.initializer]
        assert names == (["unused"] if kind == "none" else ["w", "unused"]), stays


def test_bodies_go_with_their_node_and_so_do_plans_for_them() -> None:
    source = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}>
    {
       c = If (flag) <
         then_branch = a () => (float[2] p) { q = Mul (x, w)
                                              p = Neg (q) },
         else_branch = b () => (float[2] p) { p = Neg (w) }
       >
       y = Add (x, c)
    }
    """

    @dataclass(frozen=True)
    class Everywhere(At):
        def plan(self, facts: Facts) -> Iterator[Plan]:
            for node in facts.module.nodes():
                if node.op in ("Add", "Mul"):
                    yield Plan(node, (node,), None)

    rule = Everywhere("", lambda plan, rw: rw.replace("Abs", [plan.root.inputs[0]]))
    done = Pipeline([rule]).run(storage.from_proto(parser.parse_model(source)))
    assert [r.site for r in done.applied] == ["at:y"], "the other place is gone with its body"
    assert ops(done.stored.proto.graph) == ["Abs(x)->y"]
    assert [t.name for t in done.stored.proto.graph.initializer] == []
    assert done.nodes == (5, 1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "bool"])
@pytest.mark.parametrize("count", [0, 1, INLINE_LIMIT])
def test_constants_keep_their_values_wherever_they_are_held(dtype: str, count: int) -> None:
    values = (np.arange(count) % 7).astype(dtype)
    kept = {}

    def hold(plan: Plan, rw: Rewriter) -> None:
        kept["name"] = rw.constant("c", values).name
        rw.replace("Abs", [plan.root.inputs[0]])

    done = change("m", hold)
    (tensor,) = (t for t in done.stored.proto.graph.initializer if t.name == kept["name"])
    np.testing.assert_array_equal(done.stored.array(tensor), values)
    whole = done.stored.complete()
    (tensor,) = (t for t in whole.graph.initializer if t.name == kept["name"])
    np.testing.assert_array_equal(numpy_helper.to_array(tensor), values)


def test_large_constants_are_held_outside_the_skeleton() -> None:
    def hold(plan: Plan, rw: Rewriter) -> None:
        large = rw.constant("large", np.ones((64, INLINE_LIMIT), np.float32))
        ends = [rw.constant(role, np.array([at])) for role, at in (("start", 0), ("end", 2))]
        flat = rw.add("Reshape", [large, rw.constant("shape", np.array([-1]))], "flat")
        rw.replace("Slice", [flat, *ends])

    done = change("y", hold)
    assert len(done.stored.proto.SerializeToString()) < 2 * INLINE_LIMIT
    assert done.stored.total_bytes > 256 * INLINE_LIMIT


def test_in_a_function_constants_are_nodes() -> None:
    source = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[2] x) => (float[2] y) { y = local.Block (x) }
    <domain: "local", opset_import: ["" : 17]> Block (x) => (r) { r = Neg (x) }
    """

    def scale(plan: Plan, rw: Rewriter) -> None:
        large = rw.constant("scale", np.ones(INLINE_LIMIT, np.float32))
        rw.replace("Mul", [plan.root.inputs[0], large])

    done = change("r", scale, source)
    (function,) = done.stored.complete().functions
    assert [n.op_type for n in function.node] == ["Constant", "Mul"]
    assert numpy_helper.to_array(function.node[0].attribute[0].t).shape == (INLINE_LIMIT,)
    (remark,) = done.applied
    assert remark.site == "at:local.Block/r"
    assert remark.region is None, "a function may be called anywhere"


def test_a_site_in_a_body_changes_the_whole_control_flow_node() -> None:
    source = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, float[2] x, float[2] u) => (float[2] y) <float[2] w = {1.0, 2.0}>
    {
       y = If (flag) <
         then_branch = a () => (float[2] p) { q = Mul (x, w)
                                              p = Neg (q) },
         else_branch = b () => (float[2] p) { p = Neg (u) }
       >
    }
    """
    done = change("q", lambda plan, rw: rw.replace("Abs", [plan.root.inputs[0]]), source)
    (remark,) = done.applied
    assert remark.site == "at:y/then_branch/q"
    assert remark.region is not None
    assert (remark.region.inputs, remark.region.outputs) == (("flag", "x", "u"), ("y",))
    assert [t.name for t in done.stored.proto.graph.initializer] == [], "the outer weight went"


# ** sites that span several places **

SPREAD = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x) => (float[2] y, float[2] z) <float[2] w = {1.0, 2.0}>
{
   a = Neg (x)
   b = Mul (a, w)
   c = Abs (a)
   y = Add (b, c)
   z = Exp (c)
}
"""


def _node(rw: Rewriter, output: str) -> Node:
    return next(n for n in rw.module.nodes() if n.outputs[0].name == output)


def test_nodes_go_behind_what_computes_a_value_and_chosen_readers_take_them() -> None:
    def how(plan: Plan, rw: Rewriter) -> None:
        a = plan.root.inputs[0]
        made = rw.add("Sqrt", [a], "root", behind=a)
        rw.rewire(plan.root, 0, made)
        rw.replace("Relu", [_node(rw, "z").inputs[0]], at=_node(rw, "z"))

    done = change("b", how, SPREAD)
    assert ops(done.stored.proto.graph) == [
        "Neg(x)->a",
        "Sqrt(a)->a_root",
        "Mul(a_root, w)->b",
        "Abs(a)->c",
        "Add(b, c)->y",
        "Relu(c)->z",
    ]
    (remark,) = done.applied
    assert remark.edited == ("Mul b",)
    assert remark.removed == ("Exp z",)
    sites = [[e.value for e in n.metadata_props] for n in done.stored.proto.graph.node]
    assert sites == [[], ["at:b"], ["at:b"], [], [], ["at:b"]]


def test_a_value_is_redirected_and_what_computed_it_goes() -> None:
    def how(plan: Plan, rw: Rewriter) -> None:
        c, a = plan.root.outputs[0], plan.root.inputs[0]
        rw.redirect(c, a)
        rw.replace("Relu", [c], at=_node(rw, "z"))  # means a

    done = change("c", how, SPREAD)
    assert ops(done.stored.proto.graph) == [
        "Neg(x)->a",
        "Mul(a, w)->b",
        "Add(b, a)->y",
        "Relu(a)->z",
    ]
    assert set(done.applied[0].removed) == {"Exp z", "Abs c"}


def test_a_graph_input_is_followed_from_the_beginning() -> None:
    def how(plan: Plan, rw: Rewriter) -> None:
        x = plan.root.inputs[0]
        assert isinstance(x, Value)
        rw.rewire(plan.root, 0, rw.add("Sqrt", [x], "root", behind=x))

    done = change("a", how, SPREAD)
    assert ops(done.stored.proto.graph)[:2] == ["Sqrt(x)->x_root", "Neg(x_root)->a"]


def test_an_input_that_was_not_there_can_be_given() -> None:
    source = MODEL.replace("y = Neg (m)", "y = Clip (m)")

    def how(plan: Plan, rw: Rewriter) -> None:
        rw.rewire(plan.root, 2, rw.constant("most", np.asarray(3.0, np.float32), name="most"))

    done = change("y", how, source)
    assert ops(done.stored.proto.graph)[-1] == "Clip(m, , most)->y"


def test_a_site_stands_for_all_its_anchors() -> None:
    @dataclass(frozen=True)
    class Wide(At):
        def plan(self, facts: Facts) -> Iterator[Plan]:
            for plan in super().plan(facts):
                other = next(n for n in facts.module.nodes() if n.outputs[0].name == "z")
                yield Plan(
                    plan.root,
                    (plan.root, other),
                    None,
                    anchors=(other.outputs[0],),
                    outputs=(plan.root.outputs[0], other.outputs[0]),
                    action="converted",
                    note="for nothing",
                )

    def how(plan: Plan, rw: Rewriter) -> None:
        rw.replace("Relu", [plan.root.inputs[0]])

    stored = storage.from_proto(parser.parse_model(SPREAD))
    (remark,) = Pipeline([Wide("y", how)]).run(stored).applied
    assert (remark.anchors, remark.action, remark.note) == (("z",), "converted", "for nothing")
    assert remark.region is not None
    assert remark.region.outputs == ("y", "z")
    skipped = Pipeline([Wide("y", how)], skip=("y",)).run(stored)
    (kept,) = skipped.remarks
    assert (kept.outcome, kept.anchors) == ("skipped", ("z",))


def test_a_site_whose_result_nobody_reads_leaves_nothing_behind() -> None:
    source = SPREAD.replace("   z = Exp (c)\n", "   z = Exp (c)\n   d = Sin (a)\n")
    done = change("d", lambda plan, rw: rw.replace("Cos", [plan.root.inputs[0]]), source)
    assert not [n for n in done.stored.proto.graph.node if n.op_type in ("Sin", "Cos")]
