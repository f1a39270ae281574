"""Fold affine maps into what feeds them. Dyadic constants make goldens exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnxnorm import affine, flow_back, norm_operators, rows
from onnxnorm import change as change_module
from onnxnorm import port as port_module
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import computes_the_same, mutated
from tests.networks import Net
from tests.texts import graph

RULE = FoldAffine()
BN = (
    "float[2] g = {2.0, 3.0}, float[2] h = {0.5, 1.0}, float[2] m = {1.0, -1.0},"
    " float[2] v = {4.0, 9.0}"
)
AFFINE = "float[2] s = {2.0, 4.0}, float[2] t = {0.5, -1.0}"
NORM = "BatchNormalization <epsilon: float = 0.0>"


W = "float[2,2] w = {1.0, 2.0, 3.0, 4.0}"
SCALED = "float[2,2] y_weight = {2.0, 8.0, 6.0, 16.0}"
ROWS = "float[2,2] y_weight = {2.0, 4.0, 12.0, 16.0}"


# ** goldens **


@pytest.mark.parametrize(
    ("attributes", "weight"),
    [("", SCALED), ("<transB: int = 1>", ROWS), ("<alpha: float = 0.5>", SCALED)],
)
def test_gemm(attributes: str, weight: str) -> None:
    before = graph(
        f"c = Gemm {attributes} (x, w, b)\n k = Mul (c, s)\n y = Add (k, t)",
        f"{W}, float[2] b = {{1.0, 2.0}}, {AFFINE}",
    )
    after = graph(
        f"y = Gemm {attributes} (x, y_weight, y_bias)",
        f"float[2] y_bias = {{2.5, 7.0}}, {weight}",
    )
    assert_rewrites(before, after, RULE)


def test_the_bias_of_a_gemm_is_multiplied_by_beta() -> None:
    before = graph(
        "c = Gemm <beta: float = 0.5> (x, w, b)\n k = Mul (c, s)\n y = Add (k, t)",
        f"{W}, float[2] b = {{1.0, 2.0}}, {AFFINE}",
    )
    after = graph(
        "y = Gemm <beta: float = 0.5> (x, y_weight, y_bias)",
        f"float[2] y_bias = {{3.0, 6.0}}, {SCALED}",
    )
    assert_rewrites(before, after, RULE)


def test_a_gemm_with_its_weight_on_the_left() -> None:
    # Its features are rows, and the map is one for each row.
    before = graph(
        "c = Gemm <transA: int = 1> (w, x)\n k = Mul (c, s)\n y = Add (k, t)",
        f"{W}, float[2,1] s = {{2.0, 4.0}}, float[2,1] t = {{0.5, -1.0}}",
        x="2,3",
        y="2,3",
    )
    after = graph(
        "y = Gemm <transA: int = 1> (y_weight, x, y_bias)",
        f"float[2,1] y_bias = {{0.5, -1.0}}, {SCALED}",
        x="2,3",
        y="2,3",
    )
    assert_rewrites(before, after, RULE)


def test_a_gemm_without_a_bias_gets_one() -> None:
    before = graph(f"c = Gemm <transB: int = 1> (x, w)\n y = {NORM} (c, g, h, m, v)", f"{W}, {BN}")
    after = graph(
        "y = Gemm <transB: int = 1> (x, y_weight, y_bias)",
        "float[2] y_bias = {-0.5, 2.0}, float[2,2] y_weight = {1.0, 2.0, 3.0, 4.0}",
    )
    done = assert_rewrites(
        before,
        after.replace(", float[2,2] y_weight", ", float[2,2] w").replace("y_weight", "w"),
        RULE,
    )
    assert [(r.site, r.action, r.into) for r in done.applied] == [
        ("fold-affine:y", "folded", "Gemm")
    ]


def test_the_bias_of_a_matmul_takes_the_shift() -> None:
    before = graph(
        f"c = MatMul (x, w)\n d = Add (b, c)\n y = {NORM} (d, g, h, m, v)",
        f"{W}, float[2] b = {{3.0, 2.0}}, {BN.replace('g = {2.0, 3.0}', 'g = {4.0, 12.0}')}",
    )
    # s = (2, 4), t = h - s m = (-1.5, 5)
    after = graph(
        "c = MatMul (x, y_weight)\n y = Add (y_bias, c)",
        f"float[2] y_bias = {{4.5, 13.0}}, {SCALED}",
    )
    assert_rewrites(before, after, RULE)


@pytest.mark.parametrize(
    ("body", "old", "new", "weight"),
    [
        ("Sub (c, b)", "{-0.5, -1.0}", "{-0.5, 9.0}", SCALED),
        (
            "Sub (b, c)",
            "{1.0, 1.0}",
            "{0.5, 9.0}",
            "float[2,2] y_weight_1 = {-2.0, -8.0, -6.0, -16.0}",
        ),
    ],
)
def test_a_bias_that_is_subtracted(body: str, old: str, new: str, weight: str) -> None:
    # s = (2, 4), t = (-1.5, 5). What is subtracted goes into the norm first, and the norm back.
    before = graph(
        f"c = MatMul (x, w)\n b = Identity (a)\n d = {body}\n y = {NORM} (d, g, h, m, v)",
        f"{W}, float[2] a = {old}, {BN.replace('g = {2.0, 3.0}', 'g = {4.0, 12.0}')}",
    )
    after = graph(
        f"c = MatMul (x, {weight.split()[1]})\n y = Add (c, y_bias_1)",
        f"float[2] y_bias_1 = {new}, {weight}",
    )
    assert_rewrites(before, after, RULE)


def test_a_matmul_without_a_bias_keeps_one_add() -> None:
    before = graph("c = MatMul (x, w)\n k = Mul (c, s)\n y = Add (k, t)", f"{W}, {AFFINE}")
    after = graph(
        "c = MatMul (x, y_weight)\n y = Add (c, y_bias)",
        f"float[2] y_bias = {{0.5, -1.0}}, {SCALED}",
    )
    assert_rewrites(before, after, RULE)


def test_the_add_that_is_kept_stands_behind_the_matmul() -> None:
    before = graph(
        f"c = MatMul (x, w)\n f = Flatten <axis: int = 2> (c)\n y = {NORM} (f, g, h, m, v)",
        f"{W}, {BN.replace('g = {2.0, 3.0}', 'g = {4.0, 12.0}')}",
        x="N,3,2",
        y="M,2",
    )
    after = graph(
        "c = MatMul (x, y_weight)\n [c_shifted] c_shifted = Add (c, y_bias)\n"
        "y = Flatten <axis: int = 2> (c_shifted)",
        f"float[2] y_bias = {{-1.5, 5.0}}, {SCALED}",
        x="N,3,2",
        y="M,2",
    )
    done = assert_rewrites(before, after, RULE)
    assert done.nodes == (3, 3)


def test_a_scale_alone_leaves_no_add() -> None:
    before = graph(
        "c = MatMul (x, w)\n p = Transpose <perm: ints = [0, 2, 1]> (c)\n y = Mul (s, p)",
        f"{W}, float[2,1] s = {{2.0, 4.0}}",
        x="N,3,2",
        y="N,2,3",
    )
    after = graph(
        "c = MatMul (x, y_weight)\n y = Transpose <perm: ints = [0, 2, 1]> (c)",
        SCALED,
        x="N,3,2",
        y="N,2,3",
    )
    assert_rewrites(before, after, RULE)


def test_channels_that_are_split_by_a_reshape() -> None:
    before = graph(
        "c = MatMul (x, w)\n r = Reshape (c, to)\n y = Mul (r, s)",
        f"{W}, int64[4] to = {{0, 3, 1, 2}}, float[2] s = {{2.0, 4.0}}",
        x="N,3,2",
        y="N,3,1,2",
    )
    after = graph(
        "c = MatMul (x, y_weight)\n y = Reshape (c, to)",
        f"int64[4] to = {{0, 3, 1, 2}}, {SCALED}",
        x="N,3,2",
        y="N,3,1,2",
    )
    assert_rewrites(before, after, RULE)


def test_a_map_on_a_part_of_the_features_is_repeated() -> None:
    # Four features are two heads of two: each head has the scale.
    before = graph(
        "c = MatMul (x, w)\n r = Reshape (c, to)\n y = Mul (r, s)",
        "float[1,4] w = {1.0, 2.0, 3.0, 4.0}, int64[3] to = {0, 2, 2}, float[2] s = {2.0, 4.0}",
        x="N,1",
        y="N,2,2",
    )
    after = graph(
        "c = MatMul (x, y_weight)\n y = Reshape (c, to)",
        "int64[3] to = {0, 2, 2}, float[1,4] y_weight = {2.0, 8.0, 6.0, 16.0}",
        x="N,1",
        y="N,2,2",
    )
    assert_rewrites(before, after, RULE)


def test_a_grouped_transposed_convolution() -> None:
    before = graph(
        "c = ConvTranspose <group: int = 2> (x, w)\n k = Mul (c, s)\n y = Sub (k, t)",
        "float[2,2,1] w = {1.0, 2.0, 3.0, 4.0}, float[4,1] s = {1.0, 2.0, 4.0, 8.0},"
        " float[4,1] t = {1.0, 2.0, 3.0, 4.0}",
        x="N,2,3",
        y="N,4,3",
    )
    after = graph(
        "y = ConvTranspose <group: int = 2> (x, y_weight, y_bias)",
        "float[4] y_bias = {-1.0, -2.0, -3.0, -4.0},"
        " float[2,2,1] y_weight = {1.0, 4.0, 12.0, 32.0}",
        x="N,2,3",
        y="N,4,3",
    )
    assert_rewrites(before, after, RULE)


def test_a_padded_convolution_through_identity_takes_scale_and_shift() -> None:
    before = graph(
        "c = Conv <pads: ints = [1, 1]> (x, w, b)\n i = Identity (c)\n k = Mul (i, s)\n"
        "y = Add (k, t)",
        "float[2,1,3] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[2] b = {1.0, 2.0},"
        " float[2,1] s = {2.0, 4.0}, float[2,1] t = {0.5, -1.0}",
        x="N,1,4",
        y="N,2,4",
    )
    after = graph(
        "c = Conv <pads: ints = [1, 1]> (x, y_weight, y_bias)\n y = Identity (c)",
        "float[2] y_bias = {2.5, 7.0}, float[2,1,3] y_weight = {2.0, 4.0, 6.0, 16.0, 20.0, 24.0}",
        x="N,1,4",
        y="N,2,4",
    )
    assert_rewrites(before, after, RULE)


def test_a_shared_weight_is_copied_and_shapes_may_be_read() -> None:
    before = graph(
        "c = MatMul (x, w)\n z = Shape (c)\n p = Identity (c)\n q = Mul (p, s)\n"
        "o = MatMul (x, w)\n e = Expand (o, z)\n y = Sub (q, e)",
        f"{W}, float[2] s = {{2.0, 4.0}}",
    )
    after = graph(
        "c = MatMul (x, q_weight)\n z = Shape (c)\n q = Identity (c)\n"
        "o = MatMul (x, w)\n e = Expand (o, z)\n y = Sub (q, e)",
        f"{SCALED.replace('y_', 'q_')}, {W}",
    )
    assert_rewrites(before, after, RULE)


def test_what_fold_batchnorm_is_for_is_left_to_it() -> None:
    before = graph(
        f"c = Conv (x, w)\n z = Relu (c)\n y = {NORM} (c, g, h, m, v)",
        f"float[2,1,1] w = {{1.0, 2.0}}, {BN}",
        x="N,1,3",
        y="N,2,3",
    )
    assert not run(before, RULE).remarks
    assert_refuses(before, FoldBatchnorm(), "'c' is also read by node 'z' (Relu)")


def test_two_maps_in_a_row_fold_one_after_the_other() -> None:
    before = graph(
        f"c = Gemm (x, w)\n n = {NORM} (c, g, h, m, v)\n k = Mul (n, s)\n y = Add (k, t)",
        f"{W}, {BN}, {AFFINE}",
    )
    done = run(before, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Gemm"]
    assert_sound(before, done, RULE)
    assert_parity(before, done.stored.complete())


def test_the_row_says_where_it_went() -> None:
    before = graph("c = MatMul (x, w)\n k = Mul (c, s)\n y = Add (k, t)", f"{W}, {AFFINE}")
    done = run(before, RULE)
    (row,) = rows.norm_rows(done.norms, done.remarks)
    assert (row["kind"], row["output"], row["action"]) == ("batch_norm", "y", "folded")
    assert (row["site"], row["into"]) == ("fold-affine:y", "MatMul")


def test_bodies_and_functions() -> None:
    body = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[N,2] x) => (float[N,2] y) { y = local.Block (x) }
    <domain: "local", opset_import: ["" : 17]>
    Block (x) => (y)
    {
       w = Constant <value = float[2,2] {1.0, 2.0, 3.0, 4.0}> ()
       s = Constant <value_floats = [2.0, 4.0]> ()
       c = MatMul (x, w)
       k = Mul (c, s)
       y = Add (k, s)
    }
    """
    done = run(body, RULE)
    (function,) = done.stored.proto.functions
    assert [n.op_type for n in function.node if n.op_type != "Constant"] == ["MatMul", "Add"]
    assert_sound(body, done, RULE)
    assert_parity(body, done.stored.complete())


