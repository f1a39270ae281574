"""Transposes and Reshapes that come to nothing, or to one Transpose."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser

from onnxnorm import rearrange
from onnxnorm.errors import VerificationError
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_layout import FoldLayout
from onnxnorm.testing import assert_parity, assert_rewrites, assert_sound, run
from tests import texts
from tests.mutants import mutated
from tests.networks import Net

RULE = FoldLayout()


def graph(body: str, weights: str = "", x: str = "N,6,8", y: str = "N,6,8") -> str:
    return texts.graph(body, weights, x, y)


IMAGE = (
    "a = Transpose <perm = [0, 2, 1]> (x)\n b = Reshape (a, image)\n c = Reshape (b, tokens)"
    "\n d = Transpose <perm = [0, 2, 1]> (c)\n y = Relu (d)"
)
SHAPES = "int64[4] image = {0, 8, 3, 2}, int64[3] tokens = {0, 8, -1}"


def test_tokens_to_an_image_and_back() -> None:
    assert_rewrites(graph(IMAGE, SHAPES), graph("y = Relu (x)"), RULE)


def test_with_shapes_that_the_graph_computes() -> None:
    body = (
        "s = Shape (x)\n n = Gather (s, zero)\n l = Gather (s, one)\n nu = Unsqueeze (n, at)"
        "\n lu = Unsqueeze (l, at)\n t = Concat <axis = 0> (nu, eight, lu, onev)"
        "\n u = Concat <axis = 0> (nu, eight, lu)\n a = Transpose <perm = [0, 2, 1]> (x)"
        "\n b = Reshape (a, t)\n c = Reshape (b, u)\n d = Transpose <perm = [0, 2, 1]> (c)"
        "\n y = Relu (d)"
    )
    weights = (
        "int64 zero = {0}, int64 one = {1}, int64[1] at = {0}, int64[1] eight = {8},"
        " int64[1] onev = {1}"
    )
    assert_rewrites(
        graph(body, weights, "N,L,8", "N,L,8"), graph("y = Relu (x)", "", "N,L,8", "N,L,8"), RULE
    )


def test_what_comes_to_one_transpose() -> None:
    body = IMAGE.replace("d = Transpose <perm = [0, 2, 1]>", "d = Transpose <perm = [2, 0, 1]>")
    after = graph("d = Transpose <perm = [1, 0, 2]> (x)\n y = Relu (d)", y="6,N,8")
    assert_rewrites(graph(body, SHAPES, y="6,N,8"), after, RULE)


def test_a_transpose_that_is_there_already_is_read() -> None:
    body = (
        "a = Transpose <perm = [0, 2, 1]> (x)\n r = Relu (a)\n t = Transpose <perm = [0, 2, 1]> (x)"
        "\n b = Reshape (t, image)\n c = Reshape (b, tokens)\n y = Add (r, c)"
    )
    after = "a = Transpose <perm = [0, 2, 1]> (x)\n r = Relu (a)\n y = Add (r, a)"
    assert_rewrites(graph(body, SHAPES, y="N,8,6"), graph(after, y="N,8,6"), RULE)


@pytest.mark.parametrize("opset", [7, 17])
def test_an_identity_in_between_hides_nothing(opset: int) -> None:
    moves = IMAGE.replace("= Reshape (b, tokens)", "= Reshape (i, tokens)")
    body = moves.replace("\n c =", "\n i = Identity (b)\n c =")
    assert_rewrites(
        graph(body, SHAPES).replace(": 17]", f": {opset}]"),
        graph("y = Relu (x)").replace(": 17]", f": {opset}]"),
        RULE,
    )
    # A scale goes into the convolution in front of an Identity.
    net = Net()
    conv = net.op("Conv", net.input("x", ["batch", 4, 3, 3]), net.matrix(4, 4, 1, 1))
    scaled = net.op("Mul", net.op("Identity", conv), net.keep(np.full((4, 1, 1), 2.0)))
    done = run(net.model(net.op("Relu", scaled)), FoldAffine(), RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Conv", "Relu"]


@pytest.mark.parametrize(
    "body",
    [
        "a = Relu (x)\n y = Identity (a)",  # an output keeps its name
        "y = Identity (x)",
        "a = Identity (w)\n y = Add (x, a)",  # of a weight: it is a constant to all
    ],
)
def test_identities_that_stay(body: str) -> None:
    assert not run(graph(body, "float[8] w = {1, 2, 3, 4, 5, 6, 7, 8}"), RULE).applied


def test_an_identity_of_another_scope_stays() -> None:
    inner = "g () => (float[N,6,8] {0}) {{ {0}i = Identity (x)\n {0} = Relu ({0}i) }}"
    then, other = inner.format("p"), inner.format("q")
    body = f"y = If (c) <then_branch = {then}, else_branch = {other}>"
    assert not run(graph(body, "bool c = {1}"), RULE).applied


def test_what_others_read_stays_and_the_rest_goes() -> None:
    body = f"{IMAGE}\n z = Abs (b)".replace("y = Relu (d)", "r = Relu (d)")
    body += "\n k = ReduceMax <axes = [2, 3]> (z)\n q = Unsqueeze (k, at)\n y = Add (r, q)"
    done = run(graph(body, f"{SHAPES}, int64[1] at = {{1}}"), RULE)
    ops = [n.op_type for n in done.stored.proto.graph.node]
    assert ops.count("Transpose") == ops.count("Reshape") == 1
    assert_parity(parser.parse_model(graph(body, f"{SHAPES}, int64[1] at = {{1}}")),
                  done.stored.complete())  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tokens = {0, 8, -1}", "tokens = {0, 6, -1}"),  # other rows
        ("image = {0, 8, 3, 2}", "image = {0, 2, 3, 8}"),
    ],
)
def test_what_mixes_elements_stays(old: str, new: str) -> None:
    body = IMAGE if "tokens" in old else IMAGE.replace(
        "c = Reshape (b, tokens)", "e = Transpose <perm = [0, 3, 2, 1]> (b)"
        "\n c = Reshape (e, tokens)")  # fmt: skip
    text = graph(body, SHAPES.replace(old, new), y="N,8,6" if "tokens" in old else "N,6,8")
    assert not run(text, RULE).applied


def test_a_result_that_is_an_output_keeps_its_nodes() -> None:
    text = graph(IMAGE.replace("\n y = Relu (d)", "").replace("d = Tr", "y = Tr"), SHAPES)
    done = run(text, RULE)  # the Reshapes between the Transposes go
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Transpose", "Transpose"]
    assert [v.name for v in done.stored.proto.graph.output] == ["y"]


JOINED = "j = Concat <axis = 1> (a, b)\n p = Slice (j, {}, {}, axis, step)\n y = Relu (p)"
CUTS = (
    "int64[1] zero = {0}, int64[1] two = {2}, int64[1] six = {6}, int64[1] end = {2147483647},"
    " int64[1] axis = {1}, int64[1] step = {1}, int64[1] one = {1}"
)


def joined(start: str, end: str, b: str = "N,L,8", step: str = "step") -> str:
    body = JOINED.format(start, end).replace("step", step)
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,8] a, float[{b}] b) => (float[N,M,8] y)
    <{CUTS}>
    {{
       {body}
    }}
    """


