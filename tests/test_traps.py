"""Traps of folding: places that look as if a map could go, or that others get wrong.

Each test is one trap of the project's list; those that other modules hold:

| trap | where |
|---|---|
| 1 to 7, 9, 33: streams | `test_trap_*` in `tests/passes/test_stream_fold_mean.py` |
| 15 training_mode=1, in every opset | `test_refuses_statistics_of_the_batch` (fold-batchnorm) |
| 17 gamma = 0 in a gauge | `tests/passes/test_stream_fold_affine.py` |
| 18 a weight that loses its digits | `test_refuses_weights_that_would_lose_their_digits` (same) |
| 19, 20, 23, 24: near misses | `tests/test_recognition.py`, `tests/test_moments.py` |
| 21, 25: RepBN with alpha b, PowerNorm | `tests/test_fixed_statistics.py` |
| 26, 27: softmax | `tests/ops/test_softmax.py`, `tests/test_exponentials.py` |
| 34 a scale of lower rank on CUDA | `tests/test_runtime_fusions.py`, `tools/gpu_check.py` |
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper, parser

from onnxnorm import staging, storage
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.pipeline import Pipeline, Run
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, assert_sound, run

RULES: tuple[Pass, ...] = (FoldBatchnorm(), FoldAffine())
CONSTANTS = """
 float[2,2,3,3] w3 = {1, -2, 3, 1, 2, -1, 0, 1, 2, 1, 2, 3, -1, 2, 1, 0, 1, 2,
 2, 1, -3, 1, 2, 1, 0, -1, 2, 1, -2, 3, 1, 2, 1, 0, 1, 4}, float[2,2,1,1] w = {1, 2, 3, 4},
 float[2,1,1,1] u = {0.5, -4}, float[2] b = {1, -2}, float[2] g = {2, 3}, float[2] h = {0.5, 1},
 float[2] m = {1, -1}, float[2] q = {4, 9}, float[2] n = {-2, 3}, float[2] zero = {0, 0},
 float[2] o = {0, 3}, float[2,1,1] s = {2, 4}, float[2,1,1] t = {0.5, -1}, float one = {1},
 int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}