# ** refusals **

BASE = graph("c = MatMul (x, w)\n k = Mul (c, s)\n y = Add (k, t)", f"{W}, {AFFINE}")


@pytest.mark.parametrize(
    ("body", "more", "reason"),
    [
        ("c = MatMul (x, w)\n z = Relu (c)\n y = Mul (c, s)", "", "'c' is also read by node 'z'"),
        ("r = Relu (x)\n y = BN (r)", "", "Relu 'r' bends at zero, which a shift would move"),
        ("y = BN (x)", "", "no linear operator makes 'x': it is a graph input"),
        ("c = MatMul (x, w)\n r = Relu (c)\n y = Mul (r, n)", "float[2] n = {-1.0, 2.0}",
         "Relu 'r' passes only factors that are positive"),
        ("c = MatMul (x, w)\n d = Add (c, x)\n y = BN (d)", "", "'x' is also read by node 'c'"),
        ("c = Sigmoid (x)\n y = BN (c)", "", "Sigmoid 'c' makes it, and it is not linear"),
        ("u = Neg (s)\n c = Gemm (x, w, u)\n y = BN (c)", "", "adds 'u', which is computed"),
        ("c = Gemm <beta: float = 0.0> (x, w, s)\n y = BN (c)", "", "takes its bias times 0"),
        ("c = Gemm <beta: float = 0.0> (x, w)\n y = BN (c)", "", "takes its bias times 0"),
        ("c = Gemm (x, w, q)\n y = BN (c)", "float[3,1] q = {1.0, 2.0, 3.0}", "of shape [3, 1]"),
        ("c = MatMul (w, x)\n y = Mul (c, s)", "", "no linear operator makes 'x'"),
        ("u = Neg (g)\n c = MatMul (x, w)\n y = BatchNormalization (c, u, h, m, v)", "",
         "gamma 'u' is not constant: node 'u' (Neg) computes it"),
        ("c = MatMul (x, w)\n y = BatchNormalization <epsilon: float = 0.0> (c, g, h, m, z)",
         "float[2] z = {0.0, 1.0}", "gamma / sqrt(variance + epsilon) is not finite"),
        ("c = MatMul (x, w)\n p = Transpose (c)\n d = Add (p, q)\n y = Transpose (d)",
         "float[2,1] q = {1.0, 2.0}", "'c' has no bias, and an Add behind it would save nothing"),
        ("c = MatMul (x, q)\n y = Mul (c, s)", "float[2,2] q = {3e38, 1.0, 1.0, 1.0}",
         "the folded weight is not finite in float32"),
        ("c = MatMul (x, w)\n d = Add (c, q)\n y = Mul (d, s)", "float[2] q = {3e38, 1.0}",
         "the folded bias is not finite in float32"),
        ("c = MatMul (x, q)\n y = Mul (c, r)",
         "float[2,2] q = {1e-30, 1e-30, 1e-30, 1e-30}, float[2] r = {1e-10, 1e-11}",
         "the folded weight is too small for float32"),
        ("c = MatMul (x, w)\n e = Cast <to = 10> (c)\n d = Cast <to = 1> (e)\n y = Mul (d, s)",
         "", "Cast 'd' leaves a narrower type to compute it in"),
        ("c = MatMul (x, w)\n e = Cast <to = 6> (c)\n d = Cast <to = 1> (e)\n y = Mul (d, s)",
         "", "Cast 'd' converts from or to a type that is not real"),
    ],
)  # fmt: skip
def test_refuses(body: str, more: str, reason: str) -> None:
    body = body.replace("BN (", "BatchNormalization (")
    for name in "xrdc":
        body = body.replace(
            f"BatchNormalization ({name})", f"BatchNormalization ({name}, g, h, m, v)"
        )
    constants = ", ".join(filter(None, (W, AFFINE, BN, more)))
    x = "2,2" if "(w, x)" in body else "3,2"
    y = "3,2" if x == "3,2" else "2,2"
    assert_refuses(graph(body, constants, x=x, y=y), RULE, reason)


