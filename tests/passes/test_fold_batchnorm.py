"""Fold BatchNormalization into Conv and ConvTranspose. Dyadic constants make goldens exact."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper, parser

from onnxnorm import change as change_module
from onnxnorm import norm_operators, pipeline, storage
from onnxnorm import port as port_module
from onnxnorm.passes import fold_batchnorm
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated

BEFORE = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,1,2,2] x) => (float[N,2,2,2] y)
<float[2,1,1,1] w = {2.0, 4.0}, float[2] gamma = {1.0, 3.0}, float[2] beta = {2.0, 0.5},
 float[2] mean = {1.0, 0.0}, float[2] variance = {4.0, 9.0}>
{
   c = Conv (x, w)
   y = BatchNormalization <epsilon: float = 0.0> (c, gamma, beta, mean, variance)
}
"""
AFTER = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,1,2,2] x) => (float[N,2,2,2] y)
<float[2] y_bias = {1.5, 0.5}, float[2,1,1,1] y_weight = {1.0, 4.0}>
{
   y = Conv (x, y_weight, y_bias)
}
"""


def test_scales_the_weight_and_shifts_the_bias() -> None:
    done = assert_rewrites(BEFORE, AFTER, FoldBatchnorm())
    assert [r.site for r in done.applied] == ["fold-batchnorm:y"]
    assert done.nodes == (2, 1)


def test_scales_an_existing_bias() -> None:
    before = BEFORE.replace(
        "variance = {4.0, 9.0}", "variance = {4.0, 9.0}, float[2] b = {5.0, 7.0}"
    )
    before = before.replace("Conv (x, w)", "Conv (x, w, b)")
    # (b - mean) * s + beta with s = (0.5, 1)
    assert_rewrites(before, AFTER.replace("{1.5, 0.5}", "{4.0, 7.5}"), FoldBatchnorm())


def test_the_default_epsilon_is_the_schemas() -> None:
    before = BEFORE.replace(" <epsilon: float = 0.0>", "")
    done = run(before, FoldBatchnorm())
    weight = {
        t.name: storage.Stored.array(done.stored, t) for t in done.stored.proto.graph.initializer
    }
    scale = np.array([1.0, 3.0]) / np.sqrt(np.array([4.0, 9.0]) + 1e-5)
    expected = (np.array([2.0, 4.0]) * scale).astype(np.float32)
    np.testing.assert_array_equal(weight["y_weight"].reshape(-1), expected)


def test_a_grouped_transposed_convolution_has_its_output_channels_on_axis_one() -> None:
    before = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,3] x) => (float[N,4,3] y)
    <float[2,2,1] w = {1.0, 2.0, 3.0, 4.0}, float[4] gamma = {1.0, 2.0, 4.0, 8.0},
     float[4] beta = {1.0, 2.0, 3.0, 4.0}, float[4] mean = {0.0, 0.0, 1.0, 1.0},
     float[4] variance = {1.0, 1.0, 1.0, 4.0}>
    {
       c = ConvTranspose <group: int = 2> (x, w)
       y = BatchNormalization <epsilon: float = 0.0> (c, gamma, beta, mean, variance)
    }
    """
    after = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,3] x) => (float[N,4,3] y)
    <float[4] y_bias = {1.0, 2.0, -1.0, 0.0}, float[2,2,1] y_weight = {1.0, 4.0, 12.0, 16.0}>
    {
       y = ConvTranspose <group: int = 2> (x, y_weight, y_bias)
    }
    """
    assert_rewrites(before, after, FoldBatchnorm())


def test_a_shared_weight_is_copied_and_never_edited() -> None:
    before = BEFORE.replace("(float[N,2,2,2] y)", "(float[N,2,2,2] y, float[N,2,2,2] z)")
    before = before.replace("c = Conv (x, w)", "c = Conv (x, w)\n z = Conv (x, w)")
    after = AFTER.replace("(float[N,2,2,2] y)", "(float[N,2,2,2] y, float[N,2,2,2] z)")
    after = after.replace("<float[2] y_bias", "<float[2,1,1,1] w = {2.0, 4.0}, float[2] y_bias")
    after = after.replace("y = Conv", "z = Conv (x, w)\n y = Conv")
    assert_rewrites(before, after, FoldBatchnorm())


def test_a_weight_shared_through_identity_is_copied_for_each() -> None:
    before = BEFORE.replace("(float[N,2,2,2] y)", "(float[N,2,2,2] y, float[N,2,2,2] z)")
    before = before.replace("c = Conv (x, w)", "same = Identity (w)\n c = Conv (x, same)")
    before = before.replace(
        "variance)\n}",
        "variance)\n d = Conv (x, w)\n z = BatchNormalization (d, beta, gamma, mean, variance)\n}",
    )
    done = run(before, FoldBatchnorm())
    assert [r.site for r in done.applied] == ["fold-batchnorm:y", "fold-batchnorm:z"]
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Conv", "Conv"]
    assert_sound(before, done, FoldBatchnorm())
    assert_parity(before, done.stored.complete())


def test_a_chain_of_two_batchnorms_folds_to_one_convolution() -> None:
    before = BEFORE.replace("y = Batch", "m = Batch").replace(
        "variance)\n}",
        "variance)\n y = BatchNormalization <epsilon: float = 0.0>"
        " (m, gamma, beta, mean, variance)\n}",
    )
    done = run(before, FoldBatchnorm())
    assert [r.site for r in done.applied] == ["fold-batchnorm:m", "fold-batchnorm:y"]
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Conv"]
    assert_parity(before, done.stored.complete())


def test_a_chain_may_be_longer_than_the_rounds_of_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "ROUNDS", 2)
    chain = "".join(
        f"c{i + 1} = BatchNormalization (c{i}, gamma, beta, mean, variance)\n" for i in range(5)
    )
    before = BEFORE[: BEFORE.index("c = Conv")] + "c0 = Conv (x, w)\n" + chain + "y = Neg (c5)\n}"
    assert [n.op_type for n in run(before, FoldBatchnorm()).stored.proto.graph.node] == [
        "Conv",
        "Neg",
    ]


def test_folds_in_the_bodies_of_control_flow_and_keeps_same_names_apart() -> None:
    body = """
        c = Conv (x, w)
        y = BatchNormalization (c, gamma, beta, mean, variance)
    """
    swapped = body.replace("beta, mean", "mean, beta")
    before = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, float[N,1,2,2] x) => (float[N,2,2,2] out)
    <float[2,1,1,1] w = {{2.0, 4.0}}, float[2] gamma = {{1.0, 3.0}}, float[2] beta = {{2.0, 0.5}},
     float[2] mean = {{1.0, 0.0}}, float[2] variance = {{4.0, 9.0}}>
    {{
       out = If (flag) <
         then_branch = then () => (float[N,2,2,2] y) {{ {body} }},
         else_branch = other () => (float[N,2,2,2] y) {{ {swapped} }}
       >
    }}
    """
    done = run(before, FoldBatchnorm())
    assert [r.site for r in done.applied] == [
        "fold-batchnorm:out/then_branch/y",
        "fold-batchnorm:out/else_branch/y",
    ]
    assert_sound(before, done, FoldBatchnorm())
    assert_parity(before, done.stored.complete())


