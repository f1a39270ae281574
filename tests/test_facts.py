"""Facts: who reads what, what is constant in whichever spelling, what shapes are known."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import facts as facts_module
from onnxnorm import storage
from onnxnorm.facts import AnyValue, Constant, Facts, Type
from onnxnorm.module import Module, Scope
from onnxnorm.sizes import find_sizes


def parse(text: str, head: str = '<ir_version: 10, opset_import: ["" : 20]>') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{head} {text}")


def facts(model: str | onnx.ModelProto) -> Facts:
    proto = parse(model) if isinstance(model, str) else model
    return Facts(Module(storage.from_proto(proto)))


def value(known: Facts, name: str, path: str = "") -> AnyValue:
    scope = next(s for s in known.module.scopes if s.path == path)
    return scope.values[name]


def constant(known: Facts, name: str, path: str = "") -> Constant:
    found = known.constant(value(known, name, path))
    assert found is not None
    return found


def assert_constant(found: Constant, wanted: NDArray[Any]) -> None:
    array = found.array()
    assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
    assert array.tolist() == wanted.tolist()
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype


def after(inputs: str, body: str) -> str:
    """A model whose value `c` is the one to look at."""
    return f"main (float[N,3] x, float[2] v) => (float[N] y) <{inputs}> {{ {body} y = Op (x, c) }}"


# ** users and producers **


def test_uses_are_every_place_that_reads_a_value_also_in_bodies() -> None:
    known = facts(
        "main (bool c, float[N] x) => (float[N] y) {"
        " [twice] s = Mul (x, x)"
        " y = If (c) <then_branch = t () => (float[N] a) { [inner] a = Add (s, x) },"
        "             else_branch = e () => (float[N] a) { a = Identity (s) }> }"
    )
    used = [(u.node.label, u.index) for u in known.uses(value(known, "x"))]
    assert used == [("twice", 0), ("twice", 1), ("inner", 1)]
    assert [u.node.label for u in known.uses(value(known, "s"))] == ["inner", "a"]
    assert known.uses(value(known, "y")) == []


def test_producers_are_nodes() -> None:
    known = facts("main (float[N] x) => (float[N] y) <float[1] w = {1}> { [n] y = Mul (x, w) }")
    assert known.producer(value(known, "y")) is known.module.main.nodes[0]
    assert known.producer(value(known, "x")) is None
    assert known.producer(value(known, "w")) is None


def test_outputs_of_bodies_are_outputs() -> None:
    known = facts(
        "main (bool c, float[N] x) => (float[N] y) { z = Neg (x)"
        " y = If (c) <then_branch = t () => (float[N] a) { b = Neg (z) a = Neg (b) },"
        "             else_branch = e () => (float[N] a) { a = Identity (x) }> }"
    )

    def path(name: str, inside: str = "") -> str | None:
        scope: Scope | None = known.output_of(value(known, name, inside))
        return None if scope is None else scope.path

    assert path("y") == ""
    assert path("a", "y/then_branch/") == "y/then_branch/"
    assert path("a", "y/else_branch/") == "y/else_branch/"
    assert path("z") is None
    assert path("b", "y/then_branch/") is None


# ** constants in every spelling **

ONES: Final = np.ones((2, 3), np.float32)

SPELLINGS: Final[dict[str, tuple[str, str, NDArray[Any]]]] = {
    "initializer": ("float[2] c = {1, 2}", "", np.array([1, 2], np.float32)),
    "value": ("", "c = Constant <value = float[2] {1, 2}> ()", np.array([1, 2], np.float32)),
    "value_float": ("", "c = Constant <value_float = 2.5> ()", np.array(2.5, np.float32)),
    "value_floats": ("", "c = Constant <value_floats = [1.0]> ()", np.array([1], np.float32)),
    "value_int": ("", "c = Constant <value_int = 7> ()", np.array(7)),
    "value_ints": ("", "c = Constant <value_ints = [7, 8]> ()", np.array([7, 8])),
    "value_string": ("", 'c = Constant <value_string = "ü"> ()', np.array("ü", object)),
    "value_strings": (
        "",
        'c = Constant <value_strings = ["a", "ü"]> ()',
        np.array(["a", "ü"], object),
    ),
    "identity": ("float[1] w = {3}", "c = Identity (w)", np.array([3], np.float32)),
    "identities": (
        "float[1] w = {3}",
        "a = Identity (w) b = Identity (a) c = Identity (b)",
        np.array([3], np.float32),
    ),
    "identity of a constant": (
        "",
        "a = Constant <value_int = 7> () c = Identity (a)",
        np.array(7),
    ),
    "expand": (
        "float o = {1}",
        "s = Constant <value_ints = [2, 3]> () c = Expand (o, s)",
        ONES,
    ),
    "constant of shape": (
        "int64[2] s = {2, 3}",
        "c = ConstantOfShape <value = float[1] {1}> (s)",
        ONES,
    ),
    "constant of shape, zeros": (
        "int64[1] s = {2}",
        "c = ConstantOfShape (s)",
        np.zeros(2, np.float32),
    ),
    "cast": ("int64[2] w = {1, 2}", "c = Cast <to = 11> (w)", np.array([1.0, 2.0])),
    "cast to bfloat16": (
        "float[2] w = {1, 2}",
        "c = Cast <to = 16> (w)",
        np.array([1, 2], ml_dtypes.bfloat16),
    ),
    "cast like an input": (
        "double[1] w = {1}",
        "c = CastLike (w, x)",
        np.array([1], np.float32),
    ),
    "concat": (
        "float[1] a = {1}, float[2] b = {2, 3}",
        "c = Concat <axis = 0> (a, b)",
        np.array([1, 2, 3], np.float32),
    ),
    "shape": ("float[2,3] w", "c = Shape (w)", np.array([2, 3])),
    "part of a shape": ("float[2,3] w", "c = Shape <start = -1> (w)", np.array([3])),
    "reshape": (
        "float[2] w = {1, 2}, int64[2] s = {2, 1}",
        "c = Reshape (w, s)",
        np.array([[1], [2]], np.float32),
    ),
    "transpose": (
        "float[1,2] w = {1, 2}",
        "c = Transpose (w)",
        np.array([[1], [2]], np.float32),
    ),
    "unsqueeze, squeeze, flatten": (
        "float[2] w = {1, 2}, int64[1] s = {0}",
        "a = Unsqueeze (w, s) b = Squeeze (a, s) c = Flatten (b)",
        np.array([[1], [2]], np.float32),
    ),
    "slice": (
        "float[3] w = {1, 2, 3}, int64[1] one = {1}, int64[1] two = {2}",
        "c = Slice (w, one, two)",
        np.array([2], np.float32),
    ),
    "gather": (
        "float[3] w = {1, 2, 3}, int64 two = {2}",
        "c = Gather (w, two)",
        np.array(3, np.float32),
    ),
    "tile": (
        "float[1] w = {1}, int64[1] two = {2}",
        "c = Tile (w, two)",
        np.array([1, 1], np.float32),
    ),
    "absent input": (
        "float[3] w = {1, 2, 3}, int64[1] o = {0}, int64[1] e = {3}, int64[1] s = {2}",
        "c = Slice (w, o, e, , s)",
        np.array([1, 3], np.float32),
    ),
}


@pytest.mark.parametrize(
    ("opset", "body", "wanted"),
    [
        (
            9,
            "a = Unsqueeze <axes = [0, 2]> (w) c = Slice <starts = [0], ends = [1]> (a)",
            [[1], [2]],
        ),
        (11, "a = Unsqueeze <axes = [0, 2]> (w) c = Squeeze <axes = [0]> (a)", [[1], [2]]),
    ],
)
def test_axes_that_are_attributes_are_seen_through(opset: int, body: str, wanted: Any) -> None:
    model = parse(after("float[2] w = {1, 2}", body))
    model.opset_import[0].version = opset
    array = np.array(wanted, np.float32)
    assert_constant(constant(facts(model), "c"), array[np.newaxis] if opset == 9 else array)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_constants_in_every_spelling(spelling: str) -> None:
    inputs, body, wanted = SPELLINGS[spelling]
    model = after(inputs.replace("float[2,3] w", "float[2,3] w = {1, 1, 1, 1, 1, 1}"), body)
    assert_constant(constant(facts(model), "c"), wanted)


def test_a_sparse_constant_is_dense() -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([5], np.float32), "s"),
        numpy_helper.from_array(np.array([2])),
        [4],
    )
    model = parse(
        "main (float[N] x) => (float[N] y) { y = Add (x, c) z = Add (x, s) }".replace(
            "{ y", "{ c = Constant <value_int = 1> () s = Identity (x) y"
        )
    )
    node = model.graph.node[0]
    node.attribute[0].CopyFrom(helper.make_attribute("sparse_value", sparse))
    del model.graph.node[1]
    model.graph.sparse_initializer.append(sparse)
    known = facts(model)
    for name in ("c", "s"):
        assert_constant(constant(known, name), np.array([0, 0, 5, 0], np.float32))
        assert constant(known, name).nbytes == 16
    assert known.type(value(known, "s")) == Type(TensorProto.FLOAT, (4,))


def test_a_segment_of_a_tensor_is_no_constant() -> None:
    model = parse("main (float[N] x) => (float[N] y) <float[1] w = {2}> { y = Mul (x, w) }")
    model.graph.initializer[0].segment.begin = 0
    known = facts(model)
    assert known.constant(value(known, "w")) is None
    assert known.why_not_constant(value(known, "w")) == "its tensor is only a segment of one"


def test_a_constant_knows_its_size_and_its_source() -> None:
    text = 'float[2] w = {1, 2}, string[2] t = {"a", "bcd"}'
    model = parse(after(text, "a = Identity (w) c = Identity (a)"))
    nibbles = numpy_helper.from_array(np.ones(3, ml_dtypes.int4), "i")
    model.graph.initializer.append(nibbles)
    known = facts(model)
    found = constant(known, "c")
    assert (found.name, found.source, found.nbytes) == ("c", value(known, "w"), 8)
    assert constant(known, "t").nbytes == 4
    assert constant(known, "i").nbytes == 2
    np.testing.assert_array_equal(found.float64(), np.array([1.0, 2.0]), strict=True)
    assert known.constant(value(known, "c")) is found


def test_readers_of_a_constant_are_those_of_its_source() -> None:
    known = facts(
        "main (float[2] x) => (float[2] y, float[2] k) <float[2] w = {1, 2}, float[2] v = {1, 2}> {"
        " a = Identity (w) b = Identity (a) k = Identity (a)"
        " c = Add (x, b) d = Mul (c, w) y = Add (d, v) }"
    )
    assert known.readers(constant(known, "w")) == known.readers(constant(known, "b")) == 3
    assert known.readers(constant(known, "v")) == 1
    assert (known.pinned(value(known, "k")), known.pinned(value(known, "w"))) == (
        "a graph output",
        None,
    )


def test_what_is_stored_is_read_once_for_all_states() -> None:
    known = facts(
        after("float[2] w = {1, 2}", "d = Constant <value_ints = [3, 4]> () c = Add (w, w)")
    )
    later = Facts(known.module, before=known)
    for name in ("w", "d"):
        assert constant(later, name) is constant(known, name)
        assert constant(known, name).array() is constant(later, name).array()
        assert not constant(known, name).array().flags.writeable
        assert not constant(known, name).float64().flags.writeable


def test_facts_that_believe_no_stated_shape_share_what_needs_no_type() -> None:
    model = parse(
        "main (float[N] x, float16[M] like) => (float[N] y) <float[1] w = {2}, float[2] z>"
        " { c = CastLike (w, like) b = Mul (x, x) y = Identity (b) }"
    )
    model.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [7]))
    known = facts(model)
    other = known.unstated
    node = known.producer(value(known, "b"))
    assert node is not None
    assert known.uses(value(known, "b")) is other.uses(value(known, "b"))
    assert known.type(value(known, "b")) == Type(TensorProto.FLOAT, (7,))
    assert other.type(value(known, "b")) == Type(TensorProto.FLOAT, ("N",))
    assert constant(known, "c").dtype == constant(other, "c").dtype == np.float16


@pytest.mark.parametrize(
    ("text", "states"),
    [
        ("main (float[N] x) => (float[7] y) { y = Relu (x) }", False),
        ("main (float[N] x) => (float[7] y, float[N] z) { y = Relu (x) z = Relu (y) }", True),
        ("main (float[N] x) => (float[7] y) <float[N] b> { b = Neg (x) y = Relu (b) }", True),
        (
            (
                "main (float[N] x, bool c) => (float[7] y, float[N] z) { y = Relu (x)"
                " z = If (c) <then_branch = t () => (float u) { u = Neg (y) },"
                " else_branch = e () => (float v) { v = Abs (x) }> }"
            ),
            True,
        ),
        (
            (
                "main (float[N] x, bool c) => (float[N] z)"
                "{ z = If (c) <then_branch = t () => (float[7] u) { u = Neg (x) },"
                " else_branch = e () => (float[7] v) { v = Abs (x) }> }"
            ),
            True,
        ),
    ],
)
def test_facts_of_a_file_that_states_nothing_stand_for_both(text: str, states: bool) -> None:
    known = facts(parse(text))
    assert (known.unstated is not known) == states


def test_large_results_are_let_go_and_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "_HELD_LIMIT", 4)
    monkeypatch.setattr(facts_module, "_SMALL", 4)
    known = facts(
        after("float[3] w = {1, 2, 3}", "d = Unsqueeze (w, a) c = Squeeze (d)").replace(
            "<float", "<int64[1] a = {0}, float"
        )
    )
    found = constant(known, "c")
    first = found.array()
    assert found.array() is first
    gone = weakref.ref(first)
    del first
    assert gone() is None
    assert_constant(found, np.array([1, 2, 3], np.float32))


def test_bodies_see_the_constants_around_them() -> None:
    known = facts(
        "main (bool c, float[N] x) => (float[N] y) <float[1] w = {2}> { v = Identity (w)"
        " y = If (c) <then_branch = t () => (float[N] a) { u = Identity (v) a = Add (u, x) },"
        "             else_branch = e () => (float[N] a) { a = Identity (x) }> }"
    )
    assert_constant(constant(known, "u", "y/then_branch/"), np.array([2], np.float32))
    assert constant(known, "u", "y/then_branch/").source is value(known, "w")


def test_chains_may_be_as_long_as_the_graph() -> None:
    nodes = [helper.make_node("Transpose", ["v0"], ["v1"])]
    nodes += [
        helper.make_node("Identity" if i % 2 else "Transpose", [f"v{i}"], [f"v{i + 1}"])
        for i in range(1, 3000)
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [1])], [])
    graph.node.append(helper.make_node("Identity", ["x"], ["v0"]))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    known = facts(model)
    assert known.constant(value(known, "v3000")) is None
    for node in graph.node:
        node.op_type = "Identity"
    graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "w"))
    graph.node[-1].input[0] = "w"
    model.graph.CopyFrom(graph)
    known = facts(model)
    assert constant(known, "v3000").source is value(known, "w")


# ** what is not constant, and why **

FUNCTION: Final = (
    "main (float[N] x) => (float[N] y) { y = d.f <k = 1.0> (x) }"
    ' <opset_import: ["" : 20], domain: "d"> f <k> (x) => (c)'
    " { [p] a = Constant <value_float: float = @k> () c = Add (x, a) }"
)
LOOP: Final = (
    "main (int64 n, bool c, float[3] x) => (float[3] y) {"
    " y = Loop (n, c, x) <body = b (int64 i, bool k, float[3] a) => (bool k2, float[3] z)"
    " { k2 = Identity (k) z = Neg (a) }> }"
)


@pytest.mark.parametrize(
    ("text", "name", "path", "why"),
    [
        (after("float[1] w = {1}", "[n] c = Neg (w)"), "c", "", "node 'n' (Neg) computes it"),
        (after("float[1] w = {1}", "[n] a = Neg (w) c = Identity (a)"), "c", "", "node 'n' (Neg)"),
        (after("", "[n] c = Transpose (x)"), "c", "", "node 'n' (Transpose) computes it"),
        (after("", "c = Identity (v)"), "c", "", "it is a graph input"),
        (after("", "c = d.Constant <value_int = 1> ()"), "c", "", "node 'c' (Constant) computes"),
        (after("", "c = Identity (x)"), "x", "", "it is a graph input"),
        (
            "main (float[N] x, float[1] c = {2}) => (float[N] y) { y = Mul (x, c) }",
            "c",
            "",
            "it is an initializer that callers may override, being a graph input too",
        ),
        (FUNCTION, "x", "d.f/", "it is a parameter of the function"),
        (FUNCTION, "a", "d.f/", "node 'p' (Constant) takes it from a parameter of the function"),
        (
            LOOP,
            "a",
            "y/body/",
            "it is an input of the body y/body/",
        ),
        (
            after("float[2] w = {1, 2}, int64[1] s = {7}", "[n] c = Reshape (w, s)"),
            "c",
            "",
            "node 'n' (Reshape) computes it",
        ),
        (
            after("int64[2] s = {4000000, 4000000}", "[n] c = ConstantOfShape (s)"),
            "c",
            "",
            "node 'n' (ConstantOfShape) computes it",
        ),
        (
            after("float[1] w = {1}, int64[1] s = {4000000000000}", "[n] c = Expand (w, s)"),
            "c",
            "",
            "node 'n' (Expand) computes it",
        ),
        (
            after("float[1] w = {1}, int64[1] s = {4000000000000}", "[n] c = Tile (w, s)"),
            "c",
            "",
            "node 'n' (Tile) computes it",
        ),
        (
            after("float[1] w = {1e30}", "[n] c = Cast <to = 6> (w)"),
            "c",
            "",
            "node 'n' (Cast) computes it",
        ),
        (after("", "[n] c = Shape ()"), "c", "", "node 'n' (Shape) computes it"),
        (
            after("float[1] w = {1}", "[n] c = CastLike (w)"),
            "c",
            "",
            "node 'n' (CastLike) computes it",
        ),
        (after("", "[n] c = Constant ()"), "c", "", "node 'n' (Constant) computes it"),
    ],
)
def test_what_is_not_constant_has_a_reason(text: str, name: str, path: str, why: str) -> None:
    model = parse(text, '<ir_version: 10, opset_import: ["" : 20, "d" : 1]>')
    known = facts(model)
    assert known.constant(value(known, name, path)) is None
    assert known.why_not_constant(value(known, name, path)).startswith(why)


def test_before_ir_version_4_no_initializer_can_be_overridden() -> None:
    text = "main (float[N] x, float[1] c = {2}) => (float[N] y) { y = Mul (x, c) }"
    known = facts(parse(text, '<ir_version: 3, opset_import: ["" : 8]>'))
    assert_constant(constant(known, "c"), np.array([2], np.float32))


def test_results_above_the_limit_stay_in_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts_module, "_MOVED_LIMIT", 100)
    rows = ", ".join(["1"] * 20)
    for body, fits in (
        ("s = Constant <value_ints = [25]> () c = Expand (one, s)", True),
        ("s = Constant <value_ints = [26]> () c = Expand (one, s)", False),
        ("s = Constant <value_ints = [20, 1]> () c = Reshape (w, s)", True),
        ("s = Constant <value_ints = [2]> () c = Tile (w, s)", False),
        ("s = Constant <value_ints = [3, 4, 5]> () c = Gather (w, s)", True),
        ("c = Cast <to = 11> (w)", False),
        ("c = Concat <axis = 0> (w, w)", False),
    ):
        known = facts(after(f"float[20] w = {{{rows}}}, float[1] one = {{1}}", body))
        assert (known.constant(value(known, "c")) is not None) == fits, body


def test_values_without_a_reference_stay_in_the_graph() -> None:
    known = facts(after("float[2] w = {1, 2}", "c = Transpose <perm = [5]> (w)"))
    assert known.constant(value(known, "c")) is None


# ** types **


def test_types_have_dims_that_are_known_named_or_unknown() -> None:
    known = facts(
        "main (float[N,3,?] x, seq(float[2]) q) => (float[N,3,?] y) <float16[2] w = {1, 2}> {"
        " a = Neg (x) b = Cast <to = 10> (a) c = Op (x) y = Identity (a) }"
    )
    kind = known.type(value(known, "a"))
    assert kind is not None
    assert kind.shape is not None
    assert kind.shape[:2] == ("N", 3)
    assert not isinstance(kind.shape[2], int)
    assert known.type(value(known, "b")) == Type(TensorProto.FLOAT16, kind.shape)
    assert known.type(value(known, "w")) == Type(TensorProto.FLOAT16, (2,))
    assert known.type(value(known, "c")) is None
    assert known.type(value(known, "q")) is None


def test_shapes_behind_what_the_runtime_fuses() -> None:
    known = facts(
        parse(
            """main (float[N,3,6,6] x, float[N,4] z, float[4] b) => (float[] y)
            <float[2,3,1,1] w = {1, 1, 1, 1, 1, 1}, float[4,1] v = {1, 1, 1, 1}> {
              a = com.microsoft.FusedConv <activation = "Relu", pads = [1, 0, 0, 0]> (x, w, , x)
              c = com.microsoft.QuickGelu <alpha = 1.0> (a)
              d = com.microsoft.BiasGelu (z, b)
              e = com.microsoft.FusedMatMul <alpha = 0.5> (d, v)
              f = com.microsoft.FusedGemm <activation = "Relu", transB = 1> (z, d)
              g = com.microsoft.FusedMatMul <transA = 1> (d, z)
              y = Neg (e)
            }""",
            '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>',
        )
    )
    shapes = {
        "a": ("N", 2, 7, 6), "c": ("N", 2, 7, 6), "d": ("N", 4), "e": ("N", 1), "f": ("N", "N"),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert known.type(value(known, name)) == Type(TensorProto.FLOAT, shape), name
    assert known.type(value(known, "g")) is None


def test_shapes_behind_what_the_runtime_quantizes() -> None:
    known = facts(
        parse(
            """main (float[N,T,32] x, uint8[24,1,16] w, float[24] s, uint16 z) => (float[] y)
            <float u = {0.5}> {
              a = com.microsoft.MatMulNBits <K = 32, N = 24, bits = 4, block_size = 32> (x, w, s)
              q = com.microsoft.QuantizeLinear (a, u, z)
              d = com.microsoft.DequantizeLinear (q, u, z)
              y = Neg (d)
            }""",
            '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>',
        )
    )
    shape = ("N", "T", 24)
    for name in "ady":
        assert known.type(value(known, name)) == Type(TensorProto.FLOAT, shape), name
    assert known.type(value(known, "q")) == Type(TensorProto.UINT16, shape)


def test_a_type_may_have_no_shape() -> None:
    model = parse("main (float[2] x) => (float[2] y) { y = Neg (x) }")
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.ClearField("shape")
    known = facts(model)
    assert known.type(value(known, "y")) == Type(TensorProto.FLOAT, None)


def test_types_in_bodies_are_those_of_their_scope() -> None:
    known = facts(
        "main (bool c, float[4] x, double[5] z) => (float[4] y) {"
        " y = If (c) <then_branch = t () => (float[4] a) { b = Neg (x) a = Neg (b) },"
        "             else_branch = e () => (float[4] a) { b = Neg (z) a = Identity (x) }> }"
    )
    assert known.type(value(known, "b", "y/then_branch/")) == Type(TensorProto.FLOAT, (4,))
    assert known.type(value(known, "b", "y/else_branch/")) == Type(TensorProto.DOUBLE, (5,))


def test_values_of_functions_have_the_type_that_all_calls_share() -> None:
    model = parse(
        """
    main (float[2,N] a, float[3,4] b, int64[5] c) => (float[2,N] y, float[3,4] z, int64[5] w)
    {
       y = d.f (a)
       z = d.f (b)
       w = d.g (c)
    }
    <domain: "d", opset_import: ["" : 20, "d" : 1]> f (x) => (y) { t = Relu (x) y = d.h (t) }
    <domain: "d", opset_import: ["" : 20]> g (x) => (y) { y = Neg (x) }
    <domain: "d", opset_import: ["" : 20]> h (x) => (y) { y = Exp (x) }
    """,
        '<ir_version: 10, opset_import: ["" : 20, "d" : 1]>',
    )
    known = facts(model)
    for name, path in (("x", "d.f/"), ("t", "d.f/"), ("x", "d.h/"), ("y", "d.h/")):
        found = known.type(value(known, name, path))
        assert found is not None
        assert found.element == TensorProto.FLOAT
        assert found.shape is not None
        assert [d for d in found.shape if isinstance(d, int)] == []
        assert len(found.shape) == 2
    assert known.type(value(known, "y", "d.g/")) == Type(TensorProto.INT64, (5,))


@pytest.mark.parametrize("other", ["int64[2] b", "float[2,3,4] b"])
def test_calls_that_share_no_type_or_rank_leave_it_open(other: str) -> None:
    result = other.rpartition(" ")[0]
    model = parse(
        f"main (float[2,3] a, {other}) => (float[2,3] y, {result} z) {{ y = d.f (a) z = d.f (b) }}"
        ' <domain: "d", opset_import: ["" : 20]> f (x) => (y) { y = Neg (x) }',
        '<ir_version: 10, opset_import: ["" : 20, "d" : 1]>',
    )
    known = facts(model)
    found = known.type(value(known, "x", "d.f/"))
    assert found is None or found == Type(TensorProto.FLOAT, None)


def test_what_the_file_states_holds_where_inference_fails() -> None:
    model = parse("main (float[2] x) => (float[2] y) { y = Op (x) }")
    model.opset_import[0].version = 9999
    known = facts(model)
    assert known.type(value(known, "y")) == Type(TensorProto.FLOAT, (2,))


def test_shapes_are_inferred_although_large_values_stay_on_disk(tmp_path: Path) -> None:
    model = parse(
        "main (float[1,300] x) => (float[M,K] y) <int64[2] s = {1, 2}>"
        " { m = MatMul (x, w) y = Reshape (m, s) z = Identity (y) }"
    )
    tensors = model.graph.initializer
    tensors.append(numpy_helper.from_array(np.ones((300, 2), np.float32), "w"))
    shape = tensors[0]
    shape.CopyFrom(numpy_helper.from_array(np.array([1, 2]), "s"))
    (tmp_path / "s.bin").write_bytes(shape.raw_data)
    shape.ClearField("raw_data")
    shape.data_location = TensorProto.EXTERNAL
    shape.external_data.add(key="location", value="s.bin")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    known = Facts(Module(storage.load(tmp_path / "m.onnx")))
    assert not known.module.proto.graph.initializer[1].HasField("raw_data")
    for name in ("m", "z"):
        assert known.type(value(known, name)) == Type(TensorProto.FLOAT, (1, 2))


def test_inference_sees_constants_behind_identity_in_bodies_and_functions() -> None:
    known = facts(
        parse(
            "main (bool c, float[N,3] x) => (float[M] y, float[P] z) <int64[1] stored = {1}> {"
            " axes = Identity (stored)"
            " y = If (c) <then_branch = t () => (float[M] a)"
            "   { u = Unsqueeze (x, axes) a = Squeeze (u) },"
            "             else_branch = e () => (float[M] b) { b = Op (x) }>"
            " z = local.F (x) }"
            ' <domain: "local", opset_import: ["" : 20]> F (q) => (r)'
            " { s = Constant <value_ints = [0]> () i = Identity (s)"
            "   w = Unsqueeze (q, i) r = Relu (w) }",
            '<ir_version: 10, opset_import: ["" : 20, "local" : 1]>',
        )
    )
    body = next(s.path for s in known.module.scopes if "then_branch" in s.path)
    function = next(s.path for s in known.module.scopes if "local.F" in s.path)
    assert known.type(value(known, "u", body)) == Type(TensorProto.FLOAT, ("N", 1, 3))
    assert known.type(value(known, "w", function)) == Type(TensorProto.FLOAT, (1, "N", 3))


def test_nodes_come_after_what_they_read_whatever_their_place_in_the_file() -> None:
    nodes = [
        onnx.helper.make_node("Add", ["b", "c"], ["y"], name="last"),
        onnx.helper.make_node("Neg", ["b"], ["c"], name="second"),
        onnx.helper.make_node("Relu", ["x"], ["b"], name="first"),
    ]
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["N", 4]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", values[:1], values[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    facts = Facts(Module(storage.from_proto(model)))
    names = [node.name for node in facts.in_order(facts.module.main)]
    assert names == ["first", "second", "last"]
    assert find_sizes(facts).of(facts.module.main.values["y"]) == ("N", 4)


def test_what_a_body_reads_comes_before_it_in_a_file_that_is_not_sorted() -> None:
    known = facts(
        """
        main (float[2] x, bool c) => (float[2] y) {
           y = If (c) <then_branch = t () => (float[2] u) { u = Neg (a) },
                       else_branch = e () => (float[2] v) { v = Abs (b) }>
           a = Relu (b)
           b = Exp (x)
        }
        """
    )
    assert [node.op for node in known.in_order(known.module.main)] == ["Exp", "Relu", "If"]