def test_refuses_a_result_that_is_an_output() -> None:
    before = BASE.replace("(float[N,2] y)", "(float[N,2] y, float[N,2] c)")
    assert_refuses(before, RULE, "'c' is a graph output")


def test_a_result_that_is_an_output_is_told_as_such() -> None:
    """Nothing reads it in the graph, but somebody outside does."""
    before = graph("c = Sigmoid (x)\n y = BatchNormalization (c, g, h, m, v)", BN)
    assert_refuses(before, RULE, "nor into what reads it: 'y' is a graph output")


def test_refuses_a_value_that_the_map_widens() -> None:
    # Each of two features comes from one column: the map makes two of it.
    before = graph("c = MatMul (x, w)\n y = Mul (c, s)", f"float[2,1] w = {{1.0, 2.0}}, {AFFINE}")
    assert not run(before, RULE).applied


def test_refuses_a_copy_that_is_too_large() -> None:
    before = BASE.replace("c = MatMul (x, w)", "c = MatMul (x, w)\n z = MatMul (x, w)").replace(
        "(float[N,2] y)", "(float[N,2] y, float[N,2] z)"
    )
    assert_refuses(before, FoldAffine(max_copy_mb=0), "'w' has other readers and a copy takes")
    assert run(before, RULE).applied
    assert run(BASE, FoldAffine(max_copy_mb=0)).applied


