"""Where affine maps flow: every row of the tables, in both directions, and every refusal of a row.

A case is a graph with one map; what is left of it is compared as a list of operators, and its
outputs by parity. Dyadic constants make the goldens exact.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from onnxnorm import flow_back, flow_forth, moves, port, storage
from onnxnorm.errors import OnnxNormError
from onnxnorm.passes import fold_affine
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from onnxnorm.truth import Evaluator
from tests.flows import network
from tests.mutants import computes_the_same, mutated

RULES: tuple[Pass, ...] = (FoldBatchnorm(), FoldAffine())
RULE = FoldAffine()
CONSTANTS = {
    "w": "float[2,2,1,1] w = {1.0, 2.0, 3.0, 4.0}",
    "w3": "float[2,2,3,3] w3 = {" + ", ".join(str(float(n % 7 - 3)) for n in range(36)) + "}",
    "b": "float[2] b = {1.0, -2.0}",
    "u": "float[2,1,1,1] u = {0.5, -4.0}",
    "v": "float[2,2] v = {1.0, -2.0, 0.5, 3.0}",
    "g": "float[2] g = {2.0, -3.0}",
    "h": "float[2] h = {0.5, 1.0}",
    "m": "float[2] m = {1.0, -1.0}",
    "q": "float[2] q = {4.0, 9.0}",
    "s": "float[2,1,1] s = {2.0, 4.0}",
    "n": "float[2,1,1] n = {-2.0, 4.0}",
    "t": "float[2,1,1] t = {0.5, -1.0}",
    "s4": "float[4,1,1] s4 = {2.0, 4.0, -8.0, 0.5}",
    "t4": "float[4,1,1] t4 = {0.5, -1.0, 2.0, 0.25}",
    "r4": "float[4,1,1] r4 = {2.0, 2.0, 4.0, 4.0}",
    "sr": "float[2] sr = {2.0, 4.0}",
    "tr": "float[2] tr = {0.5, -1.0}",
    "up": "float[4] up = {1.0, 1.0, 2.0, 2.0}",
    "pads": "int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 1}",
    "one": "float one = {1.0}",
    "half": "float half = {0.5}",
    "flat": "int64[3] flat = {0, 2, -1}",
    "cut": "int64[2] cut = {2, 2}",
    "i4": "int64[1] i4 = {4}",
    "pick": "int64[2] pick = {3, 1}",
    "w4": "float[4,2,1,1] w4 = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0}",
    "i0": "int64[1] i0 = {0}",
    "i1": "int64[1] i1 = {1}",
    "i2": "int64[1] i2 = {2}",
    "hw": "int64[2] hw = {2, 3}",
    "z4": "float[4] z4 = {2.0, -4.0, 1.0, 0.5}",
    "p": "float[1,1,1] p = {-4.0}",
    "w8": "float[8,2,1,1] w8 = {" + ", ".join(str(float(n % 5 - 2)) for n in range(16)) + "}",
    "zero": "float[2,1,1] zero = {0.0, 4.0}",
    "slope": "float[2,1,1] slope = {0.25, 0.5}",
}
BN = "BatchNormalization <epsilon: float = 0.0> ({}, g, h, m, q)"


def graph(body: str, y: str = "N,2,4,6", x: str = "N,2,4,6", opset: int = 17) -> str:
    """A graph with the constants that its body reads."""
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    constants = ", ".join(text for name, text in CONSTANTS.items() if name in words)
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    main (float[{x}] x) => (float[{y}] y)
    <{constants}>
    {{
       {body}
    }}
    """


def left(source: str) -> list[str]:
    """The operators after folding, which is sound and computes the same."""
    done = run(source, *RULES)
    assert_sound(source, done, *RULES)
    assert done.nodes[1] <= done.nodes[0]
    if done.applied:
        assert_parity(source, done.stored.complete())
    return [n.op_type for n in done.stored.proto.graph.node if n.op_type != "Constant"]


# ** against the edges **

# What stands between a convolution and a map with scale and shift, and is passed.
PASSED_BACK = {
    "MaxPool": ("MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (c)", "s"),
    "AveragePool": ("AveragePool <kernel_shape = [3,3]> (c)", "s"),
    "AveragePool that leaves its padding out":
        ("AveragePool <kernel_shape = [3,3], pads = [1,1,1,1]> (c)", "s"),
    "GlobalAveragePool": ("GlobalAveragePool (c)", "n"),
    "GlobalMaxPool": ("GlobalMaxPool (c)", "s"),
    "ReduceMean": ("ReduceMean <axes = [2,3]> (c)", "n"),
    "ReduceMax": ("ReduceMax <axes = [2,3]> (c)", "s"),
    "Resize": ("Resize <mode = \"nearest\"> (c, , up)", "n"),
    "Resize linear": ("Resize <mode = \"linear\"> (c, , up)", "n"),
    "Resize cubic": ("Resize <mode = \"cubic\"> (c, , up)", "n"),
    "Pad that reflects": ("Pad <mode = \"reflect\"> (c, pads)", "n"),
    "Slice of rows": ("Slice (c, i1, i2, i2)", "n"),
    "Identity": ("Identity (c)", "n"),
    "Neg": ("Neg (c)", "n"),
    "Cast": ("Cast <to = 1> (c)", "n"),
    "Dropout": ("Dropout (c)", "n"),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSED_BACK)