def test_folds_in_a_function_with_constant_nodes() -> None:
    before = """
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[N,1,2,2] x) => (float[N,1,2,2] y) { y = local.Block (x) }
    <domain: "local", opset_import: ["" : 17]>
    Block (x) => (y)
    {
       w = Constant <value = float[1,1,1,1] {2.0}> ()
       gamma = Constant <value_floats = [3.0]> ()
       beta = Constant <value_floats = [0.5]> ()
       variance = Constant <value_floats = [4.0]> ()
       c = Conv (x, w)
       y = BatchNormalization <epsilon: float = 0.0> (c, gamma, beta, beta, variance)
    }
    """
    done = run(before, FoldBatchnorm())
    assert [r.site for r in done.applied] == ["fold-batchnorm:local.Block/y"]
    (function,) = done.stored.proto.functions
    assert [n.op_type for n in function.node] == ["Constant", "Constant", "Conv"]
    assert_sound(before, done, FoldBatchnorm())
    assert_parity(before, done.stored.complete())


@pytest.mark.parametrize(
    ("of_conv", "of_batchnorm", "reason"),
    [
        ("", "epsilon: float = @p", "epsilon is a parameter of the function"),
        ("", "training_mode: int = @p", "training_mode is a parameter of the function"),
        ("<group: int = @p>", "epsilon = 0.5", "group is a parameter of the function"),
        ("<strides: ints = @p>", "momentum: float = @p", None),
    ],
)
def test_attributes_that_callers_give(of_conv: str, of_batchnorm: str, reason: str | None) -> None:
    before = f"""
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[N,1,2,2] x) => (float[N,1,2,2] y) {{ y = local.Block <p = 1> (x) }}
    <domain: "local", opset_import: ["" : 17]> Block <p> (x) => (y)
    {{
       a = Constant <value_floats = [3.0]> ()
       w = Constant <value = float[1,1,1,1] {{2.0}}> ()
       c = Conv {of_conv} (x, w)
       y = BatchNormalization <{of_batchnorm}> (c, a, a, a, a)
    }}
    """
    if reason is None:
        assert run(before, FoldBatchnorm()).applied
    else:
        assert_refuses(before, FoldBatchnorm(), reason)