def test_refuses_copies_by_which_a_model_grows_too_much() -> None:
    """Of two weights of 2 MB that are shared, each behind a map, there is room for one copy."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for name in "ab":
        weights.append(
            numpy_helper.from_array(rng.normal(size=(700, 700)).astype(np.float32), f"w{name}")
        )
        weights.append(
            numpy_helper.from_array(
                np.full(700, 2, np.float32) + rng.integers(2, size=700).astype(np.float32),
                f"s{name}",
            )
        )
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"c{name}"]))
        nodes.append(helper.make_node("Mul", [f"c{name}", f"s{name}"], [f"y{name}"]))
        nodes.append(helper.make_node("MatMul", ["x", f"w{name}"], [f"z{name}"]))
    ends = [f"{kind}{name}" for kind in "yz" for name in "ab"]
    outputs = [helper.make_tensor_value_info(n, 1, ["N", 700]) for n in ends]
    x = helper.make_tensor_value_info("x", 1, ["N", 700])
    made = helper.make_graph(nodes, "g", [x], outputs, weights)
    model = helper.make_model(made, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])
    done = run(model, FoldAffine(max_growth=0.6))
    assert [r.site for r in done.applied] == ["fold-affine:ya"]
    assert any("the model may not grow by so much" in r.reason for r in done.remarks)
    assert len(run(model, FoldAffine(max_growth=1.5)).applied) == 2


def test_refuses_what_stands_outside_of_a_body() -> None:
    before = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, float[N,2] x) => (float[N,2] out)
    <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2] s = {2.0, 4.0}>
    {
       c = MatMul (x, w)
       out = If (flag) <
         then_branch = then () => (float[N,2] y) { y = Mul (c, s) },
         else_branch = other () => (float[N,2] z) { z = Identity (x) }
       >
    }
    """
    assert_refuses(before, RULE, "outside the body")