def test_passed_on_the_way_back(name: str) -> None:
    between, scale = PASSED_BACK[name]
    body = f"c = Conv (x, w, b)\n d = {between}\n k = Mul (d, {scale})\n y = Add (k, t)"
    assert left(graph(body, "A,B,C,D")) == ["Conv", between.split()[0]]


@pytest.mark.parametrize("op", ["Relu (c)", "LeakyRelu (c)", "PRelu (c, slope)", "Abs (c)"])
def test_a_positive_scale_without_a_shift_passes_what_bends_at_zero(op: str) -> None:
    kind = op.split()[0]
    # A scale that passes leaves the shift behind: one node fewer.
    for rest, after in (("y = Mul (d, s)", []), ("k = Mul (d, s)\n y = Add (k, t)", ["Add"])):
        assert left(graph(f"c = Conv (x, w, b)\n d = {op}\n {rest}")) == ["Conv", kind, *after]
    assert_refuses(
        graph(f"c = Conv (x, w, b)\n d = {op}\n y = Mul (d, n)"),
        RULE,
        f"{kind} 'd' passes only factors that are positive",
    )


def test_each_branch_of_a_concat_takes_its_part() -> None:
    before = graph(
        "a = Conv (x, w)\n c = Conv (x, w, b)\n d = Concat <axis = 1> (a, c)\n"
        "k = Mul (d, s4)\n y = Add (k, t4)",
        "N,4,4,6",
    )
    after = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4,6] x) => (float[N,4,4,6] y)
    <float[2] a_bias = {0.5, -1.0}, float[2,2,1,1] a_weight = {2.0, 4.0, 12.0, 16.0},
     float[2] c_bias = {-6.0, -0.75}, float[2,2,1,1] c_weight = {-8.0, -16.0, 1.5, 2.0}>
    {
       a = Conv (x, a_weight, a_bias)
       c = Conv (x, c_weight, c_bias)
       y = Concat <axis: int = 1> (a, c)
    }
    """
    assert_rewrites(before, after, RULE)


def test_both_sides_of_a_sum_take_the_scale_and_one_the_shift() -> None:
    before = graph(
        "a = Conv (x, w, b)\n c = Conv (x, w, b)\n d = Sub (a, c)\n y = " + BN.format("d")
    )
    # s = (1, -1), t = (-0.5, 0)
    after = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4,6] x) => (float[N,2,4,6] y)
    <float[2] a_bias = {0.5, 2.0}, float[2] c_bias = {1.0, 2.0},
     float[2,2,1,1] c_weight = {1.0, 2.0, -3.0, -4.0}>
    {
       a = Conv (x, c_weight, a_bias)
       c = Conv (x, c_weight, c_bias)
       y = Sub (a, c)
    }
    """
    assert_rewrites(before, after, RULE)