def test_a_convolution_outside_a_loop_is_not_moved_into_it() -> None:
    before = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (int64 n, bool k, float[N,1,2,2] s, float[N,1,2,2] x) => (float[N,1,2,2] out)
    <float[1,1,1,1] w = {2.0}, float[1] a = {1.0}>
    {
       c = Conv (x, w)
       out = Loop (n, k, s) <body = b (int64 i, bool c1, float[N,1,2,2] s1)
         => (bool c2, float[N,1,2,2] s2)
       {
          c2 = Identity (c1)
          y = BatchNormalization (c, a, a, a, a)
          s2 = Add (s1, y)
       }>
    }
    """
    assert_refuses(before, FoldBatchnorm(), "follows Conv 'c', which is outside the body out/body/")


def test_models_before_ir_4_list_their_weights_as_inputs() -> None:
    model = parser.parse_model(
        BEFORE.replace("ir_version: 8", "ir_version: 3").replace(": 17", ": 8")
    )
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
        for t in model.graph.initializer
    )
    done = run(model, FoldBatchnorm())
    assert [i.name for i in done.stored.proto.graph.input] == ["x", "y_weight", "y_bias"]
    assert sorted(t.name for t in done.stored.proto.graph.initializer) == ["y_bias", "y_weight"]
    assert_sound(model, done, FoldBatchnorm())
    assert_parity(model, done.stored.complete())


TRAINING = "y, rm, rv = BatchNormalization <training_mode: int = 1, epsilon"


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "=> (float[N,2,2,2] y)",
            "=> (float[N,2,2,2] y, float[N,2,2,2] c)",
            "'c' is a graph output",
        ),
        ("y = Batch", "z = Relu (c)\n y = Batch", "'c' is also read by node 'z' (Relu)"),
        (
            "variance = {4.0, 9.0}",
            "variance = {4.0, 0.0}",
            "sqrt(variance + epsilon) is not finite",
        ),
        (
            "variance = {4.0, 9.0}",
            "variance = {4.0, -1.0}",
            "sqrt(variance + epsilon) is not finite",
        ),
        ("mean = {1.0, 0.0}", "mean = {inf, 0.0}", "beta - mean * gamma"),
        ("w = {2.0, 4.0}", "w = {3e38, 4.0}, float[2] big = {9.0, 1.0}", "not finite in float32"),
        ("beta = {2.0, 0.5}", "beta = {3e38, 0.0}, float[2] b = {3e38, 0.0}", "folded bias is not"),
        ("y = BatchNormalization <epsilon", TRAINING, "training_mode is set"),
        ("c = Conv (x, w)", "u = Neg (w)\n c = Conv (x, u)", "node 'u' (Neg) computes it"),
        (
            "y = BatchNormalization <epsilon: float = 0.0> (c, gamma",
            "g = Neg (gamma)\n y = BatchNormalization <epsilon: float = 0.0> (c, g",
            "gamma 'g' is not constant: node 'g' (Neg)",
        ),
        ("float[2] gamma = {1.0, 3.0}", "float[1] gamma = {1.0}", "gamma has shape [1] for 2"),
        (
            "Conv (x, w)",
            "MaxPool <kernel_shape = [1, 1]> (x)",
            "it follows MaxPool 'c', not Conv or",
        ),
    ],
)
def test_refuses(old: str, new: str, reason: str) -> None:
    before = BEFORE.replace(old, new)
    assert before != BEFORE
    if "float[2] b =" in new:
        before = before.replace("Conv (x, w)", "Conv (x, w, b)")
    if "big" in new:
        before = before.replace("(c, gamma", "(c, big")
    before = before.replace("inf", "1e999") if "inf" in new else before
    assert_refuses(_parsed(before), FoldBatchnorm(), reason)


def _parsed(source: str) -> onnx.ModelProto:
    """Parse, with infinity spelled 1e999, which the text form has no word for."""
    model = parser.parse_model(source.replace("1e999", "12345.0"))
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            for position, value in enumerate(tensor.float_data):
                if value == 12345.0:
                    tensor.float_data[position] = float("inf")
    return model


@pytest.mark.parametrize("name", ["w", "gamma", "beta", "mean", "variance"])
def test_refuses_parameters_that_callers_may_override(name: str) -> None:
    model = parser.parse_model(BEFORE)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    model.graph.input.append(
        helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
    )
    assert_refuses(model, FoldBatchnorm(), "callers may override")


@pytest.mark.parametrize(
    ("opset", "attributes", "outputs", "reason"),
    [
        (6, {"is_test": 0}, 1, "is_test is not set"),
        (6, {"is_test": 1, "spatial": 0}, 1, "spatial is 0"),
        (7, {"spatial": 0}, 1, "spatial is 0"),
        (9, {}, 5, "further outputs"),
        (9, {}, 3, "further outputs"),
        (14, {"training_mode": 1}, 1, "training_mode is set"),
    ],
)
def test_refuses_statistics_of_the_batch(
    opset: int, attributes: dict[str, int], outputs: int, reason: str
) -> None:
    model = parser.parse_model(BEFORE.replace(": 17", f": {opset}"))
    node = model.graph.node[1]
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    node.output.extend(f"extra_{i}" for i in range(1, outputs))
    assert_refuses(model, FoldBatchnorm(), reason)


def test_opset_6_folds_in_test_mode() -> None:
    model = parser.parse_model(BEFORE.replace(": 17", ": 6"))
    model.graph.node[1].attribute.append(helper.make_attribute("is_test", 1))
    assert len(run(model, FoldBatchnorm()).applied) == 1


@pytest.mark.parametrize(
    ("dtype", "gamma", "folds"),
    [(np.float16, 2.0**-11, False), (np.float16, 2.0**-10, True), (np.float32, 2.0**-11, True)],
)
def test_refuses_weights_that_would_lose_their_digits(
    dtype: Any, gamma: float, folds: bool
) -> None:
    # |s W| is gamma / 16 at most; the smallest normal number of float16 is 2^-14.
    before = BEFORE.replace("{2.0, 4.0}", "{0.03125, 0.0625}").replace("{4.0, 9.0}", "{1.0, 1.0}")
    model = parser.parse_model(before.replace("{1.0, 3.0}", f"{{{gamma}, {gamma}}}"))
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor).astype(dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    if folds:
        assert run(model, FoldBatchnorm()).applied
    else:
        assert_refuses(model, FoldBatchnorm(), "the folded weight is too small for float16")


def test_refuses_a_copy_that_is_too_large() -> None:
    before = BEFORE.replace("(float[N,2,2,2] y)", "(float[N,2,2,2] y, float[N,2,2,2] z)")
    before = before.replace("c = Conv (x, w)", "c = Conv (x, w)\n z = Conv (x, w)")
    assert_refuses(
        before, FoldBatchnorm(max_copy_mb=0), "'w' has other readers and a copy takes 0 MB"
    )
    alone = assert_rewrites(BEFORE, AFTER, FoldBatchnorm(max_copy_mb=0))
    assert alone.applied


def test_the_new_node_keeps_name_metadata_and_attributes_of_the_convolution() -> None:
    model = parser.parse_model(BEFORE.replace("Conv (x, w)", "Conv <pads = [0, 0, 0, 0]> (x, w)"))
    conv = model.graph.node[0]
    conv.name, conv.doc_string = "stem", "the first layer"
    entry = conv.metadata_props.add()
    entry.key, entry.value = "source", "model.py:12"
    (new,) = run(model, FoldBatchnorm()).stored.proto.graph.node
    assert (new.name, new.doc_string) == ("stem", "the first layer")
    assert list(new.attribute) == list(conv.attribute)
    assert {e.key: e.value for e in new.metadata_props} == {
        "source": "model.py:12",
        "onnxnorm.site": "fold-batchnorm:y",
    }


# ** properties **


@dataclass(frozen=True)
class Case:
    """A convolution with a BatchNormalization behind it."""

    op: str
    rank: int
    group: int
    per_group_in: int
    per_group_out: int
    bias: bool
    dtype: Any
    shared: bool
    seed: int

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(self.seed)
        channels_in = self.group * self.per_group_in
        channels_out = self.group * self.per_group_out
        kernel = (2,) * self.rank
        if self.op == "Conv":
            shape = (channels_out, self.per_group_in, *kernel)
        else:
            shape = (channels_in, self.per_group_out, *kernel)

        def tensor(name: str, array: Any) -> onnx.TensorProto:
            return numpy_helper.from_array(np.asarray(array).astype(self.dtype), name)

        weights = [
            tensor("w", rng.normal(size=shape)),
            tensor(
                "gamma", rng.uniform(0.5, 1.5, channels_out) * rng.choice([-1, 1], channels_out)
            ),
            tensor("beta", rng.normal(size=channels_out)),
            tensor("mean", rng.normal(size=channels_out)),
            tensor("variance", rng.uniform(0.5, 2.0, channels_out)),
        ]
        if self.bias:
            weights.append(tensor("b", rng.normal(size=channels_out)))
        elem = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        inputs = ["x", "w", "b"] if self.bias else ["x", "w"]
        nodes = [
            helper.make_node(self.op, inputs, ["c"], group=self.group),
            helper.make_node(
                "BatchNormalization",
                ["c", "gamma", "beta", "mean", "variance"],
                ["y"],
                epsilon=1e-3,
            ),
        ]
        outputs = [helper.make_tensor_value_info("y", elem, [None] * (self.rank + 2))]
        if self.shared:
            nodes.append(helper.make_node(self.op, ["x", "w"], ["z"], group=self.group))
            outputs.append(helper.make_tensor_value_info("z", elem, [None] * (self.rank + 2)))
        x = helper.make_tensor_value_info("x", elem, ["N", channels_in, *(4,) * self.rank])
        graph = helper.make_graph(nodes, "g", [x], outputs, weights)
        return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 22)])


def cases(*dtypes: Any) -> st.SearchStrategy[Case]:
    small = st.integers(1, 3)
    return st.builds(
        Case,
        op=st.sampled_from(["Conv", "ConvTranspose"]),
        rank=small,
        group=small,
        per_group_in=small,
        per_group_out=small,
        bias=st.booleans(),
        dtype=st.sampled_from(dtypes),
        shared=st.booleans(),
        seed=st.integers(0, 2**16),
    )


@settings(max_examples=40, deadline=None)
@given(cases(np.float32))
def test_folding_agrees_in_onnxruntime(case: Case) -> None:
    model = case.model()
    done = run(model, FoldBatchnorm())
    assert len(done.applied) == 1
    assert_sound(model, done, FoldBatchnorm())
    assert_parity(model, done.stored.complete(), seed=case.seed)


# Binary digits behind the point of each type's significand.
DIGITS = {
    np.dtype(np.float64): 52,
    np.dtype(np.float32): 23,
    np.dtype(np.float16): 10,
    np.dtype(ml_dtypes.bfloat16): 7,
}


def folded_parameters(case: Case) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """S * W and s * (b - mean) + beta in float64, by the definition of each output channel."""
    model = case.model()
    given = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in model.graph.initializer}
    epsilon = float(np.float32(1e-3))
    weight = given["w"].copy()
    bias = np.empty(case.group * case.per_group_out)
    for group in range(case.group):
        for j in range(case.per_group_out):
            channel = group * case.per_group_out + j
            s = given["gamma"][channel] / np.sqrt(given["variance"][channel] + epsilon)
            b = given["b"][channel] if case.bias else 0.0
            bias[channel] = s * (b - given["mean"][channel]) + given["beta"][channel]
            if case.op == "Conv":
                weight[channel] *= s
            else:
                rows = slice(group * case.per_group_in, (group + 1) * case.per_group_in)
                weight[rows, j] *= s
    return weight, bias


@settings(max_examples=60, deadline=None)
@given(cases(np.float16, np.float32, np.float64, ml_dtypes.bfloat16))
def test_parameters_are_rounded_once_from_float64(case: Case) -> None:
    done = run(case.model(), FoldBatchnorm())
    new = {t.name: done.stored.array(t) for t in done.stored.proto.graph.initializer}
    weight, bias = folded_parameters(case)
    assert new["y_weight"].dtype == new["y_bias"].dtype == np.dtype(case.dtype)
    # One rounding of the exact product: within half a unit in the last place, and a hair for the
    # float64 arithmetic in between.
    for got, exact in ((new["y_weight"], weight), (new["y_bias"], bias)):
        digits = DIGITS[np.dtype(case.dtype)]
        unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-4))) - digits)
        slack = 16 * np.finfo(np.float64).eps * (1 + np.abs(exact))
        assert (np.abs(got.astype(np.float64) - exact) <= 0.5 * unit + slack).all()


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_large_weights_are_scaled_in_blocks(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "_BLOCK", block)
    for op in ("Conv", "ConvTranspose"):
        case = Case(op, 2, 3, 2, 3, True, np.float32, False, 7)
        done = run(case.model(), FoldBatchnorm())
        new = {t.name: done.stored.array(t) for t in done.stored.proto.graph.initializer}
        weight, _ = folded_parameters(case)
        np.testing.assert_array_equal(new["y_weight"], weight.astype(np.float32))


# ** mutants: each wrong formula must be caught by the checks above **

MUTANTS = {
    "epsilon lost": (norm_operators, "np.sqrt(variance + epsilon)", "np.sqrt(variance)"),
    "default epsilon": (norm_operators, 'node.attrs.get("epsilon", DEFAULT_EPSILON)', "1e-5"),
    "root lost": (norm_operators, "gamma / np.sqrt(", "gamma / ("),
    "gamma lost": (norm_operators, "scale = gamma / np", "scale = 1.0 / np"),
    "sign of the mean": (norm_operators, "beta - mean * scale", "beta + mean * scale"),
    "mean not scaled": (norm_operators, "beta - mean * scale", "beta - mean"),
    "beta lost": (norm_operators, "beta - mean * scale", "-mean * scale"),
    "variance and mean swapped": (norm_operators, "np.sqrt(variance +", "np.sqrt(mean ** 2 +"),
    "bias not scaled": (change_module, "moved: Vector = array * scale", "moved: Vector = array"),
    "shift lost": (change_module, "moved if shift is None else moved + shift", "moved"),
    "order of the rows": (change_module, "else scale[rows]", "else scale[::-1][rows]"),
    "axis of the groups": (
        port_module,
        "factors.reshape(groups, -1)[group]",
        "factors.reshape(-1, groups).T[group]",
    ),
    "group of a row": (port_module, "// (rows // groups)", "% groups"),
    "output axis": (port_module, "int(transposed) - rank", "-rank"),
}


def parameters_agree(rule: Any) -> bool:
    """Whether a fold gives the parameters of the definition on a set of cases."""
    for op in ("Conv", "ConvTranspose"):
        for seed, group in enumerate((1, 2, 3)):
            case = Case(op, 2, group, 2, 3, True, np.float64, False, seed)
            try:
                done = run(case.model(), rule)
                new = {t.name: done.stored.array(t) for t in done.stored.proto.graph.initializer}
                weight, bias = folded_parameters(case)
                same = np.allclose(new["y_weight"], weight, rtol=1e-12, atol=1e-12)
                if not same or not np.allclose(new["y_bias"], bias, rtol=1e-12, atol=1e-12):
                    return False
            except Exception:
                return False
    return True


def test_the_unchanged_arithmetic_agrees() -> None:
    assert parameters_agree(FoldBatchnorm())


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, old, new = MUTANTS[name]
    names = mutated(source, old, new)
    if source is norm_operators:
        monkeypatch.setattr(fold_batchnorm, "batch_norm_affine", names["batch_norm_affine"])
    elif source is change_module:
        monkeypatch.setattr(fold_batchnorm, "absorbed", names["absorbed"])
    else:
        monkeypatch.setattr(fold_batchnorm, "slots", names["slots"])
    assert not parameters_agree(FoldBatchnorm())


def test_a_lost_training_mode_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parser.parse_model(
        re.sub(
            r"y = BatchNormalization <",
            "y, rm, rv = BatchNormalization <training_mode: int = 1, ",
            BEFORE,
        )
    )
    assert_refuses(model, FoldBatchnorm(), "training_mode is set")
    for module in (fold_batchnorm, norm_operators):
        monkeypatch.setattr(module, "training_reason", lambda node: None)
    assert run(model, FoldBatchnorm()).applied  # what the pass would do without asking


def test_the_default_epsilon_is_a_float() -> None:
    """The schema's 1e-5 is a float32, also in a float64 model."""
    model = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17]>
        main (double[1,1,2,2] x) => (double[1,1,2,2] y)
        <double[1,1,1,1] w = {1.0}, double[1] g = {1.0}, double[1] z = {0.0}>
        { a = Conv (x, w) y = BatchNormalization (a, g, z, z, z) }
        """
    )
    done = run(model, FoldBatchnorm())
    (weight,) = (t for t in done.stored.complete().graph.initializer if len(t.dims) == 4)
    assert onnx.numpy_helper.to_array(weight).item() == 1.0 / np.sqrt(np.float64(np.float32(1e-5)))
