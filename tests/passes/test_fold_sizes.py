"""Shapes that Reshape and Expand do not need the graph for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, parser
from onnx.reference import ReferenceEvaluator

from onnxnorm.errors import OnnxNormError
from onnxnorm.passes import fold_sizes
from onnxnorm.passes.fold_sizes import FoldSizes
from onnxnorm.testing import assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated

RULE = FoldSizes()
WEIGHTS = (
    "int64 zero = {0}, int64 one = {1}, int64[1] at = {0}, int64[1] two = {2}, int64[1] four = {4},"
    " int64[1] left = {-1}, int64[1] nothing = {0}"
)
SIZES = {
    "bu": "b = Gather (s, zero)\n bu = Unsqueeze (b, at)",
    "lu": "l = Gather (s, one)\n lu = Unsqueeze (l, at)",
}


def graph(body: str, x: str = "N,L,8", y: str = "N,L,2,4", weights: str = WEIGHTS) -> str:
    initializers = f"<{weights}>" if weights else ""
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[{x}] x) => (float[{y}] y)
    {initializers}
    {{
       {body}
    }}
    """


def computed(*entries: str) -> str:
    """The nodes that put a shape together of these entries."""
    made = [SIZES[e] for e in dict.fromkeys(entries) if e in SIZES]
    return "\n ".join(["s = Shape (x)", *made, f"t = Concat <axis = 0> ({', '.join(entries)})"])


def joined(*entries: str, use: str = "y = Reshape (x, t)", **sizes: str) -> onnx.ModelProto:
    """A graph that reads a shape put together of these entries."""
    return swept(graph(f"{computed(*entries)}\n {use}", **sizes))


def constant(entries: str, use: str = "y = Reshape (x, y_shape)", **sizes: str) -> onnx.ModelProto:
    """The graph that reads a constant in its place."""
    length = entries.count(",") + 1
    kept = f"{WEIGHTS}, int64[{length}] y_shape = {{{entries}}}"
    return swept(graph(use, **sizes, weights=kept))


def swept(text: str) -> onnx.ModelProto:
    """A model without the initializers that nobody reads."""
    model = parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    kept = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


@pytest.mark.parametrize(
    ("entries", "shape", "sizes"),
    [
        (("bu", "lu", "two", "four"), "0, 0, 2, 4", {}),
        (("bu", "lu", "two", "left"), "0, 0, 2, 4", {}),  # what is left over is known
        (("left", "lu", "two", "four"), "-1, 0, 2, 4", {"y": "N,L,2,4"}),
        (("lu", "two", "four"), "-1, 2, 4", {"x": "2,L,4", "y": "L,2,4"}),  # not in its place
    ],
)
def test_reshapes(entries: tuple[str, ...], shape: str, sizes: dict[str, str]) -> None:
    assert_rewrites(joined(*entries, **sizes), constant(shape, **sizes), RULE)


def test_an_expand() -> None:
    sizes = {"x": "N,L,1", "y": "2,N,L,4"}
    before = joined("two", "bu", "lu", "four", use="y = Expand (x, t)", **sizes)
    after = constant("2, 1, 1, 4", "y = Expand (x, y_shape)", **sizes)
    assert_rewrites(before, after, RULE)


@pytest.mark.parametrize(
    ("entries", "use", "sizes", "reason"),
    [
        (("lu", "bu", "two", "four"), "y = Reshape (x, t)", {"y": "L,N,2,4"},
         "sizes 0 ('L') and 1 ('N') of its shape are not known before the model runs, and a"),
        (("lu", "left", "four"), "y = Reshape (x, t)", {"y": "L,a,4"},
         "sizes 0 ('L') and 1 of its shape are not known"),
        (("bu", "two", "lu", "four"), "y = Reshape (x, t)", {"y": "N,2,L,4"},
         "size 2 ('L') of its shape is not known before the model runs, and a Reshape finds none"),
        (("bu", "nothing", "two", "four"), "y = Reshape <allowzero = 1> (x, t)", {"y": "N,a,2,4"},
         "a size is 0"),
        (("bu", "lu", "two", "four"), "y = Reshape <allowzero = 1> (x, t)", {},
         "sizes 0 ('N') and 1 ('L') of its shape are not known"),
        (("bu", "lu", "two", "two"), "y = Reshape (x, t)", {"y": "N,L,2,2"},
         "what it reads has another number of elements"),
        (("lu", "lu", "four"), "y = Expand (x, t)", {"x": "N,L,1", "y": "a,L,4"},
         "size 0 ('L') of its shape is not known before the model runs"),
        (("bu", "lu", "two", "four"), "r = ReduceMax <keepdims = 0> (x)\n y = Expand (r, t)", {},
         "size 0 ('N') of its shape is not known before the model runs"),
    ],
)  # fmt: skip
def test_refuses(entries: tuple[str, ...], use: str, sizes: dict[str, str], reason: str) -> None:
    assert_refuses(joined(*entries, use=use, **sizes), RULE, reason)