BACK = {
    # A batch norm behind a residual chain, of which one branch has no bias.
    "residual": (
        "a = Conv (x, w)\n c = Conv (a, u)\n d = Add (a, c)\n y = " + BN.format("d"),
        ["Conv", "Conv", "Add", "BatchNormalization"],
    ),
    "three branches": (
        "a = Conv (x, w)\n c = Conv (x, w)\n e = Conv (x, w, b)\n d = Add (a, c)\n f = Add (d, e)\n"
        "y = " + BN.format("f"),
        ["Conv", "Conv", "Conv", "Add", "Add"],
    ),
    "a value added to itself": (
        "a = Conv (x, w, b)\n d = Add (a, a)\n y = Mul (d, n)",
        ["Conv", "Add"],
    ),
    "a constant branch": (
        "a = Conv (x, w, b)\n d = Max (a, half)\n k = Mul (d, s)\n y = Add (k, t)",
        ["Conv", "Max"],
    ),
    "Where": (
        "a = Conv (x, w, b)\n e = Conv (x, w)\n z = Greater (x, half)\n d = Where (z, a, e)\n"
        "y = " + BN.format("d"),
        ["Conv", "Conv", "Greater", "Where"],
    ),
    "a gate": (
        "a = Conv (x, w, b)\n z = Sigmoid (x)\n d = Mul (z, a)\n y = Mul (d, n)",
        ["Conv", "Sigmoid", "Mul"],
    ),
    "Concat along another axis": (
        "a = Conv (x, w)\n c = Conv (x, w, b)\n d = Concat <axis = 2> (a, c)\n y = "
        + BN.format("d"),
        ["Conv", "Conv", "Concat"],
    ),
    "a half of a Split": (
        (
            "a = Conv (x, w4)\n e, f = Split <axis = 1> (a, cut)\n k = Mul (e, s)\n"
            "d = Add (k, t)\n y = Concat <axis = 1> (d, f)"
        ),
        ["Conv", "Split", "Concat"],
    ),
    "a half that is sliced": (
        (
            "a = Conv (x, w4)\n e = Slice (a, i0, i2, i1)\n f = Slice (a, i2, i4, i1)\n"
            "k = Mul (e, s)\n d = Add (k, t)\n y = Concat <axis = 1> (f, d)"
        ),
        ["Conv", "Slice", "Slice", "Concat"],
    ),
    "channels that are picked": (
        "a = Conv (x, w4)\n e = Gather <axis = 1> (a, pick)\n k = Mul (e, s)\n y = Add (k, t)",
        ["Conv", "Gather"],
    ),
    "transposes": (
        (
            "a = Conv (x, w, b)\n c = Transpose <perm = [0,2,3,1]> (a)\n k = Mul (c, sr)\n"
            "d = Add (k, tr)\n y = Transpose <perm = [0,3,1,2]> (d)"
        ),
        ["Conv", "Transpose", "Transpose"],
    ),
    "Reshape and Transpose": (
        (
            "a = Conv (x, w, b)\n c = Reshape (a, flat)\n d = Transpose <perm = [0,2,1]> (c)\n"
            "k = Mul (d, sr)\n y = Add (k, tr)"
        ),
        ["Conv", "Reshape", "Transpose"],
    ),
    "a scale in front of a layer norm's reader": (
        (
            "a = Transpose <perm = [0,2,3,1]> (x)\n c = LayerNormalization <axis = -1> (a, sr)\n"
            "k = Mul (c, sr)\n y = Add (k, tr)"
        ),
        ["Transpose", "LayerNormalization"],
    ),
    "instance norm": (
        "a = InstanceNormalization (x, g, h)\n k = Mul (a, n)\n y = Add (k, t)",
        ["InstanceNormalization"],
    ),
    "a batch norm in front": (
        f"a = {BN.format('x')}\n k = Mul (a, s)\n y = Add (k, t)",
        ["BatchNormalization"],
    ),
    "two batch norms": (
        f"z = Relu (x)\n a = {BN.format('z')}\n y = {BN.format('a')}",
        ["Relu", "BatchNormalization"],
    ),
    "a shift through a product with a constant": (
        (
            "a = Conv (x, w, b)\n c = Mul (a, half)\n e = Sigmoid (c)\n d = Mul (c, half)\n"
            "y = Add (d, e)"
        ),
        ["Conv", "Sigmoid", "Mul", "Add"],
    ),
}


@pytest.mark.parametrize("name", BACK)
def test_on_the_way_back(name: str) -> None:
    body, after = BACK[name]
    assert left(graph(body, "A,B,C,D" if "Reshape" not in name else "A,B,C")) == after