"""


def source(body: str, y: str = "A,B,C,D", opset: int = 17) -> str:
    """A graph with all constants; those that nobody reads do no harm."""
    body = body.replace("BN (", "BatchNormalization <epsilon = 0.25> (")
    return (
        f'<ir_version: 8, opset_import: ["" : {opset}]> main (float[N,2,5,6] x) =>'
        f" (float[{y}] y) <{CONSTANTS}> {{ {body} }}"
    )


def folded(model: str | onnx.ModelProto) -> tuple[list[str], list[str]]:
    """The operators that are left, in a model that computes the same, and what was refused."""
    done = run(model, *RULES)
    assert_sound(model, done, *RULES)
    if done.applied:
        assert_parity(model, done.stored.complete())
    return operators(done), [r.reason for r in done.remarks if r.outcome == "refused"]


def operators(done: Run) -> list[str]:
    """The operators of the main graph."""
    return [n.op_type for n in done.stored.proto.graph.node]


def test_trap_8_shared_weights_behind_different_norms_are_copied() -> None:
    left, _ = folded(
        source("a = Conv (x, w) c = BN (a, g, h, m, q) e = Conv (c, w) y = BN (e, n, h, m, q)")
    )
    assert left == ["Conv", "Conv"]


def test_trap_10_a_norm_in_front_of_a_padded_convolution() -> None:
    left, why = folded(
        source("r = Relu (x) c = BN (r, g, h, m, q) y = Conv <pads = [1,1,1,1]> (c, w3)")
    )
    assert left == ["Relu", "BatchNormalization", "Conv"]
    assert "an Add behind it would save nothing" in why[0]


@pytest.mark.parametrize(
    "attributes",
    ["pads = [1,0,0,0]", "pads = [0,0,0,2]", 'auto_pad = "SAME_UPPER"', 'auto_pad = "SAME_LOWER"'],
)
def test_trap_11_padding_on_one_side_or_computed(attributes: str) -> None:
    """A scale goes; the shift stays in front, or goes behind with the border taken out of it."""
    body = "r = Relu (x) k = Mul (r, s) c = Add (k, t) y = Conv <{}> (c, w3)"
    left, _ = folded(source(body.format(attributes)))
    assert sorted(left) == ["Add", "Conv", "Relu"]
    kernel = body.replace("w3", "w").format('auto_pad = "SAME_UPPER"')  # of one pixel: none padded
    assert folded(source(kernel))[0] == ["Relu", "Conv"]


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_trap_12_grouped_weights_have_their_groups_on_another_axis(op: str) -> None:
    left, _ = folded(source(f"a = {op} <group = 2> (x, u, b) c = Neg (a) y = BN (c, n, h, m, q)"))
    assert left == [op, "Neg"]
    left, _ = folded(source(f"r = Relu (x) k = Mul (r, s) y = {op} <group = 2> (k, u)"))
    assert left == ["Relu", op]


@pytest.mark.parametrize("reader", ["z = Relu (a) y = Add (c, z)", "y = Concat <axis = 1> (a, c)"])
def test_trap_13_a_convolution_that_something_else_reads(reader: str) -> None:
    left, why = folded(source(f"a = Conv (x, w) c = BN (a, g, h, m, q) {reader}"))
    assert left[:2] == ["Conv", "BatchNormalization"]
    assert "'a' is also read by node" in why[0]


def test_trap_14_statistics_that_are_computed() -> None:
    body = (
        "a = Conv (x, w) e = ReduceMean <axes = [0,2,3], keepdims = 0> (a) y = BN (a, g, h, e, q)"
    )
    left, why = folded(source(body))
    assert left == ["Conv", "ReduceMean", "BatchNormalization"]
    assert any("mean 'e' is not constant" in w for w in why)


@pytest.mark.parametrize("op", ["Relu (a)", "LeakyRelu (a)", "MaxPool <kernel_shape = [2,2]> (a)"])
def test_trap_16_a_negative_factor_behind_what_is_not_linear(op: str) -> None:
    for norm in ("k = Mul (r, negative) y = Add (k, t)", "y = BN (r, n, zero, zero, q)"):
        model = source(f"a = Conv (x, w) r = {op} {norm}")
        left, why = folded(model.replace("float one", "float[2,1,1] negative = {-2, 4}, float one"))
        assert left[1] == op.split()[0]
        assert set(left[2:]) & {"Mul", "BatchNormalization"}
        assert "passes only factors that are positive" in why[0]


def test_trap_17_a_factor_of_zero_folds_into_a_weight_and_is_never_divided_by() -> None:
    assert folded(source("a = Conv (x, w) y = BN (a, o, h, m, q)"))[0] == ["Conv"]
    # In front of padding the shift would be divided by it.
    body = 'r = Relu (x) k = Mul (r, z) c = Add (k, t) y = Conv <auto_pad = "SAME_UPPER"> (c, w3)'
    model = source(body).replace("float one", "float[2,1,1] z = {0, 4}, float one")
    assert folded(model)[0] == ["Relu", "Mul", "Add", "Conv"]


def test_trap_18_no_variance() -> None:
    left, _ = folded(source("a = Conv (x, w) c = Neg (a) y = BN (c, g, h, m, zero)"))
    assert left == ["Conv", "Neg"]  # epsilon alone is under the root
    flat = source("a = Conv (x, w) c = Neg (a) y = BN (c, g, h, m, zero)").replace("0.25", "0.0")
    _, why = folded(flat)
    assert "is not finite" in why[0]


def test_trap_18_float16_overflows() -> None:
    model = parser.parse_model(source("a = Conv (x, w) c = Neg (a) y = BN (c, g, h, m, q)"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = values * (8000 if tensor.name in ("w", "g") else 1)
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    done = run(model, *RULES)
    assert not done.applied
    assert any("not finite in float16" in r.reason for r in done.remarks)


def test_trap_28_weights_of_a_hypernetwork() -> None:
    body = "p = Sigmoid (w) a = Conv (x, p) c = Neg (a) y = BN (c, g, h, m, q)"
    left, why = folded(source(body))
    assert left == ["Sigmoid", "Conv", "Neg", "BatchNormalization"]
    assert "its weight is not constant" in why[0]


def test_trap_29_a_mask_stands_between() -> None:
    body = "a = Conv (x, w) z = Sigmoid (x) c = Mul (a, z) y = BN (c, g, h, m, q)"
    _, why = folded(source(body))
    assert "takes no shift" in why[0]


def test_trap_30_a_weight_that_a_body_captures_is_copied() -> None:
    model = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, float[N,2,5,6] x) => (float[N,2,5,6] y)
    <float[2,2,1,1] w = {1, 2, 3, 4}, float[2,1,1] s = {2, 4}>
    {
       a = Conv (x, w)
       c = Neg (a)
       k = Mul (c, s)
       z = If (flag) <
         then_branch = then () => (float[N,2,5,6] p) { p = Conv (x, w) },
         else_branch = other () => (float[N,2,5,6] r) { r = Identity (x) }
       >
       y = Add (k, z)
    }
    """
    assert folded(model)[0] == ["Conv", "Neg", "If", "Add"]
    inside = model.replace("p = Conv (x, w)", "p = Mul (c, s)")
    _, why = folded(inside)
    assert any("outside the body" in w or "also read by" in w for w in why)