@pytest.mark.parametrize(
    ("start", "end", "b", "left"),
    [
        ("zero", "two", "N,L,8", "a"),
        ("two", "end", "N,L,8", "b"),
        ("two", "six", "N,4,8", "b"),
        ("two", "six", "N,5,8", None),
        ("two", "six", "N,L,8", None),
        ("one", "two", "N,4,8", None),
        ("zero", "end", "N,4,8", None),
    ],
)
def test_a_slice_of_what_was_joined(start: str, end: str, b: str, left: str | None) -> None:
    model = joined(start, end, b)
    done = run(parser.parse_model(model), RULE)
    assert_sound(parser.parse_model(model), done, RULE)
    nodes = done.stored.proto.graph.node
    if left is None:
        assert [n.op_type for n in nodes] == ["Concat", "Slice", "Relu"]
        return
    assert [(n.op_type, list(n.input)) for n in nodes] == [("Relu", [left])]
    assert_parity(model, done.stored.complete())


def test_a_slice_with_other_steps_stays() -> None:
    assert not run(parser.parse_model(joined("zero", "two", step="two")), RULE).applied


def strided(row: int = 6, first: int = 0, column: int = 1, taken: str = "n") -> str:
    """x.as_strided([N, 6, 1], [6, 1, 1]) as exporters write it, for an x of shape [N, 6, 1]."""
    columns = ", ".join(str(column * i) for i in range(6))
    return graph(
        f"f = Reshape (x, flat)\n s = Shape <start = 0, end = 1> (x)\n n = Squeeze (s)"
        f"\n h = Sub (n, one)\n r = Range (zero, {taken}, one)\n m = Mul (r, row)"
        "\n u = Unsqueeze (m, at)\n i = Add (u, columns)\n j = Add (i, first)"
        "\n g = Gather <axis = 0> (f, j)\n y = Relu (g)",
        f"int64[1] flat = {{-1}}, int64 zero = {{0}}, int64 one = {{1}}, int64 row = {{{row}}},"
        f" int64[2] at = {{1, 2}}, int64[1,6,1] columns = {{{columns}}},"
        f" int64[1,1,1] first = {{{first}}}",
        "N,6,1",
        "M,6,1",
    )