@pytest.mark.parametrize("op", ["DepthToSpace", "SpaceToDepth"])
@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_blocks_move_channels(op: str, mode: str) -> None:
    attrs = f'blocksize = 2, mode = "{mode}"' if op == "DepthToSpace" else "blocksize = 2"
    net_x, scales = ("N,8,4,6", "float[2,1,1] z = {2.0, -4.0}")
    weight = "float[8,8,1,1] ww = {" + ", ".join(str(float(i % 5 - 2)) for i in range(64)) + "}"
    if op == "SpaceToDepth":
        net_x, weight = "N,2,4,6", "float[2,2,1,1] ww = {1.0, 2.0, 3.0, 4.0}"
        scales = "float[8,1,1] z = {2.0, -4.0, 2.0, -4.0, 2.0, -4.0, 2.0, -4.0}"
    source = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[{net_x}] x) => (float[A,B,C,D] y) <{weight}, {scales}>
    {{ c = Conv (x, ww)\n d = {op} <{attrs}> (c)\n k = Mul (d, z)\n y = Sub (k, z) }}
    """
    assert left(source) == ["Conv", op]
    uneven = source.replace("z = {2.0, -4.0, 2.0", "z = {2.0, -4.0, 1.0")
    if op == "SpaceToDepth":
        assert_refuses(uneven, RULE, "puts channels with different factors into one")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (("c = Conv (x, w)\n d = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1],"
         " count_include_pad = 1> (c)\n y = BN"), "averages with zeros that it pads"),
        ("c = Conv (x, w)\n d = AveragePool <kernel_shape = [3,3], ceil_mode = 1> (c)\n y = BN",
         "averages windows that stick out"),
        ("c = Conv (x, w)\n d = MaxPool <kernel_shape = [3,3]> (c)\n y = BN",
         "MaxPool 'd' passes only factors that are positive"),
        ("c = Conv (x, w)\n d = ReduceSum <keepdims = 1> (c, hw)\n y = BN", "adds up a shift"),
        ("c = Conv (x, w)\n d = Pad (c, pads)\n y = BN", "pads every channel with one number"),
        ("c = Conv (x, w)\n d = Pad (c, pads, one)\n y = Mul (d, s)", "pads every channel with"),
        ("c = Conv (x, w)\n z = Sigmoid (x)\n d = Mul (c, z)\n y = BN", "takes no shift"),
        ("c = Conv (x, w)\n d = Add (c, x)\n y = BN", "'x' is also read by node 'c' (Conv)"),
        ("c = Conv (x, w)\n d = Concat <axis = 2> (c, x)\n y = BN", "also read by node 'c' (Conv)"),
        ("c = Conv (x, w)\n z = Relu (c)\n d = Add (c, z)\n y = BN",
         "Relu 'z' passes only factors that are positive"),
        ("c = Conv (x, w)\n d = Softmax <axis = 1> (c)\n y = BN", "makes it, and it is not linear"),
        ("c = Conv (x, w)\n d = Clip (c, half)\n y = BN", "makes it, and it is not linear"),
        (("c = Conv (x, w)\n d, i = MaxPool <kernel_shape = [1,1]> (c)\n e = Cast <to = 1> (i)\n"
         "k = Mul (e, s)\n y = Add (d, k)"), "is not real"),
    ],
)  # fmt: skip
def test_not_passed_on_the_way_back(body: str, reason: str) -> None:
    assert_refuses(graph(body.replace("BN", BN.format("d")), "A,B,C,D"), RULE, reason)


def test_a_uniform_map_changes_what_a_pad_fills_in() -> None:
    body = "c = Conv (x, w)\n d = Pad (c, pads, one)\n k = Mul (d, f)\n y = Add (k, f)"
    source = graph(body, "A,B,C,D").replace("<float", "<float[2,1,1] f = {0.5, 0.5}, float", 1)
    assert left(source) == ["Conv", "Pad"]


# ** along the edges **

FORTH = {
    "a grouped convolution": ("y = Conv <group = 2> (a, u)", ["Sigmoid", "Conv"]),
    "two that read it": (
        "c = Conv (a, w)\n d = Conv <group = 2> (a, u, b)\n y = Add (c, d)",
        ["Sigmoid", "Conv", "Conv", "Add"],
    ),
    "pools": (
        "c = AveragePool <kernel_shape = [2,2]> (a)\n y = Conv (c, w, b)",
        ["Sigmoid", "AveragePool", "Conv"],
    ),
    "a transpose and a MatMul": (
        "c = Transpose <perm = [0,2,3,1]> (a)\n d = MatMul (c, v)\n y = Add (d, tr)",
        ["Sigmoid", "Transpose", "MatMul", "Add"],
    ),
    "a MatMul from the left": (
        "c = Reshape (a, flat)\n d = MatMul (v, c)\n y = Add (half, d)",
        ["Sigmoid", "Reshape", "MatMul", "Add"],
    ),
    "a part of a Concat": (
        "c = Concat <axis = 1> (a, x)\n y = Conv (c, wide)",
        ["Sigmoid", "Concat", "Conv"],
    ),
    "a padded convolution, whose border is added": (
        "c = Conv <pads = [1,1,1,1]> (a, w3)\n y = Add (c, t)",
        ["Sigmoid", "Conv", "Add"],
    ),
    "a batch norm": (f"y = {BN.format('a')}", ["Sigmoid", "BatchNormalization"]),
    "an instance norm written out": (
        (
            "c = ReduceMean <axes = [2,3]> (a)\n d = Sub (a, c)\n e = Mul (d, d)\n"
            "f = ReduceMean <axes = [2,3]> (e)\n i = Add (f, one)\n j = Sqrt (i)\n y = Div (d, j)"
        ),
        ["Sigmoid", "ReduceMean", "Sub", "Mul", "ReduceMean", "Add", "Sqrt", "Div"],
    ),
}


@pytest.mark.parametrize("name", FORTH)
def test_on_the_way_forth(name: str) -> None:
    body, after = FORTH[name]
    source = graph(f"r = Sigmoid (x)\n k = Mul (r, s)\n a = Add (k, t)\n {body}", "")
    source = source.replace("<float", "<float[1,4,1,1] wide = {1.0, 2.0, -3.0, 4.0}, float", 1)
    source = source.replace(
        "(float[] y)", "(float[A,B,C] y)" if "left" in name else "(float[A,B,C,D] y)"
    )
    assert left(source) == after


def test_a_dense_block_keeps_its_norms_and_says_why() -> None:
    """DenseNet: what a norm reads is read again later, and a ReLU follows it."""
    block = (
        f"a = Conv (x, w)\n e = {BN.format('a')}\n r = Relu (e)\n c = Conv (r, w)\n"
        "d = Concat <axis = 1> (a, c)\n y = Relu (d)"
    )
    done = assert_refuses(graph(block, "N,4,4,6"), RULE)
    assert not done.remarks  # a norm behind a convolution is for fold-batchnorm to tell of
    pooled = block.replace("a = Conv (x, w)", "a = MaxPool <kernel_shape = [1,1]> (x)")
    done = assert_refuses(graph(pooled, "N,4,4,6"), RULE, "'a' is also read by node 'd' (Concat)")
    (remark,) = done.remarks
    assert "Relu 'r' passes only factors that are positive" in remark.reason
    assert remark.at == "d"


def test_a_residual_network_with_its_norms_in_front_keeps_them() -> None:
    """ResNet-v2: the stream goes on past the norm."""
    block = (
        f"a = Conv (x, w)\n i = Identity (a)\n e = {BN.format('i')}\n r = Relu (e)\n"
        "c = Conv (r, w)\n y = Add (a, c)"
    )
    done = assert_refuses(graph(block), RULE, "'a' is also read by node 'y' (Add)")
    assert "Relu 'r' passes only factors" in done.remarks[0].reason


def test_a_shift_that_every_instance_norm_ignores_goes() -> None:
    source = graph("r = Sigmoid (x)\n k = Add (r, t)\n y = InstanceNormalization (k, g, h)")
    done = run(source, *RULES)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Sigmoid", "InstanceNormalization"]
    assert_parity(source, done.stored.complete())


def test_one_factor_goes_into_epsilon() -> None:
    """norm(a x) with epsilon is norm(x) with epsilon / a^2, and a shift goes."""
    before = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4] x) => (float[N,2,4] y)
    <float[2,1] f = {2.0, 2.0}, float[2,1] t = {0.5, -1.0}, float[2] g = {1.0, 2.0}>
    {
       k = Mul (x, f)
       a = Add (k, t)
       y = InstanceNormalization <epsilon: float = 0.25> (a, g, g)
    }
    """
    after = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4] x) => (float[N,2,4] y)
    <float[2] g = {1.0, 2.0}>
    {
       y = InstanceNormalization <epsilon: float = 0.0625> (x, g, g)
    }
    """
    assert_rewrites(before, after, RULE)
    negative = before.replace("{2.0, 2.0}", "{-2.0, -2.0}")
    assert "keeps the sign" in _reasons(negative)
    uneven = before.replace("{2.0, 2.0}", "{2.0, 3.0}")
    assert "one epsilon, for channels with different factors" in _reasons(uneven)


def _reasons(source: str) -> str:
    return "; ".join(r.reason for r in run(source, RULE).remarks)


@pytest.mark.parametrize(
    ("square", "root"),
    [
        ("Pow (k, two)", "d = Sqrt (z)\n y = Div (k, d)"),
        ("Mul (k, k)", "d = Sqrt (z)\n f = Reciprocal (d)\n y = Mul (k, f)"),
    ],
)
def test_a_norm_that_is_written_out_takes_one_factor_into_its_epsilon(
    square: str, root: str
) -> None:
    body = f"r = Sigmoid (x)\n k = Mul (r, even)\n e = {square}\n"
    body += f"i = ReduceMean <axes = [1]> (e)\n z = Add (i, one)\n {root}"
    source = graph(body).replace(
        "<float", "<float[2,1,1] even = {2.0, 2.0}, float two = {2.0}, float", 1
    )
    assert left(source).count("Mul") == body.count("Mul") - 1
    constants = run(source, RULE).stored.complete().graph.initializer
    assert 0.25 in [float(onnx.numpy_helper.to_array(t)) for t in constants if not t.dims]


# What a map does not pass on its way forth, behind `a`, which has a scale and a shift.
NOT_PASSED_FORTH = [
    ("c = Add (a, x)\n y = Conv (c, w)", "adds 'x', which is not scaled"),
    ("c = Mul (a, x)\n y = Conv (c, w)", "Mul 'c' multiplies what is shifted"),
    ("c = Mul (a, a)\n y = Conv (c, w)", "Mul 'c' multiplies what is shifted"),
    ("c = Div (x, a)\n y = Conv (c, w)", "divides by what is shifted"),
    ("c = Div (a, x)\n y = Conv (c, w)", "Div 'c' divides what is shifted"),
    ("c = Pow (a, half)\n y = Conv (c, w)", "Pow 'c' takes a power of it"),
    ("c = Sqrt (a)\n y = Conv (c, w)", "Sqrt 'c' takes a root of it"),
    ("c = Reciprocal (a)\n y = Conv (c, w)", "Reciprocal 'c' divides by it"),
    ("c = Max (a, x)\n y = Conv (c, w)", "Max 'c' compares it with other values"),
    ("z = Greater (x, half)\n c = Where (z, a, x)\n y = Conv (c, w)", "mixes it with other"),
    ("c = Concat <axis = 2> (a, x)\n y = Conv (c, w)", "are mapped in different ways"),
    ("c = PRelu (x, a)\n y = Conv (c, w)", "PRelu 'c' reads it as a parameter"),
    ("c = Transpose (a)\n y = MatMul (c, c)", "multiplies two values with different factors"),
    ("c = ArgMax <axis = 1> (a)\n y = Cast <to = 1> (c)", "compares channels that are mapped"),
    ("y = LayerNormalization <axis = -1> (a, six)", "keeps the sign of its factor"),
    ("z = Neg (w)\n y = Conv (a, z)", "has a weight that is computed"),
    ("z = Sigmoid (a)\n y = Conv (a, w)", "Sigmoid 'z' reads it, and it is not linear"),
]


@pytest.mark.parametrize(("body", "reason"), NOT_PASSED_FORTH)
def test_not_passed_on_the_way_forth(body: str, reason: str) -> None:
    # A factor of zero, so that the shift cannot stay behind by itself.
    start = "r = Conv (x, w)\n j = Sigmoid (r)\n k = Mul (r, zero)\n a = Add (k, t)\n"
    source = graph(f"{start} {body}", "A,B,C,D")
    six = "<float[6] six = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float"
    assert reason in _reasons(source.replace("<float", six, 1))


# What a norm does not ignore.
NOT_IGNORED = {
    "LayerNormalization <axis = -1> (k, sr)": "over channels that are shifted in different ways",
    "RMS": "normalizes it by its size, which a shift changes",
    "Softmax <axis = -1> (k)": "over channels that are shifted in different ways",
    "LpNormalization <axis = -1> (k)": "normalizes it by its size, which a shift changes",
}


@pytest.mark.parametrize("reader", NOT_IGNORED)
def test_what_a_norm_does_not_ignore(reader: str) -> None:
    called = reader if reader != "RMS" else "RMSNormalization <axis = -1> (k, sr)"
    opset = 23 if reader == "RMS" else 17
    source = graph(f"r = Sigmoid (x)\n k = Add (r, tr)\n y = {called}", "N,3,2", "N,3,2", opset)
    assert_refuses(source.replace("ir_version: 8", "ir_version: 10"), RULE, NOT_IGNORED[reader])


def test_a_padded_convolution_keeps_the_shift_where_it_costs_least() -> None:
    # The map becomes one Add: of few numbers in front of the convolution, or behind it where that
    # is smaller. Both are exact at the border.
    chain = "r = Sigmoid (x)\n k = Mul (r, s)\n a = Add (k, t)\n"
    front = graph(chain + "y = Conv <pads = [1,1,1,1]> (a, w3)")
    assert left(front) == ["Sigmoid", "Add", "Conv"]
    behind = graph(chain + "y = Conv <pads = [1,1,1,1], strides = [2,2]> (a, w3)", "N,2,2,3")
    assert left(behind) == ["Sigmoid", "Conv", "Add"]
    unknown = graph(
        chain + "y = Conv <pads = [1,1,1,1], strides = [2,2]> (a, w3)", "N,2,A,B", "N,2,H,W"
    )
    assert left(unknown) == ["Sigmoid", "Add", "Conv"]
    zero = unknown.replace("s = {2.0, 4.0}", "s = {0.0, 4.0}")
    assert_refuses(zero, RULE, "pads with zeros, and takes no shift")


# ** scalars, and biases that nothing sees **

SPLIT = "to = {0, 3, 1, 2}"


def attention(body: str, y: str = "N,1,3,3", more: str = "") -> str:
    """Queries and keys of one head of two, in front of what `body` makes of them."""
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,3,2] x) => (float[{y}] y)
    <float[2,2] w = {{1.0, 2.0, 3.0, 4.0}}, float[2] b = {{1.0, 2.0}}, float half = {{0.5}},
     float[2,2] v = {{1.0, 0.0, 2.0, 1.0}}, int64[4] {SPLIT} {more}>
    {{
       c = MatMul (x, w)
       d = Add (c, b)
       e = Reshape (d, to)
       q = Transpose <perm: ints = [0, 2, 1, 3]> (e)
       f = MatMul (x, v)
       i = Reshape (f, to)
       k = Transpose <perm: ints = [0, 2, 3, 1]> (i)
       {body}
    }}
    """


