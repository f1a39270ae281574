"""Constants of the same type, shape and bytes become one; nothing else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxnorm
from onnxnorm.passes.merge_constants import MergeConstants
from onnxnorm.session import optimized_graph
from onnxnorm.staging import save
from onnxnorm.storage import from_proto
from onnxnorm.testing import assert_parity, assert_rewrites, run

RULE = MergeConstants(min_bytes=8)
TWO = "float[2] v = {1.0, 2.0}, float[2] w = {1.0, 2.0}"


def graph(body: str, constants: str = TWO, outputs: str = "", functions: str = "") -> str:
    domain = ', "f" : 1' if functions else ""
    return f"""
    <ir_version: 8, opset_import: ["" : 17{domain}]>
    main (float[N,2] x, bool c) => (float[N,2] y{outputs}) <{constants}> {{ {body} }}
    {functions}
    """


def names(model: onnx.ModelProto) -> list[str]:
    return [tensor.name for tensor in model.graph.initializer]


def test_all_readers_read_the_first() -> None:
    done = assert_rewrites(
        graph("a = Mul (x, v)\n b = Add (a, w)\n d = Sub (b, w)\n y = Div (d, v)"),
        graph(
            "a = Mul (x, v)\n b = Add (a, v)\n d = Sub (b, v)\n y = Div (d, v)",
            "float[2] v = {1.0, 2.0}",
        ),
        RULE,
    )
    (remark,) = done.applied
    assert remark.site == "merge-constants:b"  # the first that reads what goes
    assert remark.note == "'w' is 'v'"


@pytest.mark.parametrize(
    "constants",
    [
        "float[2] v = {1.0, 2.0}, float[2] w = {1.0, 2.5}",
        "float[2] v = {0.0, 2.0}, float[2] w = {-0.0, 2.0}",  # 1 / x tells them apart
        "float[2] v = {1.0, 2.0}, float[1,2] w = {1.0, 2.0}",
    ],
)
def test_what_differs_in_a_value_a_sign_or_a_shape_stays(constants: str) -> None:
    assert not run(graph("a = Mul (x, v)\n y = Add (a, w)", constants), RULE).remarks


def test_the_same_bytes_of_another_type_stay() -> None:
    constants = "float[2] v = {0.0, 0.0}, int32[2] w = {0, 0}"
    text = graph("a = Mul (x, v)\n b = Cast <to: int = 1> (w)\n y = Add (a, b)", constants)
    assert not run(text, RULE).remarks


def test_a_nan_is_equal_to_itself() -> None:
    model = onnx.parser.parse_model(graph("a = Mul (x, v)\n y = Add (a, w)"))
    for tensor in model.graph.initializer:
        array = np.array([np.nan, 1.0], dtype=np.float32)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    assert names(run(model, RULE).stored.complete()) == ["v"]


def test_what_others_name_stays() -> None:
    text = graph("a = Mul (x, v)\n y = Add (a, w)", outputs=", float[2] w")
    assert not run(text, RULE).remarks
    kept = run(graph("a = Mul (x, v)\n y = Add (a, w)", outputs=", float[2] v"), RULE)
    assert names(kept.stored.complete()) == ["v"]  # the one that goes is not the output


def test_an_input_with_a_default_is_no_constant() -> None:
    model = onnx.parser.parse_model(graph("a = Mul (x, v)\n y = Add (a, w)"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2]))
    assert not run(model, RULE).remarks


def test_below_ir_version_4_the_input_of_a_constant_goes_with_it() -> None:
    model = onnx.parser.parse_model(graph("a = Mul (x, v)\n y = Add (a, w)"))
    model.ir_version = 3
    model.opset_import[0].version = 8
    for name in ("v", "w"):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2])
        model.graph.input.append(info)
    after = run(model, RULE).stored.complete()
    assert names(after) == ["v"]
    assert [i.name for i in after.graph.input] == ["x", "c", "v"]
    onnx.checker.check_model(after)


def test_constant_nodes_and_initializers_are_alike() -> None:
    body = "w = Constant <value = float[2] {1.0, 2.0}> ()\n"
    done = assert_rewrites(
        graph(f"{body} a = Mul (x, v)\n y = Add (a, w)", "float[2] v = {1.0, 2.0}"),
        graph("a = Mul (x, v)\n y = Add (a, v)", "float[2] v = {1.0, 2.0}"),
        RULE,
    )
    assert len(done.applied) == 1


def test_a_node_reads_no_constant_that_comes_behind_it() -> None:
    text = graph(
        """u = Constant <value = float[2] {1.0, 2.0}> ()
        a = Mul (x, u)
        w = Constant <value = float[2] {1.0, 2.0}> ()
        y = Add (a, w)""",
        "float[1] z = {0.0}",
    )
    after = run(text, RULE).stored.complete()
    assert [n.op_type for n in after.graph.node] == ["Constant", "Mul", "Add"]
    assert_parity(text, after)


def test_readers_in_bodies_follow() -> None:
    text = graph(
        """a = Mul (x, v)
        y = If (c) <then_branch = yes () => (float[N,2] t) { t = Add (a, w) },
                    else_branch = no () => (float[N,2] e) { e = Sub (a, w) }>"""
    )
    done = run(text, RULE)
    after = done.stored.complete()
    assert [r.site for r in done.applied] == ["merge-constants:y"]
    assert names(after) == ["v"]
    assert_parity(text, after)


def test_functions_keep_theirs_apart_from_the_graph() -> None:
    function = """<domain: "f", opset_import: ["" : 17]>
    twice (p) => (q) {
        s = Constant <value = float[2] {1.0, 2.0}> ()
        t = Constant <value = float[2] {1.0, 2.0}> ()
        r = Mul (p, s)
        q = Add (r, t)
    }"""
    text = graph("y = f.twice (x)", "float[1] z = {0.0}", functions=function)
    after = run(text, RULE).stored.complete()
    assert [n.op_type for n in after.functions[0].node] == ["Constant", "Mul", "Add"]
    assert_parity(text, after)


def test_small_ones_stay_unless_asked_for() -> None:
    text = graph("a = Mul (x, v)\n y = Add (a, w)")
    assert not run(text, MergeConstants()).remarks


def test_what_becomes_the_same_onnxruntime_computes_once(tmp_path: Path) -> None:
    """Of two products with equal weights it makes one when it sees that they are the same."""
    model = onnx.parser.parse_model(
        graph("a = MatMul (x, v)\n b = MatMul (x, w)\n y = Concat <axis: int = 0> (a, b)")
    )
    for tensor in model.graph.initializer:
        array = np.arange(1024, dtype=np.float32).reshape(2, 512)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    counts = []
    for name, passes in (("before", ()), ("after", (RULE,))):
        save(run(model, *passes).stored, tmp_path / name)
        nodes = optimized_graph(tmp_path / name).graph.node
        counts.append(sum(node.op_type == "MatMul" for node in nodes))
    assert counts == [2, 1]


def test_it_waits_until_the_others_are_done() -> None:
    """A BatchNormalization goes into a weight of its own, and what is equal then is one."""
    model = _twins(equal=True)
    done = onnxnorm.optimize(model, parity=False, latency=False)
    assert [r["site"] for r in done.report.sites if r["pass"] == "merge-constants"]
    assert len(done.model.graph.initializer) == 3  # a weight, and biases below `min_bytes`
    again = onnxnorm.optimize(done.model, parity=False, latency=False)
    assert again.model == done.model
    different = onnxnorm.optimize(_twins(equal=False), parity=False, latency=False).model
    assert len(different.graph.initializer) == 4
    assert_parity(_twins(equal=False), different)


def _twins(*, equal: bool) -> onnx.ModelProto:
    """Two convolutions of the same weight, each with a BatchNormalization, of one or two scales."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(8, 8, 3, 3)).astype(np.float32)
    tensors, nodes, at = [], [], "x"
    for i in range(2):
        scale = np.full(8, 2.0 if equal else 2.0 + i, np.float32)
        tensors.append(numpy_helper.from_array(weight, f"w{i}"))
        tensors += [numpy_helper.from_array(scale, f"{n}{i}") for n in "sbmv"]
        nodes += [
            onnx.helper.make_node("Conv", [at, f"w{i}"], [f"c{i}"], pads=[1] * 4),
            onnx.helper.make_node(
                "BatchNormalization", [f"c{i}", *(f"{n}{i}" for n in "sbmv")], [f"n{i}"]
            ),
            onnx.helper.make_node("Relu", [f"n{i}"], [f"r{i}"]),
        ]
        at = f"r{i}"
    info = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 8, 6, 6])
        for n in ("x", at)
    ]
    graph = onnx.helper.make_graph(nodes, "twins", info[:1], info[1:], tensors)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=8))
def test_any_chain_computes_the_same_with_as_few_constants_as_differ(
    chain: list[tuple[int, int]],
) -> None:
    """Each link reads a tensor of one of three values in one of two shapes, a copy of its own."""
    nodes, tensors, at = [], [], "x"
    for i, (value, shape) in enumerate(chain):
        array = np.full([(2,), (1, 2)][shape], value + 1, np.float32)
        tensors.append(numpy_helper.from_array(array, f"k{i}"))
        out = "y" if i == len(chain) - 1 else f"t{i}"
        nodes.append(onnx.helper.make_node(["Mul", "Add"][i % 2], [at, f"k{i}"], [out]))
        at = out
    info = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 2]) for n in ("x", "y")
    ]
    graph = onnx.helper.make_graph(nodes, "chain", info[:1], info[1:], tensors)
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    after = run(from_proto(model).complete(), RULE).stored.complete()
    assert len(after.graph.initializer) == len(set(chain))
    assert_parity(model, after)