def test_a_view_with_the_strides_of_the_value_is_the_value() -> None:
    done = run(parser.parse_model(strided()), RULE)
    left = {n.op_type for n in done.stored.proto.graph.node}
    assert not left & {"Reshape", "Range", "Gather"}
    assert_parity(strided(), done.stored.complete())


@pytest.mark.parametrize("given", [{"row": 3}, {"first": 1}, {"column": 0}, {"taken": "h"}])
def test_a_view_with_other_strides_stays(given: Any) -> None:
    model = strided(**given)
    assert not run(parser.parse_model(model), RULE).applied


@pytest.mark.parametrize(
    ("index", "shape", "moved"),
    [
        ([0, 1, 2, 3, 4, 5], [6], True),
        ([0, 1, 2, 3, 4, 5], [2, 3], True),
        ([0, 2, 4, 1, 3, 5], [2, 3], False),
        ([0, 1, 2, 3, 4], [5], False),
        ([1, 2, 3, 4, 5, 0], [6], False),
    ],
)
def test_constant_indices_that_count_up(index: list[int], shape: list[int], moved: bool) -> None:
    nodes = [
        helper.make_node("Gather", ["x", "i"], ["g"], axis=1),
        helper.make_node("Reshape", ["g", "t"], ["b"]),
        helper.make_node("Relu", ["b"], ["y"]),
    ]
    values = np.asarray(index).reshape(shape)
    weights = [numpy_helper.from_array(values, "i"),
               numpy_helper.from_array(np.asarray([0, values.size, 8]), "t")]  # fmt: skip
    of = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", k, 8])
          for n, k in (("x", 6), ("y", values.size))]  # fmt: skip
    model = helper.make_model(
        helper.make_graph(nodes, "g", of[:1], of[1:], weights),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    done = run(model, RULE)
    ops = [n.op_type for n in done.stored.proto.graph.node]
    assert (ops == ["Relu"]) == moved
    assert ("Gather" not in ops) == moved
    np.testing.assert_array_equal(elements(done.stored.complete()), elements(model))


def test_a_stated_shape_is_not_believed() -> None:
    # The file says 6 of what may be anything: a Reshape to six is then no identity.
    model = parser.parse_model(
        graph("a = Relu (x)\n b = Reshape (a, t)\n y = Relu (b)",
              "int64[3] t = {1, 6, 8}", x="N,L,8", y="1,6,8")
    )  # fmt: skip
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 6, 8]))
    assert not run(model, RULE).applied