def test_a_scalar_goes_into_the_projection_of_the_queries() -> None:
    before = attention("z = Mul (q, half)\n y = MatMul (z, k)")
    after = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,3,2] x) => (float[N,1,3,3] y)
    <int64[4] to = {0, 3, 1, 2}, float[2,2] v = {1.0, 0.0, 2.0, 1.0},
     float[2] z_bias = {0.5, 1.0}, float[2,2] z_weight = {0.5, 1.0, 1.5, 2.0}>
    {
       c = MatMul (x, z_weight)
       d = Add (c, z_bias)
       e = Reshape (d, to)
       f = MatMul (x, v)
       i = Reshape (f, to)
       k = Transpose <perm: ints = [0, 2, 3, 1]> (i)
       z = Transpose <perm: ints = [0, 2, 1, 3]> (e)
       y = MatMul (z, k)
    }
    """
    done = assert_rewrites(before, after, RULE)
    assert [(r.site, r.into) for r in done.applied] == [("fold-affine:z", "MatMul")]


@pytest.mark.parametrize(
    "body",
    [
        # Attention as runtimes fuse it: the scalar stands behind the scores.
        "z = MatMul (q, k)\n j = Div (z, half)\n y = Softmax (j)",
        # GELU: what the scalar multiplies is read twice.
        "z = Div (q, half)\n j = Erf (z)\n l = Mul (q, j)\n n = Mul (l, half)\ny = MatMul (n, k)",
        # The table of keys is the weight of something else.
        (
            "z = Mul (k, half)\n j = MatMul (x, v)\n l = ReduceSum (j)\n n = MatMul (q, z)\n"
            "y = Add (n, l)"
        ),
    ],
)
def test_a_scalar_that_stays(body: str) -> None:
    assert not run(attention(body), RULE).applied


def test_scalars_go_into_a_part_of_a_weight() -> None:
    """One Gemm makes queries and keys, and each is picked by itself."""
    source = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2] x) => (float[N,N] y)
    <float[2,4] w = {1, 2, 3, 4, 5, 6, 7, 8}, float[4] b = {1, 2, 3, 4}, float half = {0.5},
     int64[3] to = {-1, 2, 2}, int64 first = {0}, int64[1] second = {1}>
    {
       c = Gemm (x, w, b)
       d = Reshape (c, to)
       q = Gather <axis = 1> (d, first)
       e = Gather <axis = 1> (d, second)
       k = Squeeze (e, second)
       z = Mul (half, q)
       t = Transpose <perm = [1, 0]> (k)
       y = MatMul (z, t)
    }
    """
    done = run(source, RULE)
    assert "Mul" not in [n.op_type for n in done.stored.proto.graph.node]
    weight = {t.name: done.stored.array(t) for t in done.stored.proto.graph.initializer}
    assert weight["z_weight"].tolist() == [[0.5, 1.0, 3.0, 4.0], [2.5, 3.0, 7.0, 8.0]]
    assert_parity(source, done.stored.complete())