# ** properties **


@dataclass(frozen=True)
class Case:
    """A linear operator, a way, and a map behind it."""

    op: str
    bias: str  # "", "own", "add"
    move: str
    map: str
    dtype: Any
    group: int
    seed: int

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(self.seed)
        weights: list[onnx.TensorProto] = []
        nodes: list[onnx.NodeProto] = []

        def keep(name: str, array: Any) -> str:
            weights.append(numpy_helper.from_array(np.asarray(array).astype(self.dtype), name))
            return name

        def vector(name: str, n: int, axis: int, low: float = -1.0) -> str:
            values = rng.uniform(0.5, 1.5, n) * (rng.choice([-1, 1], n) if low < 0 else 1)
            return keep(name, values.reshape(-1, *(1,) * (-axis - 1)))

        def add(kind: str, *inputs: str, **attrs: Any) -> str:
            name = f"{kind.lower()}_{len(nodes)}"
            nodes.append(helper.make_node(kind, list(inputs), [name], **attrs))
            return name

        out = 4
        if self.op in ("Conv", "ConvTranspose"):
            shape: tuple[Any, ...] = ("N", 2 * self.group, 5)
            out, axis, rank = 2 * self.group + self.group, 1, 3
            dims: tuple[int, ...] = (out, 2, 2) if self.op == "Conv" else (2 * self.group, 3, 2)
            attrs: dict[str, Any] = {"group": self.group, "pads": [1, 0]}
        elif self.op == "Gemm":
            shape, axis, rank = ("N", 3), 1, 2
            dims = (out, 3) if self.group % 2 else (3, out)
            attrs = {"transB": self.group % 2, "alpha": 0.5, "beta": 2.0}
        else:
            shape, axis, rank, dims, attrs = ("N", 5, 3), 2, 3, (3, out), {}
        inputs = ["x", keep("w", rng.normal(size=dims))]
        if self.bias == "own" and self.op != "MatMul":
            inputs.append(vector("b", out, -1))
        value = add(self.op, *inputs, **attrs)
        if self.bias == "add":
            value = add("Add", vector("b", out, axis - rank), value)
        if self.move == "Transpose":
            perm = list(range(rank))
            perm[1], perm[-1] = perm[-1], perm[1]
            value = add("Transpose", value, perm=perm)
            axis = perm.index(axis)
        elif self.move == "Unsqueeze":
            weights.append(numpy_helper.from_array(np.array([0]), "axes"))
            value = add("Unsqueeze", value, "axes")
            axis, rank = axis + 1, rank + 1
        from_right = axis - rank
        if self.map == "BatchNormalization":
            if axis != 1:
                order = list(range(rank))
                order[1], order[axis] = order[axis], order[1]
                value = add("Transpose", value, perm=order)
            parameters = [vector(n, out, -1) for n in ("gamma", "beta", "mean")]
            value = add(self.map, value, *parameters, vector("var", out, -1, 0.0), epsilon=1e-3)
        else:
            for i, kind in enumerate(self.map.split()):
                value = add(kind, value, vector(f"p{i}", out, from_right))
        element = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        x = helper.make_tensor_value_info("x", element, list(shape))
        y = helper.make_tensor_value_info(value, element, [None] * rank)
        made = helper.make_graph(nodes, "g", [x], [y], weights)
        return helper.make_model(made, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


def cases(*dtypes: Any) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        op=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]),
        bias=st.sampled_from(["", "own", "add"]),
        move=st.sampled_from(["", "Transpose", "Unsqueeze"]),
        map=st.sampled_from(["BatchNormalization", "Mul", "Mul Add", "Sub Div", "Add Mul Sub Div"]),
        dtype=st.sampled_from(dtypes),
        group=st.integers(1, 3),
        seed=st.integers(0, 2**16),
    )