def test_a_filled_tensor_of_known_sizes() -> None:
    use = "z = ConstantOfShape <value = float[1] {1.5}> (t)\n y = Add (x, z)"
    sizes = {"x": "2,L,4", "y": "2,2,4"}
    before = joined("bu", "two", "four", use=use, **sizes)
    after = swept(
        graph(use.replace("(t)", "(z_shape)"), **sizes, weights="int64[3] z_shape = {2, 2, 4}")
    )
    assert_rewrites(before, after, RULE, parity=False)  # L is 1 or 2
    sizes["y"] = "2,L,4"
    assert not run(joined("bu", "lu", "four", use=use, **sizes), RULE).remarks, "L is not known"


def test_an_unknown_rank_is_no_place() -> None:
    made = "a = Reshape (x, w)\n y = Expand (a, t)"
    model = joined("bu", "lu", "four", use=made, y="a,b,c")
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.INT64, ["k"]))
    assert_refuses(model, RULE, "the rank of what is expanded is not known")


def test_a_stated_shape_is_not_believed() -> None:
    # The file says 6 of what may be anything; then [6, 8] is no shape for it.
    body = "a = Relu (x)\n s = Shape (a)\n l = Slice (s, two, four, at)\n y = Reshape (a, l)"
    weights = "int64[1] two = {1}, int64[1] four = {3}, int64[1] at = {0}"
    model = parser.parse_model(graph(body, "1,L,8", "L,8", weights))
    model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, 6, 8]))
    done = run(model, RULE)
    shapes = [onnx.numpy_helper.to_array(t).tolist() for t in done.stored.proto.graph.initializer]
    assert shapes == [[-1, 8]]


def test_an_output_of_a_rank_that_cannot_be_is_not_believed() -> None:
    before = joined("bu", "lu", "two", "left")
    before.graph.output[0].type.tensor_type.shape.dim.pop()
    done = run(before, RULE)
    (shape,) = (onnx.numpy_helper.to_array(t) for t in done.stored.proto.graph.initializer)
    assert shape.tolist() == [0, 0, 2, -1]


def test_a_body_keeps_its_shapes() -> None:
    inner = f"{computed('bu', 'lu', 'two', 'four')}\n r = Reshape (x, t)"
    text = graph(
        "c = ReduceSum <keepdims = 0> (x)\n k = Greater (c, c)"
        f"\n y = If (k) <then_branch = g () => (float[N,L,2,4] r) {{ {inner} }}, else_branch = h ()"
        f" => (float[N,L,2,4] r) {{ {inner} }}>"
    )
    assert not run(text, RULE).remarks