def test_a_bias_that_an_instance_norm_ignores_goes() -> None:
    before = graph("c = Conv (x, w, b)\n y = InstanceNormalization (c, g, h)")
    after = graph("c = Conv (x, w)\n y = InstanceNormalization (c, g, h)")
    done = assert_rewrites(before, after, RULE)
    assert [(r.site, r.into) for r in done.applied] == [("fold-affine:c", "InstanceNormalization")]
    rows = "c = Transpose <perm = [0,2,3,1]> (x)\n d = MatMul (c, v)\n e = Add (d, tr)\n"
    tokens = graph(
        rows + "f = Transpose <perm = [0,3,1,2]> (e)\n y = InstanceNormalization (f, g, h)"
    )
    assert left(tokens) == ["Transpose", "MatMul", "Transpose", "InstanceNormalization"]
    seen = graph("c = Conv (x, w, b)\n d = InstanceNormalization (c, g, h)\n y = Add (c, d)")
    assert not run(seen, RULE).applied


# ** any network **


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float16]))
def test_any_network_computes_the_same(seed: int, dtype: type) -> None:
    model = network(seed, dtype)
    done = run(model, *RULES)
    assert done.nodes[1] <= done.nodes[0]
    if done.applied:
        assert_sound(model, done, *RULES)
        assert_exact(model, seed)