@settings(max_examples=60, deadline=None)
@given(cases(np.float32, np.float16))
def test_folding_agrees_in_onnxruntime(case: Case) -> None:
    model = case.model()
    done = run(model, FoldBatchnorm(), RULE)
    assert done.applied
    assert done.nodes[1] <= done.nodes[0]
    left = {n.op_type for n in done.stored.proto.graph.node}
    assert not left & {"BatchNormalization", "Mul", "Div", "Sub"}
    assert_sound(model, done, FoldBatchnorm(), RULE)
    assert_parity(model, done.stored.complete(), seed=case.seed)


def test_opset_6_has_other_sums() -> None:
    before = parser.parse_model(BASE.replace(": 17", ": 6"))
    assert not run(before, RULE).applied


# ** into what reads it **


def test_into_the_weights_and_biases_of_the_readers() -> None:
    before = graph(
        f"r = Relu (x)\n n = {NORM} (r, g, h, m, v)\n p = MatMul (n, w)\n q = Add (p, b)\n"
        "u = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (n, w, b)\n"
        "y = Sub (q, u)",
        f"{W}, float[2] b = {{1.0, 2.0}}, {BN.replace('g = {2.0, 3.0}', 'g = {4.0, 12.0}')}",
    )
    # s = (2, 4), t = (-1.5, 5): t w = (13.5, 17), t w^T / 2 / 2 = (2.125, 3.875)
    after = graph(
        "r = Relu (x)\n p = MatMul (r, p_weight)\n q = Add (p, q_bias)\n"
        "u = Gemm <transB: int = 1, alpha: float = 0.5, beta: float = 2.0> (r, u_weight, u_bias)\n"
        "y = Sub (q, u)",
        "float[2,2] p_weight = {2.0, 4.0, 12.0, 16.0}, float[2] q_bias = {14.5, 19.0},"
        " float[2] u_bias = {3.125, 5.875}, float[2,2] u_weight = {2.0, 8.0, 6.0, 16.0}",
    )
    done = assert_rewrites(before, after, RULE)
    assert [(r.site, r.action, r.into) for r in done.applied] == [
        ("fold-affine:n", "folded", "MatMul")
    ]
    (row,) = rows.norm_rows(done.norms, done.remarks)
    assert (row["action"], row["site"]) == ("folded", "fold-affine:n")


@pytest.mark.parametrize("pads", ["", "<pads: ints = [0, 0]>"])
def test_into_an_unpadded_convolution_without_a_bias(pads: str) -> None:
    before = graph(
        f"r = Relu (x)\n n = {NORM} (r, g, h, m, v)\n y = Conv {pads} (n, w)",
        f"float[1,2,2] w = {{1.0, 2.0, 3.0, 4.0}}, "
        f"{BN.replace('g = {2.0, 3.0}', 'g = {4.0, 12.0}')}",
        x="N,2,4",
        y="N,1,3",
    )
    # t summed over the kernel: -1.5 * 3 + 5 * 7
    after = graph(
        f"r = Relu (x)\n y = Conv {pads} (r, y_weight, y_bias)",
        "float[1] y_bias = {30.5}, float[1,2,2] y_weight = {2.0, 4.0, 12.0, 16.0}",
        x="N,2,4",
        y="N,1,3",
    )
    assert_rewrites(before, after, RULE)


def test_a_padded_convolution_takes_a_scale() -> None:
    before = graph(
        "r = Relu (x)\n k = Mul (r, s)\n y = Conv <pads: ints = [1, 0]> (k, w)",
        "float[1,2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2,1] s = {2.0, 4.0}",
        x="N,2,4",
        y="N,1,4",
    )
    after = graph(
        "r = Relu (x)\n y = Conv <pads: ints = [1, 0]> (r, y_weight)",
        "float[1,2,2] y_weight = {2.0, 4.0, 12.0, 16.0}",
        x="N,2,4",
        y="N,1,4",
    )
    assert_rewrites(before, after, RULE)