def made_of(entries: Sequence[int | str], op: str, x: Sequence[int | str]) -> onnx.ModelProto:
    """Reshape or Expand of x to entries that are numbers, or names of sizes of x."""
    nodes = [helper.make_node("Shape", ["x"], ["s"])]
    parts, weights = [], []
    for at, entry in enumerate(entries):
        parts.append(f"e{at}")
        number = x.index(entry) if isinstance(entry, str) else entry
        weights.append(helper.make_tensor(f"c{at}", TensorProto.INT64, [1], [number]))
        op_type = "Gather" if isinstance(entry, str) else "Identity"
        given = ["s", f"c{at}"] if isinstance(entry, str) else [f"c{at}"]
        nodes.append(helper.make_node(op_type, given, [parts[-1]]))
    nodes.append(helper.make_node("Concat", parts, ["t"], axis=0))
    nodes.append(helper.make_node(op, ["x", "t"], ["y"]))
    made = helper.make_graph(
        nodes,
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(entries))],
        weights,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outcome(model: onnx.ModelProto, n: int, m: int) -> Any:
    """What the reference makes of the numbers 0, 1, ... with these sizes; None where it fails."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    shape = [{"n": n, "m": m}.get(d.dim_param, d.dim_value) for d in dims]
    x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    try:
        results: Any = ReferenceEvaluator(model).run(None, {"x": x})
    except (IndexError, RuntimeError, ValueError):
        return None
    return results[0]


@st.composite
def shapes(draw: st.DrawFn) -> onnx.ModelProto:
    """Shapes in any order, of numbers, sizes of x and what is left over."""
    x: list[int | str] = ["n", "m", draw(st.sampled_from([1, 6]))]
    x = list(draw(st.permutations(x)))
    if draw(st.booleans()):
        leading = draw(st.lists(st.sampled_from([1, 2]), max_size=2))
        grown: list[int | str] = [1, 2, "n"]
        wanted = [draw(st.sampled_from(grown)) if d == 1 else d for d in x]
        return made_of([*leading, *wanted], "Expand", x)
    entries: list[int | str] = [e for e in x if isinstance(e, str)]
    rest = next(e for e in x if isinstance(e, int))
    parts: list[list[int]] = [[rest], [1, rest], [rest, 1], [2, 3] if rest == 6 else [1]]
    entries += draw(st.sampled_from(parts))
    entries = list(draw(st.permutations(entries)) if draw(st.booleans()) else entries)
    if draw(st.booleans()):
        entries[draw(st.integers(0, len(entries) - 1))] = -1
    return made_of(entries, "Reshape", x)


@settings(deadline=None, max_examples=80)
@given(shapes())
def test_any_shape_comes_out_as_it_was(model: onnx.ModelProto) -> None:
    done = run(model, RULE)
    assert_sound(model, done, RULE)
    assert agree(model, done.stored.complete())


def agree(before: onnx.ModelProto, after: onnx.ModelProto) -> bool:
    """Whether two models give the same wherever the first runs, empty tensors among them."""
    for n, m in ((2, 3), (3, 2), (1, 5), (0, 4), (3, 0)):
        expected = outcome(before, n, m)
        if expected is None:
            continue
        found = outcome(after, n, m)
        if found is None or found.shape != expected.shape or not np.array_equal(found, expected):
            return False
    return True


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("and before[at] == dim", "and True"),
        ("open_places[0][1] != -1 and (copied or 0 in shape)", "False"),
        ("dim if isinstance(dim, int) else 1", "1"),
        ("(at < 0 or before[at] != dim)", "at < 0"),
        ("len(before) - len(wanted)", "0"),
        ("and derived > 0", ""),
    ],
)
def test_a_wrong_rule_would_be_seen(old: str, new: str) -> None:
    rule = mutated(fold_sizes, old, new)["FoldSizes"]()
    cases = [
        made_of(["m", "n", 6], "Reshape", ["n", "m", 6]),
        made_of(["n", 6, "m"], "Reshape", ["n", "m", 6]),
        made_of([2, "n", "m", 6], "Expand", ["n", "m", 1]),
        made_of(["n", "m", "n"], "Expand", ["n", "m", 1]),
        made_of([6, -1], "Reshape", ["n", 6]),
        made_of(["n", 2, 4], "Expand", ["n", 1]),
        made_of(["n", -1, 5], "Reshape", ["n", 5, 0]),
    ]
    assert all(keeps(case, RULE) for case in cases)
    assert not all(keeps(case, rule) for case in cases)


def keeps(model: onnx.ModelProto, rule: FoldSizes) -> bool:
    """Whether a model gives after a pass what it gave before."""
    try:
        return agree(model, run(model, rule).stored.complete())
    except OnnxNormError:
        return False


def test_a_reason_names_no_size_that_the_file_does_not_name() -> None:
    """How many entries are not zero is a size for which the file has no name."""
    done = assert_refuses(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[N,4] x, float[a,b] z) => (float[c,d,e] y) <int64[1] left = {-1}>
        {
           found = NonZero (x)
           turned = Transpose <perm = [1, 0]> (found)
           many = Shape <start = 0, end = 1> (turned)
           first = Shape <start = 0, end = 1> (z)
           t = Concat <axis = 0> (many, first, left)
           y = Reshape (z, t)
        }
        """,
        RULE,
        "sizes 0, 1 ('a') and 2 of its shape are not known before the model runs",
    )
    (remark,) = done.remarks
    assert remark.advice == "Where 'a' or 'b' never varies, give the model's inputs the number."