def assert_exact(given: onnx.ModelProto, seed: int) -> None:
    """Assert that folding changes nothing over the reals: in float64 only its roundings are left.

    A fold rounds each constant once and gives every sum another order. A value of n operations
    then moves by at most a few n ulp of the largest value on its way; 2^-30 of the scale of the
    output is past that for these networks of some dozen operators, and far below any wrong factor,
    the smallest of which is off by 2^-7.
    """
    model = in_float64(given)
    done = run(model, *RULES)
    x = np.random.default_rng(seed).normal(size=dims(model))
    with Evaluator(storage.from_proto(model)) as first, Evaluator(done.stored) as second:
        before, after = (truth.run({"x": x}) for truth in (first, second))
    assert list(before) == list(after)
    for name in before:
        one, other = np.asarray(before[name]), np.asarray(after[name])
        scale = max(1.0, float(np.abs(one).max(initial=0.0)))
        assert float(np.abs(one - other).max(initial=0.0)) <= 2.0**-30 * scale


NARROW = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


def in_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every number as it is, in double precision."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.data_type in NARROW:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in (*copy.graph.input, *copy.graph.output):
        if value.type.tensor_type.elem_type in NARROW:
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return copy


def dims(model: onnx.ModelProto) -> list[int]:
    """The shape of the input, with a batch of one."""
    return [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]