def test_through_a_transpose_into_a_matmul() -> None:
    before = graph(
        f"r = Relu (x)\n n = {NORM} (r, g, h, m, v)\n p = Transpose <perm: ints = [0, 2, 1]> (n)\n"
        "q = MatMul (p, w)\n y = Add (q, b)",
        f"{W}, float[2] b = {{1.0, 2.0}}, {BN}",
        x="N,2,3",
        y="N,3,2",
    )
    done = run(before, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == [
        "Relu",
        "Transpose",
        "MatMul",
        "Add",
    ]
    assert_sound(before, done, RULE)
    assert_parity(before, done.stored.complete())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Conv <auto_pad: string = \"SAME_UPPER\"> (n, w)", "pads with zeros, and takes no"),
        ("y = Conv <pads: ints = [1, 0]> (n, w)", "and an Add behind it would save nothing"),
        ("y = Conv <group: int = 2> (n, f)", "a weight 'f' of shape [2, 2, 1], which does not fit"),
        ("z = Conv (n, w)\n y = Relu (n)", "Relu 'y' bends at zero, which a shift would move"),
        ("a = Relu (n)\n y = Conv (a, w)", "Relu 'a' bends at zero, which a shift would move"),
        ("y = Conv (n, big)", "the folded weight is not finite in float32"),
        ("a = Cast <to: int = 10> (n)\n b = Cast <to: int = 1> (a)\n y = Conv (b, w)",
         "Cast 'a' leaves a narrower type to compute it in"),
        ("y = ConvTranspose (n, f)", "adds up as many neighbours as there are"),
        ("y = Conv (n, n)", "'y' reads it as its weight or bias"),
        ("a = Transpose <perm: ints = [0, 2, 1]> (n)\n y = MatMul (a, u)", "'y' has no bias"),
    ],
)  # fmt: skip
def test_readers_that_cannot_take_it(body: str, reason: str) -> None:
    constants = (
        "float[1,2,2] w = {1.0, 2.0, 3.0, 4.0}, float[1,2,2] big = {3e38, 2.0, 3.0, 4.0},"
        " float[2,2,1] f = {1.0, 2.0, 3.0, 4.0}, float[2,2] u = {1.0, 2.0, 3.0, 4.0}, "
        + BN.replace("g = {2.0, 3.0}", "g = {4.0, 12.0}")
    )
    before = graph(
        f"r = Relu (x)\n n = {NORM} (r, g, h, m, v)\n {body}", constants, "N,2,4", "A,B,C"
    )
    done = assert_refuses(before, RULE, reason)
    assert any("Relu 'r' bends at zero" in remark.reason for remark in done.remarks)


def reading(op: str, biased: bool, dtype: Any, seed: int) -> onnx.ModelProto:
    """A map in front of a linear operator, behind nothing linear."""
    rng = np.random.default_rng(seed)

    def tensor(name: str, array: Any) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(array).astype(dtype), name)

    wide = {"Conv": (5, 3, 2), "Gemm": (3, 5), "MatMul": (3, 5)}[op]
    weights = [tensor("w", rng.normal(size=wide)), tensor("b", rng.normal(size=5))]
    weights += [tensor(n, rng.normal(size=3)) for n in ("gamma", "beta", "mean")]
    weights.append(tensor("var", rng.uniform(0.5, 2.0, 3)))
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("BatchNormalization", ["r", "gamma", "beta", "mean", "var"], ["n"]),
    ]
    if op == "MatMul":
        nodes.append(helper.make_node("MatMul", ["n", "w"], ["c"]))
        nodes.append(helper.make_node("Add", ["c", "b"], ["y"]))
    else:
        attrs: dict[str, Any] = {"alpha": 0.5, "beta": 2.0} if op == "Gemm" else {}
        inputs = ["n", "w", *(["b"] if biased else [])]
        nodes.append(helper.make_node(op, inputs, ["y"], **attrs))
    dims: list[str | int | None] = ["N", 3, 4] if op == "Conv" else ["N", 3]
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    x = helper.make_tensor_value_info("x", element, dims)
    y = helper.make_tensor_value_info("y", element, [None] * len(dims))
    made = helper.make_graph(nodes, "g", [x], [y], weights)
    return helper.make_model(made, ir_version=9, opset_imports=[helper.make_opsetid("", 17)])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["Conv", "Gemm", "MatMul"]),
    st.booleans(),
    st.sampled_from([np.float32, np.float16]),
    st.integers(0, 2**16),
)
def test_folding_forward_agrees_in_onnxruntime(
    op: str, biased: bool, dtype: Any, seed: int
) -> None:
    model = reading(op, biased, dtype, seed)
    done = run(model, RULE)
    assert len(done.applied) == 1
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete(), seed=seed)