@st.composite
def movements(draw: st.DrawFn) -> onnx.ModelProto:
    """Transposes and Reshapes in any order on a tensor whose first size is not known."""
    shape = [draw(st.sampled_from([1, 2, 4, 6])) for _ in range(draw(st.integers(1, 3)))]
    sizes: list[int] = [5, *shape]  # 5 in the place of the unknown: its name does not divide
    nodes, weights = [], []
    value = "x"
    for at in range(draw(st.integers(1, 5))):
        out = f"v{at}"
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(sizes))))
            nodes.append(helper.make_node("Transpose", [value], [out], perm=list(order)))
            sizes = [sizes[a] for a in order]
        else:
            start = sizes.index(5)
            rest = [n for n in sizes if n != 5]
            if start not in (0, len(sizes) - 1):
                continue
            total = int(np.prod(rest, dtype=int))
            first = draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
            inner = draw(st.sampled_from([[total], [first, total // first], [1, total], rest]))
            wanted = [-1, *inner] if start == 0 else [*inner, -1]
            weights.append(numpy_helper.from_array(np.asarray(wanted), f"s{at}"))
            nodes.append(helper.make_node("Reshape", [value, f"s{at}"], [out]))
            sizes = [5, *inner] if start == 0 else [*inner, 5]
        value = out
    nodes.append(helper.make_node("Relu", [value], ["y"]))
    names: list[Any] = ["n" if s == 5 else s for s in sizes]
    made = helper.make_graph(
        nodes,
        "moves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, names)],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def elements(model: onnx.ModelProto) -> Any:
    """What the reference makes of the numbers 0, 1, ... with three in the unknown size."""
    from onnx.reference import ReferenceEvaluator

    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = [d.dim_value or 3 for d in dims]
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    results: Any = ReferenceEvaluator(model).run(None, {"x": x})
    return results[0]


@settings(deadline=None, max_examples=60)
@given(movements())
def test_any_moves_give_the_same_elements(model: onnx.ModelProto) -> None:
    done = run(model, RULE)
    np.testing.assert_array_equal(elements(done.stored.complete()), elements(model))
    assert_sound(model, done, RULE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("leaves == _leaves(run)", "len(leaves) == len(_leaves(run))"),
        ("return [axes[axis] for axis in order]", "return list(axes)"),
        ("left.insert(0, rest)", "left.append(rest)"),
    ],
)
def test_a_wrong_rule_would_be_seen(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [parser.parse_model(graph(body, shapes, y="N,a,b")) for body, shapes in MIXED]

    def outcome(model: onnx.ModelProto) -> list[str]:
        try:
            return [n.op_type for n in run(model, RULE).stored.proto.graph.node]
        except VerificationError:
            return ["a shape that changed"]

    right = list(map(outcome, cases))
    broken = mutated(rearrange, old, new)["permutation"]
    monkeypatch.setattr("onnxnorm.passes.fold_layout.permutation", broken)
    assert list(map(outcome, cases)) != right


MIXED = [
    (
        IMAGE.replace("c = Reshape (b,", f"e = Transpose <perm = {perm}> (b)\n c = Reshape (e,"),
        SHAPES,
    )
    for perm in ([0, 1, 3, 2], [0, 2, 1, 3])
] + [
    (IMAGE, "int64[4] image = {0, 4, 4, 3}, int64[3] tokens = {0, 8, 6}"),
    (IMAGE, "int64[4] image = {0, 4, 3, 4}, int64[3] tokens = {0, 8, 6}"),
    (IMAGE.replace("d = Transpose <perm = [0, 2, 1]> (c)", "d = Reshape (c, tokens)"), SHAPES),
]