def evaluate(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    """What a model computes in its own precision."""
    found = ReferenceEvaluator(model).run(None, {"x": x})
    return [np.asarray(value) for value in found]


def test_networks_agree_in_bfloat16() -> None:
    """In the reference evaluator, which has it: as parity judges, against the truth in float64."""
    applied = 0
    for seed in range(60):
        model = network(seed, ml_dtypes.bfloat16, tokens=True)
        done = run(model, *RULES)
        x = np.random.default_rng(seed).normal(size=dims(model)).astype(ml_dtypes.bfloat16)
        before = evaluate(model, x)
        after = evaluate(done.stored.complete(), x)
        truth = evaluate(in_float64(model), x.astype(np.float64))
        applied += len(done.applied)
        for old, new, exact in zip(before, after, truth, strict=True):
            errors = [np.abs(v.astype(np.float64) - exact).max(initial=0.0) for v in (old, new)]
            scale = float(np.abs(exact).max(initial=0.0))
            assert errors[1] <= 2 * errors[0] + 4 * 2.0**-8 * scale, (seed, errors, scale)
    assert applied > 20


@pytest.mark.parametrize("seed", range(40))
def test_networks_agree_in_onnxruntime(seed: int) -> None:
    dtype = np.float16 if seed % 4 == 3 else np.float32
    model = network(seed, dtype)
    done = run(model, *RULES)
    assert_parity(model, done.stored.complete(), seed=seed)


# ** mutants: each wrong rule must be caught by some network **

MUTANTS = {
    "a bend passed by a negative factor": (
        moves,
        "if row.positive and not affine",
        "if False and not affine",
    ),
    "a bend passed by a shift": (moves, "if affine.shifts and (why", "if False and (why"),
    "the sign of a shift": (moves, "row.sign * found.shift", "found.shift"),
    "blocks taken for repeats": (
        moves,
        "np.tile(channels, block) if first",
        "np.repeat(channels, block) if first",
    ),
    "a part that is not neutral": (moves, "(shape, way.neutral)", "(shape, 1 - way.neutral)"),
    "padding counted": (
        moves,
        'if pads(node) and node.attrs.get("count_include_pad", 0)',
        "if False",
    ),
    "the sign of a subtrahend": (flow_back, "signs[index] * affine.shift", "affine.shift"),
    "a shift on both sides": (
        flow_back,
        "dict.fromkeys(range(len(signs)), Affine.of(affine.scale))",
        "dict.fromkeys(range(len(signs)), affine)",
    ),
    "other readers": (
        flow_back,
        "told = f\"'{value.name}' is also read",
        "continue\n            told = f\"'{value.name}' is also read",
    ),
    "a shift of a factor": (flow_back, "shift = affine.shift / factor", "shift = affine.shift"),
    "the start of a branch": (flow_back, "np.arange(start, stop)", "np.arange(stop - start)"),
    "scaled once of two": (
        flow_forth,
        "if not all(np.array_equal(scale, other)",
        "if False and not all(np.array_equal(scale, other)",
    ),
    "a constant not divided": (flow_forth, "slim(taken / scale))", "slim(taken))"),
    "the shift lost in a weight": (
        flow_forth,
        "made = _times(spread, weight)",
        "made = 0.0 * _times(spread, weight)",
    ),
    "the gain of Gemm": (flow_forth, "made = slim(gain * made)", "made = slim(made)"),
    "the border": (flow_forth, "(reads >= 0) & (reads < size)", "(reads >= 0)"),
    "a shift padded with zeros": (flow_forth, "if _pads(node, weight.shape[2:]):", "if False:"),
    "groups of inputs": (
        port,
        "np.arange(rows) // (rows // groups)",
        "np.arange(rows) % groups",
    ),
    "the mean of a batch norm": (
        flow_forth,
        "(own - 1.0) * mean.float64()",
        "own * mean.float64()",
    ),
    "a held shift of what is scaled": (
        flow_forth,
        "slim(made.shift / made.scale)",
        "made.shift * 2",
    ),
    "parts of a Concat": (
        flow_forth,
        "whole[starts[at] : starts[at + 1]]",
        "whole[: starts[at + 1] - starts[at]]",
    ),
}


# What networks that are drawn seldom have.
ORACLES = (
    graph("c = Conv (x, w4)\n d = Transpose <perm = [2,0,3,1]> (c)\n y = Mul (d, z4)", "A,B,C,D"),
    graph("c = Conv (x, w4)\n d = DepthToSpace <blocksize = 2> (c)\n y = Mul (d, p)", "A,B,C,D"),
    graph("c = Conv (x, w8)\n d = DepthToSpace <blocksize = 2> (c)\n y = Mul (d, s)", "A,B,C,D"),
    graph(
        "c = Conv (x, w)\n d = AveragePool <kernel_shape = [3,3], pads = [1,1,1,1],"
        " count_include_pad = 1> (c)\n y = Add (d, t)",
        "A,B,C,D",
    ),
    graph("r = Sigmoid (x)\n a = Mul (r, s)\n e = Mul (a, a)\n d = Add (a, e)\n y = Conv (d, w)"),
)


def networks_agree() -> bool:
    """Whether folding is exact on many networks."""
    return all(_agrees(case) for case in (*ORACLES, *range(150)))


def _agrees(case: int | str) -> bool:
    if isinstance(case, str):
        return computes_the_same(case, *RULES, crashes=(RuntimeError, ValueError))
    try:
        assert_exact(network(case), case)
    except (AssertionError, OnnxNormError, RuntimeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new = MUTANTS[name]
    names = mutated(source, old, new)
    if source is moves:
        names["Halt"] = moves.Halt
        for module in (flow_back, flow_forth):
            monkeypatch.setattr(module, "moved", names["moved"])
    elif source is flow_back:
        monkeypatch.setattr(fold_affine, "flow_back", names["flow_back"])
    elif source is port:
        monkeypatch.setattr(flow_forth, "spread_along", names["spread_along"])
    else:
        monkeypatch.setattr(fold_affine, "flow_forth", names["flow_forth"])
        monkeypatch.setattr(flow_back, "unseen", names["unseen"])
    assert not networks_agree()


def test_the_unchanged_rules_agree() -> None:
    assert networks_agree()
