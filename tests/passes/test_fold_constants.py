"""What is computed of constants is computed once. Dyadic constants make goldens exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxnorm import constants, rows, storage
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.passes.fold_constants import FoldConstants
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated
from tests.texts import graph

RULE = FoldConstants()
W = "float[2,2] w = {1.0, 2.0, 3.0, 4.0}"


def folded(model: str | onnx.ModelProto, *passes: Any) -> dict[str, Any]:
    done = run(model, *(passes or (RULE,)))
    graph = done.stored.complete().graph
    return {t.name: numpy_helper.to_array(t) for t in graph.initializer}


# ** goldens **


def test_arithmetic_on_a_weight() -> None:
    before = graph(
        "a = Mul (w, two)\n b = Transpose <perm = [1, 0]> (a)\n y = MatMul (x, b)",
        f"{W}, float two = {{2.0}}",
    )
    after = graph("y = MatMul (x, b_value)", "float[2,2] b_value = {2.0, 6.0, 4.0, 8.0}")
    done = assert_rewrites(before, after, RULE)
    assert [(r.site, r.action, r.into) for r in done.applied] == [
        ("fold-constants:b", "folded", "constant")
    ]


def test_a_shape_whose_entries_the_graph_knows() -> None:
    before = graph(
        "s = Shape (x)\n c = Gather (s, one)\n u = Unsqueeze (c, zero)"
        "\n t = Concat <axis = 0> (minus, u)\n y = Reshape (x, t)",
        "int64 one = {1}, int64[1] zero = {0}, int64[1] minus = {-1}",
    )
    after = graph("y = Reshape (x, t_value)", "int64[2] t_value = {-1, 2}")
    assert_rewrites(before, after, RULE)


PADS = (
    "z = ConstantOfShape <value = int64[1] {0}> (four)\n c = Concat <axis = 0> (before, z)"
    "\n r = Reshape (c, pairs)"
    "\n t = Transpose <perm = [1, 0]> (r)\n p = Reshape (t, flat)\n y = Pad (x, p)"
)
PAD_CONSTANTS = "int64[1] flat = {-1}, int64[2] pairs = {-1, 2}"


def test_pads_that_are_moved_into_place() -> None:
    """torch.onnx.export writes pads, last axis first, as a Concat that is turned."""
    constants_of_pads = f"{PAD_CONSTANTS}, int64[1] four = {{2}}, int64[2] before = {{1, 0}}"
    after = graph("y = Pad (x, p_value)", "int64[4] p_value = {1, 0, 0, 0}")
    done = assert_rewrites(graph(PADS, constants_of_pads), after, RULE)
    assert [r.site for r in done.applied] == ["fold-constants:p"]


@pytest.mark.parametrize(
    "model",
    [
        graph("b = Transpose <perm = [1, 0]> (w)\n y = MatMul (x, b)", W),
        graph("i = Identity (flat)\n y = Reshape (x, i)", "int64[2] flat = {-1, 2}"),
        graph("i = Constant <value = int64[2] {-1, 2}> ()\n y = Reshape (x, i)"),
    ],
    ids=["weight", "copy", "constant"],
)
def test_what_stores_the_same_again_stays(model: str) -> None:
    assert not run(model, RULE).applied


def test_a_cast_to_the_type_of_another_value_does_not_read_it() -> None:
    before = graph("c = CastLike (d, x)\n y = Mul (x, c)", "double d = {0.5}")
    done = assert_rewrites(before, graph("y = Mul (x, c_value)", "float c_value = {0.5}"), RULE)
    assert [r.site for r in done.applied] == ["fold-constants:c"]
    assert not run(
        before.replace("float[N,2] x", "float[N,2] x, double like").replace(
            "c = CastLike (d, x)", "e = Cast <to = 1> (like)\n c = CastLike (e, x)"
        ),
        RULE,
    ).applied


def test_a_size_that_differs_from_run_to_run_stays() -> None:
    before = graph(
        "s = Shape (x)\n c = Gather (s, zero)\n u = Unsqueeze (c, z)"
        "\n t = Concat <axis = 0> (u, minus)\n y = Reshape (x, t)",
        "int64 zero = {0}, int64[1] z = {0}, int64[1] minus = {-1}",
    )
    assert not run(before, RULE).applied


def test_what_a_file_states_of_inner_values_is_not_believed() -> None:
    # The input was made dynamic after the export, the value behind it still says 3.
    before = parser.parse_model(
        graph("a = Relu (x)\n s = Shape (a)\n y = ConstantOfShape (s)", "float[1] unused = {0.0}")
    )
    info = helper.make_tensor_value_info("a", TensorProto.FLOAT, [3, 2])
    before.graph.value_info.append(info)
    assert not run(before, RULE).applied


def test_a_constant_that_others_read_stays() -> None:
    before = graph("a = Neg (w)\n p = MatMul (x, a)\n q = MatMul (x, w)\n y = Sub (q, p)", W)
    after = graph(
        "p = MatMul (x, a_value)\n q = MatMul (x, w)\n y = Sub (q, p)",
        f"float[2,2] a_value = {{-1.0, -2.0, -3.0, -4.0}}, {W}",
    )
    assert_rewrites(before, after, RULE)


def test_two_results_of_one_subgraph() -> None:
    before = graph(
        "m = Neg (w)\n a = Abs (m)\n b = Relu (m)\n p = MatMul (x, a)\n q = MatMul (x, b)"
        "\n y = Sub (q, p)",
        W,
    )
    after = graph(
        "p = MatMul (x, a_value)\n q = MatMul (x, b_value)\n y = Sub (q, p)",
        "float[2,2] a_value = {1.0, 2.0, 3.0, 4.0}, float[2,2] b_value = {0.0, 0.0, 0.0, 0.0}",
    )
    assert_rewrites(before, after, RULE)


def test_a_result_made_of_another_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """(w / 11) * 11, where the graph reads w / 11 too: of that rounded another number comes."""
    ran: list[str] = []
    outcome = constants._outcome

    def counted(node: Any, given: Any) -> Any:
        ran.append(node.op)
        return outcome(node, given)

    monkeypatch.setattr(constants, "_outcome", counted)
    values = folded(
        graph(
            "q = Div (w, t) r = Mul (q, t) a = Mul (x, q) y = Mul (a, r)",
            "float16[1,2] w = {15360, 16384}, float16 t = {18816}",  # the bits of 1, 2 and 11
        ).replace("float[", "float16[")
    )
    part = np.array([[1, 2]], np.float16) / np.float16(11)
    assert (part * np.float16(11)).tolist() != [[1, 2]], "else nothing could be seen"
    assert sorted(v.tolist() for v in values.values()) == [part.tolist(), [[1.0, 2.0]]]
    assert sorted(ran) == ["Div", "Div", "Mul"], "each result is computed once"


def test_in_a_body_and_in_a_function() -> None:
    model = """
    <ir_version: 8, opset_import: ["" : 17, "f" : 1]>
    main (float[N,2] x, bool c) => (float[N,2] y)
    <float[2,2] w = {1.0, 2.0, 3.0, 4.0}>
    {
       k = If (c) <
         then_branch = yes () => (float[N,2] p) { n = Neg (w)\n p = MatMul (x, n) },
         else_branch = no () => (float[N,2] q) { q = Identity (x) }
       >
       y = f.twice (k)
    }
    <domain: "f", opset_import: ["" : 17]>
    twice (a) => (b) {
       one = Constant <value = float {1.0}> ()
       two = Add (one, one)
       b = Mul (a, two)
    }
    """
    done = run(model, RULE)
    assert {r.site for r in done.applied} == {
        "fold-constants:k/then_branch/n",
        "fold-constants:f.twice/two",
    }
    assert_parity(parser.parse_model(model), done.stored.complete())


# ** the systems **


def standardized(opset: int = 17, dtype: int = TensorProto.FLOAT, eps: float = 1e-5) -> Any:
    """Conv with (W - mean) / (std + eps) for its weight, then a batch norm."""
    rng = np.random.default_rng(0)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    given = {
        "w": rng.standard_normal((4, 3, 3, 3)).astype(kind),
        "eps": np.asarray(eps, kind),
        **{n: rng.uniform(0.5, 1.5, 4).astype(kind) for n in ("g", "b", "m", "v")},
    }
    nodes = [
        helper.make_node("ReduceMean", ["w"], ["mean"], axes=[1, 2, 3]),
        helper.make_node("Sub", ["w", "mean"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["dd"]),
        helper.make_node("ReduceMean", ["dd"], ["var"], axes=[1, 2, 3]),
        helper.make_node("Sqrt", ["var"], ["std"]),
        helper.make_node("Add", ["std", "eps"], ["den"]),
        helper.make_node("Div", ["d", "den"], ["ready"]),
        helper.make_node("Conv", ["x", "ready"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "ws",
        [helper.make_tensor_value_info("x", dtype, ["n", 3, 6, 6])],
        [helper.make_tensor_value_info("y", dtype, ["n", 4, 4, 4])],
        [numpy_helper.from_array(v, k) for k, v in given.items()],
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8), given


def test_a_standardized_weight_is_the_nearest_that_its_type_has() -> None:
    model, given = standardized()
    w = given["w"].astype(np.float64)
    d = w - w.mean((1, 2, 3), keepdims=True)
    den = np.sqrt((d * d).mean((1, 2, 3), keepdims=True)) + np.float64(np.float32(1e-5))
    np.testing.assert_array_equal(folded(model)["ready_value"], (d / den).astype(np.float32))


def test_its_row_says_folded_and_the_batch_norm_follows() -> None:
    model, _ = standardized()
    done = run(model, RULE, FoldBatchnorm())
    found = {r["kind"]: r["action"] for r in rows.norm_rows(done.norms, done.remarks)}
    assert found == {"weight_standardization": "folded", "batch_norm": "folded"}
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Conv"]
    assert_sound(model, done, RULE, FoldBatchnorm())
    assert_parity(model, done.stored.complete())


def scaled(w: str) -> str:
    """NF-Net: gain (W - mean) / sqrt(max(var n, eps)), with a gain for each filter."""
    return (
        f"m = ReduceMean <axes = [1]> ({w})\n d = Sub ({w}, m)\n dd = Mul (d, d)"
        "\n s = ReduceMean <axes = [1]> (dd)\n vn = Mul (s, n)\n mx = Max (vn, eps)"
        "\n rt = Sqrt (mx)\n nd = Div (d, rt)\n gw = Mul (nd, gain)"
        "\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    )


SYSTEMS = {
    "scaled_weight_standardization": scaled("w"),
    "weight_norm": (
        "l = ReduceL2 <axes = [1]> (w)\n u = Div (w, l)\n gw = Mul (gain, u)"
        "\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    ),
    "row_normalized": (  # GradNormLoRP: a magnitude for each row, a clamp for the direction
        "l = ReduceL2 <axes = [1]> (w)\n c = Clip (l, eps)\n e = Expand (c, full)"
        "\n u = Div (w, e)\n gw = Mul (gain, u)"
        "\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    ),
    "sigma_reparam": (
        "wu = MatMul (w, v)\n l = ReduceL2 <axes = [0]> (wu)\n cl = Clip (l, eps)"
        "\n a = Div (wu, cl)"
        '\n sigma = Einsum <equation = "d,dc,c->"> (a, w, v)\n i = Div (n, sigma)'
        "\n gw = Mul (i, w)\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    ),
    "weight_compander": (
        "q = Div (w, gain)\n t = Atan (q)\n gw = Mul (gain, t)"
        "\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    ),
    "standardized_by_a_batch_norm": (  # timm's: batch statistics of the weight
        "r = Reshape (w, once)\n z, rm, rv = BatchNormalization <training_mode = 1,"
        " epsilon = 0.001> (r, one3, zero3, zero3, one3)"
        "\n gw = Reshape (z, back)\n k = Transpose <perm = [1, 0]> (gw)\n y = MatMul (x, k)"
    ),
}
CONSTANTS = (
    "float[3,2] w = {1.0, -2.0, 3.0, 4.5, -0.25, 0.125}, float[3,1] gain = {2.0, -0.5, 1.5},"
    " float[2] v = {0.6, 0.8}, float n = {2.0}, float eps = {0.0001}, int64[2] full = {3, 2},"
    " int64[3] once = {1, 3, 2}, int64[2] back = {3, 2}, float[3] one3 = {1.0, 1.0, 1.0},"
    " float[3] zero3 = {0.0, 0.0, 0.0}"
)


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_parametrizations_of_the_papers(name: str) -> None:
    model = graph(SYSTEMS[name], CONSTANTS, y="N,3")
    done = run(model, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["MatMul"]
    assert done.stored.proto.graph.node[0].input[1] == "k_value"
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("narrow: Array = wide.astype(dtype)", "narrow: Array = wide.astype(np.float16)"),
        ("if array.dtype.kind != \"f\":\n            return array.astype(dtype, copy=False)",
         "if array.dtype.kind != \"f\":\n            return array.astype(dtype, copy=False) + 1"),
        ("return self._static[value]\n        if value in self._kept",
         "return self._static[value] + 1\n        if value in self._kept"),
        ("widened: Values = float64.widen(constant.array())",
         "widened: Values = float64.widen(constant.array()).round(1)"),
    ],
)  # fmt: skip
def test_a_wrong_value_would_be_seen(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mutated(constants, old, new)["Constants"]
    model, _ = standardized(eps=0.125)
    shaped = graph(
        "s = Shape (x)\n c = Slice (s, one, two)\n d = Add (c, c)\n f = Cast <to = 1> (d)"
        "\n y = Mul (x, f)",
        "int64[1] one = {1}, int64[1] two = {2}",
    )
    integers = graph(
        "k = Mul (one, two)\n t = Concat <axis = 0> (minus, k)\n y = Reshape (x, t)",
        "int64[1] one = {1}, int64[1] two = {2}, int64[1] minus = {-1}",
    )
    known = shaped.replace("f = Cast <to = 1> (d)\n y = Mul (x, f)", "y = Expand (x, d)")
    seen = []
    for each in (model, *map(parser.parse_model, (shaped, integers, known))):
        right = folded(each)
        with monkeypatch.context() as patch:
            patch.setattr(constants, "find_constants", broken)
            patch.setattr("onnxnorm.passes.fold_constants.find_constants", broken)
            wrong = folded(each)
        seen.append(
            any(not np.array_equal(right[k], wrong.get(k)) for k in right)  # type: ignore[arg-type]
        )
    assert any(seen)


# ** refusals **

BRANCHES = (
    "r = If (yes) <then_branch = a () => (float[2,2] p) { p = Neg (w) },"
    " else_branch = b () => (float[2,2] q) { q = Abs (w) }>\n y = MatMul (x, r)"
)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("r = RandomNormalLike (w)\n y = MatMul (x, r)", "draws other numbers in every run"),
        ("r = Bernoulli (w)\n y = MatMul (x, r)", "draws other numbers in every run"),
        (
            "r = Dropout (w, half, yes)\n y = MatMul (x, r)",
            "Dropout in training mode draws other numbers in every run",
        ),
        (BRANCHES, "If runs graphs of its own"),
        ("r = other.Double (w)\n y = MatMul (x, r)", "Double is an operator of the domain other"),
        ("r = DequantizeLinear (q, half)\n y = MatMul (x, r)", "the form that a quantizer wrote"),
        ("r = Neg (w)\n y = Identity (r)", "is a graph output"),
        ("r = Exp (large)\n y = MatMul (x, r)", "beyond the range of float32"),
        ("r = Inverse (w)\n y = MatMul (x, r)", "Inverse is not computed here"),
        (
            "a = Exp (w)\n b = Log (a)\n c = Floor (b)\n y = MatMul (x, c)",
            "decides on a float, and rounding changes the outcome",
        ),
        (
            "a = Sqrt (two)\n b = Mul (a, a)\n c = Less (b, two)\n y = Where (c, x, half)",
            "decides on a float, and rounding changes the outcome",
        ),
    ],
)
def test_what_stays(body: str, reason: str) -> None:
    weights = (
        f"{W}, float half = {{0.5}}, bool yes = {{1}}, int8[2,2] q = {{1, 2, 3, 4}},"
        " float two = {2.0}, float[2,2] large = {1.0, 2.0, 3.0, 400.0}"
    )
    y = "2,2" if "Identity" in body else "N,2"
    text = graph(body, weights, y=y).replace('"" : 17', '"" : 17, "other" : 1')
    assert_refuses(text, RULE, reason)


def test_a_decision_that_no_rounding_changes_is_made() -> None:
    before = graph(
        "h = Mul (two, half)\n f = Floor (h)\n i = Cast <to = 7> (f)\n t = Concat <axis = 0>"
        " (minus, i)\n y = Reshape (x, t)",
        "float[1] two = {4.0}, float half = {0.5}, int64[1] minus = {-1}",
    )
    after = graph("y = Reshape (x, t_value)", "int64[2] t_value = {-1, 2}")
    assert_rewrites(before, after, RULE)


def test_an_overridable_initializer_is_no_constant() -> None:
    model = parser.parse_model(graph("a = Neg (w)\n y = MatMul (x, a)", W))
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2]))
    assert not run(model, RULE).applied


TABLE = graph(
    "n = Neg (one)\n e = Expand (n, shape)\n s = Sub (e, one)\n y = Add (x, s)",
    "float[1] one = {1.0}, int64[2] shape = {300, 300}",
    x="300,300",
    y="300,300",
)


def test_a_file_does_not_grow_beyond_the_stated_factor() -> None:
    done = assert_refuses(TABLE, RULE, "the file would grow by 0.4 MB")
    assert "max_growth" in done.remarks[0].advice
    allowed = run(TABLE, FoldConstants(max_growth=3000.0))
    assert len(allowed.applied) == 1


def test_the_budget_is_one_for_all_sites() -> None:
    # Each takes 40 kB of the 64 kB that are free: one fits, the second does not.
    body = "".join(
        f"n{i} = Neg (one)\n e{i} = Expand (n{i}, shape)\n s{i} = Sub (e{i}, k{i})\n"
        for i in (1, 2)
    )
    text = graph(
        body + "a = Add (x, s1)\n y = Mul (a, s2)",
        "float[1] one = {1.0}, int64[2] shape = {100, 100}, float[1] k1 = {1.0},"
        " float[1] k2 = {3.0}",
        x="100,100",
        y="100,100",
    )
    done = run(text, RULE)
    assert len(done.applied) == 1
    assert ["grow" in r.reason for r in done.remarks if r.outcome == "refused"] == [True]


def test_a_large_result_is_refused_by_size() -> None:
    rule = FoldConstants(max_mb=0)
    assert_refuses(graph("a = Neg (w)\n y = MatMul (x, a)", W), rule, "it takes 0 MB")


def test_nothing_is_made_that_memory_cannot_hold() -> None:
    text = graph(
        "e = Expand (one, shape)\n m = ReduceMean <keepdims = 0> (e)\n y = Add (x, m)",
        "float[1] one = {1.0}, int64[3] shape = {4096, 4096, 64}",
    )
    assert_refuses(text, RULE, "makes 8192 MB of it")


# ** properties **

UNARY = ("Abs", "Atan", "Neg", "Relu", "Sigmoid", "Tanh")
BINARY = ("Add", "Mul", "Sub", "Max")


@st.composite
def chains(draw: st.DrawFn) -> onnx.ModelProto:
    """A product x W' with W' arithmetic on weights in any order, some of them shared."""
    dtype = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16]))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    size, rng = draw(st.integers(1, 5)), np.random.default_rng(draw(st.integers(0, 99)))
    shapes = [(size, size), (size, 1), (1,), ()]
    given = {f"w{i}": rng.uniform(-2, 2, s).astype(kind) for i, s in enumerate(shapes)}
    values = list(given)
    nodes = []
    for i in range(draw(st.integers(1, 6))):
        one = draw(st.sampled_from(values))
        if draw(st.booleans()):
            nodes.append(helper.make_node(draw(st.sampled_from(UNARY)), [one], [f"v{i}"]))
        else:
            pair = [one, draw(st.sampled_from(values))]
            nodes.append(helper.make_node(draw(st.sampled_from(BINARY)), pair, [f"v{i}"]))
        values.append(f"v{i}")
    nodes.append(helper.make_node("Sum", values, ["full"]))  # nothing is left unread
    nodes.append(helper.make_node("Mul", ["x", "full"], ["y"]))
    made = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", dtype, ["n", size, size])],
        [helper.make_tensor_value_info("y", dtype, ["n", size, size])],
        [numpy_helper.from_array(v, k) for k, v in given.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(deadline=None, max_examples=25)
@given(chains())
def test_any_arithmetic_is_within_half_a_unit_of_what_it_means(model: onnx.ModelProto) -> None:
    done = run(model, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Mul"], done.remarks
    assert_sound(model, done, RULE)
    found = {t.name: numpy_helper.to_array(t) for t in done.stored.proto.graph.initializer}
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    del wide.graph.initializer[:]
    wide.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in weights.items())
    del wide.graph.input[:], wide.graph.output[:]
    del wide.graph.node[-1:]
    wide.graph.output.append(helper.make_tensor_value_info("full", TensorProto.DOUBLE, None))
    results: Any = ReferenceEvaluator(wide).run(None, {})
    meant = np.asarray(results[0])
    # two roads through float64 differ by a few of its units: a tie may round either way
    error = np.abs(found["full_value"].astype(np.float64) - meant)
    unit = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11}
    half = unit.get(found["full_value"].dtype, 2.0**-8)
    smallest = {np.dtype(np.float16): 2.0**-25}.get(found["full_value"].dtype, 2.0**-126)
    assert (error <= half * np.abs(meant) * (1 + 2.0**-20) + smallest).all()


def test_the_narrowest_types_round_once() -> None:
    for dtype, kind in (
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    ):
        model, given = standardized(dtype=dtype, eps=0.5)
        w = given["w"].astype(np.float64)
        d = w - w.mean((1, 2, 3), keepdims=True)
        den = np.sqrt((d * d).mean((1, 2, 3), keepdims=True)) + 0.5
        np.testing.assert_array_equal(folded(model)["ready_value"], (d / den).astype(kind))


def test_the_options_are_those_that_are_told() -> None:
    assert [f.name for f in dataclasses.fields(RULE)] == ["max_growth", "max_mb"]


def test_an_untouched_model_is_given_back() -> None:
    stored = storage.from_proto(parser.parse_model(graph("y = MatMul (x, w)", W)))
    from onnxnorm.pipeline import Pipeline

    assert Pipeline([RULE]).run(stored).stored is stored


def test_what_is_checked_by_itself_begins_where_the_sizes_are_taken() -> None:
    """Given a size as an input of its own, a part of the model would be run with any other."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        main (float[N,8] x) => (float[N,M] y, int64[1] width)
        <int64 one = {1}, int64[1] zero = {0}, int64[1] two = {2}, int64[1] axis = {1}>
        {
            s = Shape (x)
            d = Gather (s, one)
            width = Unsqueeze (d, zero)
            half = Div (width, two)
            y = Slice (x, zero, half, axis)
        }
        """
    )
    done = run(model, FoldConstants())
    (remark,) = done.applied
    assert remark.region is not None
    assert remark.region.inputs == ("x",)
    assert set(remark.region.outputs) == {"y"}