# ** mutants: each wrong formula must be caught by the checks above **

MUTANTS = {
    "epsilon lost": (norm_operators, "np.sqrt(variance + epsilon)", "np.sqrt(variance)"),
    "root lost": (norm_operators, "gamma / np.sqrt(", "gamma / ("),
    "sign of the mean": (norm_operators, "beta - mean * scale", "beta + mean * scale"),
    "mean not scaled": (norm_operators, "beta - mean * scale", "beta - mean"),
    "bias not scaled": (change_module, "moved: Vector = array * scale", "moved: Vector = array"),
    "shift lost": (change_module, "moved if shift is None else moved + shift", "moved"),
    "beta of Gemm": (change_module, "slot.spread(shift) / slot.gain", "slot.spread(shift)"),
    "beta of an empty bias": (port_module, "= vector / gain", "= vector"),
    "order of the rows": (change_module, "else scale[rows]", "else scale[::-1][rows]"),
    "axis of the groups": (
        port_module,
        "factors.reshape(groups, -1)[group]",
        "factors.reshape(-1, groups).T[group]",
    ),
    "group of a row": (port_module, "// (rows // groups)", "% groups"),
}


FIXED = [
    Case(op, bias, move, map_, np.float32, group, seed)
    for seed, (op, group) in enumerate(
        [("Conv", 2), ("ConvTranspose", 3), ("Gemm", 1), ("Gemm", 2), ("MatMul", 1)]
    )
    for bias in ("", "own", "add")
    for move, map_ in (("Transpose", "BatchNormalization"), ("", "Sub Div"))
]


def agrees(rule: Any) -> bool:
    """Whether a fold computes the same on a set of cases."""
    models = [case.model() for case in FIXED]
    models += [reading(op, True, np.float32, 3) for op in ("Conv", "Gemm", "MatMul")]
    return all(computes_the_same(model, rule) for model in models)


def test_the_unchanged_arithmetic_agrees() -> None:
    assert agrees(RULE)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new = MUTANTS[name]
    names = mutated(source, old, new)
    if source is norm_operators:
        monkeypatch.setattr(affine, "batch_norm_affine", names["batch_norm_affine"])
    elif source is change_module:
        monkeypatch.setattr(change_module, "results", names["results"])
        monkeypatch.setattr(flow_back, "absorbed", names["absorbed"])
    else:
        monkeypatch.setattr(port_module.Slot, "spread", names["Slot"].spread)
        monkeypatch.setattr(change_module, "filled_bias", names["filled_bias"])
    assert not agrees(RULE)


@pytest.mark.parametrize(
    ("equation", "weight", "size"),
    [
        ("bsd,df->bsf", (4, 6), (6,)),
        ("df,bsd->bsf", (4, 6), (6,)),
        ("bsd,dhe->bhse", (4, 2, 3), (3,)),
        ("bsd,dhe->bhse", (4, 2, 3), (2, 1, 1)),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_an_einsum_takes_a_scale_into_the_operand_that_has_the_channels(
    equation: str, weight: tuple[int, ...], size: tuple[int, ...], shifted: bool
) -> None:
    net = Net()
    x = net.op("Conv", net.input("x", ["n", 3, 4]), net.matrix(5, 3, 1))
    operands = [x, net.matrix(*weight)]
    y = net.op("Einsum", *(operands[::-1] if equation[0] == "d" else operands), equation=equation)
    if shifted:
        y = net.op("Add", y, net.keep(net.random.normal(size=size)))
    y = net.op("Mul", y, net.keep(1.5 + net.random.random(size=size)))
    model = net.model(net.op("Add", y, net.keep(net.random.normal(size=size))))
    done = run(model, RULE)
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())
    ops = [n.op_type for n in done.stored.proto.graph.node]
    assert ops == ["Conv", "Einsum", "Add"]


def test_an_einsum_of_two_values_gives_the_scale_to_the_one_with_the_channels() -> None:
    net = Net()
    value = net.linear(net.input("x", ["n", 4, 5]), 5, 6)
    weights = net.op("Softmax", net.input("scores", ["n", 4, 4]), axis=-1)
    y = net.op("Einsum", weights, value, equation="bqk,bkd->bqd")
    model = net.model(net.op("Mul", y, net.vector(6, 2.0)))
    done = run(model, RULE)
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())
    assert [n.op_type for n in done.stored.proto.graph.node][-1] == "Einsum"