def test_trap_31_external_weights(tmp_path: Path) -> None:
    model = parser.parse_model(source("a = Conv (x, w) c = Neg (a) y = BN (c, g, h, m, q)"))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    done = Pipeline(RULES).run(storage.load(path))
    assert operators(done) == ["Conv", "Neg"]
    out = tmp_path / "out.onnx"
    staging.save(done.stored, out)
    assert_parity(model, onnx.load(out))


def test_trap_32_quantization_stands_between() -> None:
    body = (
        "a = Conv (x, w) i = QuantizeLinear (a, one, zp) c = DequantizeLinear (i, one, zp)"
        " y = BN (c, g, h, m, q)"
    )
    model = source(body).replace("float one", "uint8 zp = {128}, float one")
    left, why = folded(model)
    assert left == ["Conv", "QuantizeLinear", "DequantizeLinear", "BatchNormalization"]
    assert "DequantizeLinear 'c' makes it" in why[0]


def test_trap_35_a_channel_size_that_the_graph_computes() -> None:
    """The target is put together from Shape; where channels go is known all the same."""
    body = (
        "a = Conv (x, w) e = Shape (a) f = Slice (e, i0, i2) j = Concat <axis = 0> (f, i1)"
        " c = Reshape (a, j) d = Transpose <perm = [0,2,1]> (c) k = Mul (d, g) y = Add (k, h)"
    )
    more = "int64[1] i0 = {0}, int64[1] i2 = {2}, int64[1] i1 = {-1}, float one"
    model = source(body, "A,B,C").replace("float one", more)
    assert "Mul" not in folded(model)[0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_trap_37_a_batch_of_any_size(count: int) -> None:
    model = source("a = Conv (x, w) r = MaxPool <kernel_shape = [2,2]> (a) y = BN (r, g, h, m, q)")
    done = run(model, *RULES)
    assert operators(done) == ["Conv", "MaxPool"]
    assert_parity(model, done.stored.complete(), shapes={"x": (count, 2, 5, 6)})


def test_trap_38_one_channel() -> None:
    model = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,1,5,6] x) => (float[N,1,5,6] y)
    <float[1,1,1,1] w = {2}, float[1] g = {3}, float[1] h = {0.5}, float[1] m = {1},
     float[1] q = {4}>
    { a = Conv (x, w) c = Neg (a) y = BatchNormalization (c, g, h, m, q) }
    """
    assert folded(model)[0] == ["Conv", "Neg"]


@pytest.mark.parametrize(
    ("counts", "left"),
    [(0, ["Conv", "AveragePool"]), (1, ["Conv", "AveragePool", "BatchNormalization"])],
)
def test_trap_39_a_pool_that_counts_its_padding(counts: int, left: list[str]) -> None:
    pool = f"AveragePool <kernel_shape = [3,3], pads = [1,1,1,1], count_include_pad = {counts}>"
    found, _ = folded(source(f"a = Conv (x, w) c = {pool} (a) y = BN (c, g, h, m, q)"))
    assert found == left


def test_trap_40_a_pad_with_another_constant_than_zero() -> None:
    body = "r = Relu (x) k = Mul (r, s) c = Add (k, t) e = Pad (c, pads, one) y = Conv (e, w3)"
    left, why = folded(source(body))
    assert left == ["Relu", "Mul", "Add", "Pad", "Conv"]
    assert "pads every channel with one number" in why[0]
    # One map for all channels maps the constant too.
    even = source(body).replace("s = {2, 4}", "s = {2, 2}").replace("t = {0.5, -1}", "t = {1, 1}")
    assert folded(even)[0] == ["Relu", "Pad", "Conv"]


def test_the_list_above_names_what_exists() -> None:
    root = Path(__file__).parent
    for name in ("test_moments", "test_recognition", "test_exponentials", "test_runtime_fusions"):
        assert (root / f"{name}.py").exists()
    batchnorm = (root / "passes" / "test_fold_batchnorm.py").read_text()
    for test in ("test_refuses_statistics_of_the_batch", "test_refuses_weights_that_would_lose"):
        assert f"def {test}" in batchnorm
