"""What is constant in a modulation goes into its convolutions. Dyadic constants, exact goldens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxnorm.passes import fold_modulation
from onnxnorm.passes.fold_modulation import FoldModulation
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated

RULE = FoldModulation()
WEIGHTS = (
    "float[2,1,1,1] wg = {1.0, 2.0}, float[2,1,1,1] wb = {3.0, -1.0}, float[2] bg = {0.5, 1.0},"
    " float[2] bb = {0.25, 2.0}, float one = {1.0}"
)
NORM = (
    "float[2] g = {2.0, 3.0}, float[2] h = {0.5, 1.0}, float[2] m = {1.0, -1.0},"
    " float[2] v = {4.0, 9.0}"  # s = (1, 1), t = (-0.5, 2)
)
BN = "n = BatchNormalization <epsilon: float = 0.0> (x, g, h, m, v)"


def graph(body: str, weights: str = f"{WEIGHTS}, {NORM}") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,2,4,4] x, float[N,1,4,4] k) => (float[N,2,4,4] y)
    <{weights}>
    {{
       {body}
    }}
    """


SPADE = f"{BN}\n G = Conv (k, wg, bg)\n B = Conv (k, wb, bb)\n f = Add (G, one)"
SPADE += "\n p = Mul (n, f)\n y = Add (p, B)"


def test_the_norm_and_the_one_go() -> None:
    # b_G' = s (b_G + 1) = (1.5, 2); W_B' = W_B + t W_G = (2.5, 3); b_B' = b_B + t (1.5, 2)
    after = graph(
        "B = Conv (k, B_weight, B_bias)\n f = Conv (k, f_weight, f_bias_1)"
        "\n p = Mul (x, f)\n y = Add (p, B)",
        "float[2] B_bias = {-0.5, 6.0}, float[2,1,1,1] B_weight = {2.5, 3.0},"
        " float[2] f_bias_1 = {1.5, 2.0}, float[2,1,1,1] f_weight = {1.0, 2.0}",
    )
    done = assert_rewrites(graph(SPADE), after, RULE)
    assert [r.site for r in done.applied] == ["fold-modulation:f", "fold-modulation:n"]


def test_the_one_alone_before_a_norm_that_is_dynamic() -> None:
    body = "n = InstanceNormalization (x, g, h)\n G = Conv (k, wg, bg)\n B = Conv (k, wb, bb)"
    body += "\n f = Add (one, G)\n p = Mul (f, n)\n y = Add (B, p)"
    after = graph(
        "n = InstanceNormalization (x, g, h)\n B = Conv (k, wb, bb)\n f = Conv (k, wg, f_bias)"
        "\n p = Mul (f, n)\n y = Add (B, p)",
        "float[2] bb = {0.25, 2.0}, float[2] f_bias = {1.5, 2.0}, float[2] g = {2.0, 3.0},"
        " float[2] h = {0.5, 1.0}, float[2] m = {1.0, -1.0}, float[2] v = {4.0, 9.0},"
        " float[2,1,1,1] wb = {3.0, -1.0}, float[2,1,1,1] wg = {1.0, 2.0}",
    )
    assert_rewrites(graph(body), after, RULE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (SPADE.replace("B = Conv (k", "k2 = Neg (k)\n B = Conv (k2"), "do not read the same"),
        (
            SPADE.replace("B = Conv (k, wb, bb)", "B = Conv <group = 1> (k, wb, bb)"),
            "do not read the same",
        ),
        (SPADE.replace("y = Add (p, B)", "q = Relu (B)\n r = Add (p, B)\n y = Add (r, q)"),
         "'B' has other readers"),
    ],
)  # fmt: skip
def test_what_stays(body: str, reason: str) -> None:
    done = run(graph(body), RULE)
    assert [r.site for r in done.applied] == ["fold-modulation:f"]  # the 1 alone
    assert any(reason in r.reason for r in done.remarks), done.remarks


def test_a_weight_of_run_time_stays() -> None:
    body = SPADE.replace("Conv (k, wb, bb)", "Conv (k, wc, bb)")
    body = body.replace(BN, f"{BN}\n e = Exp (one)\n wc = Mul (wb, e)")
    done = run(graph(body), RULE)
    assert any("weight 'wc' is not constant" in r.reason for r in done.remarks)


def test_an_offset_that_varies_over_the_places_stays() -> None:
    weights = f"{WEIGHTS}, {NORM}, float[1,1,1,4] z = {{1.0, 2.0, 3.0, 4.0}}"
    text = graph(SPADE.replace("Add (G, one)", "Add (G, z)"), weights)
    assert not run(text, RULE).applied


def test_a_training_norm_stays() -> None:
    text = graph(SPADE.replace("<epsilon: float = 0.0>", "<training_mode: int = 1>").replace(
        "n = Batch", "n, rm, rv = Batch"))  # fmt: skip
    assert [r.site for r in run(text, RULE).applied] == ["fold-modulation:f"]


def test_an_overflow_is_refused() -> None:
    text = graph(SPADE.replace("Add (G, one)", "Identity (G)"), WEIGHTS.replace(
        "wg = {1.0, 2.0}", "wg = {1.0, 3e38}") + ", " + NORM.replace("g = {2.0, 3.0}",
        "g = {2.0, 300.0}"))  # fmt: skip
    text = text.replace("f = Identity (G)\n p = Mul (n, f)", "p = Mul (n, G)")
    assert_refuses(text, RULE, "a folded weight is not finite in float32")


@st.composite
def spades(draw: st.DrawFn) -> Any:
    """A SPADE layer: any padding, kernel, groups, with or without the 1 and the biases."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    groups = draw(st.sampled_from([1, 2]))
    hidden, channels, k = 2 * groups, 4, draw(st.sampled_from([1, 3]))
    pads = [draw(st.sampled_from([0, k // 2]))] * 4
    dtype = draw(st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16]))
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    given = {
        n: rng.uniform(-0.5, 0.5, (channels, hidden // groups, k, k)).astype(kind)
        for n in ("wg", "wb")
    }
    given |= {n: rng.uniform(0.5, 1.5, channels).astype(kind) for n in "gbmv"}
    names: dict[str, list[str]] = {"wg": ["wg"], "wb": ["wb"]}
    for name in names:
        if draw(st.booleans()):
            given[f"{name}b"] = rng.uniform(-1, 1, channels).astype(kind)
            names[name].append(f"{name}b")
    shape = draw(st.sampled_from([(), (1,), (channels, 1, 1), (1, channels, 1, 1)]))
    given["one"] = np.ones(shape, kind) if shape else np.asarray(1, kind)
    extent = 4 + 2 * pads[0] - k + 1
    nodes = [
        helper.make_node("BatchNormalization", ["x", *"gbmv"], ["n"], epsilon=1e-3),
        helper.make_node("Conv", ["k", *names["wg"]], ["G"], pads=pads, group=groups),
        helper.make_node("Conv", ["k", *names["wb"]], ["B"], pads=pads, group=groups),
        helper.make_node("Add", ["G", "one"], ["f"]),
        helper.make_node("Mul", ["n", "f"], ["p"]),
        helper.make_node("Add", ["p", "B"], ["y"]),
    ]
    sizes: list[Any] = ["n", channels, extent, extent]
    made = helper.make_graph(
        nodes,
        "spade",
        [
            helper.make_tensor_value_info("x", dtype, sizes),
            helper.make_tensor_value_info("k", dtype, ("n", hidden, 4, 4)),
        ],
        [helper.make_tensor_value_info("y", dtype, sizes)],
        [numpy_helper.from_array(v, name) for name, v in given.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(deadline=None, max_examples=15)
@given(spades())
def test_any_modulation_agrees(model: Any) -> None:
    done = run(model, RULE)
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Conv", "Conv", "Mul", "Add"]
    assert_sound(model, done, RULE)
    assert_parity(model, done.stored.complete())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("shift.reshape(wide) * weights[0], dtype)", "scale.reshape(wide) * weights[0], dtype)"),
        ("rounded(scale.reshape(wide)", "rounded(shift.reshape(wide)"),
        ("term.bias + shift * factor.bias", "term.bias + shift"),
        ("rounded(scale * factor.bias, dtype)", "rounded(factor.bias, dtype)"),
        ("rounded(known.bias + shift,", "rounded(known.bias * shift,"),
    ],
)
def test_a_wrong_constant_would_be_seen(old: str, new: str) -> None:
    broken = mutated(fold_modulation, old, new)["FoldModulation"]()
    constants = f"{WEIGHTS}, {NORM}".replace("g = {2.0, 3.0}", "g = {4.0, 3.0}")
    text = graph(SPADE, constants.replace("one = {1.0}", "one = {3.0}"))
    right, wrong = (run(text, rule).stored.complete() for rule in (RULE, broken))
    assert right.graph.initializer != wrong.graph.initializer
    with pytest.raises(AssertionError):
        assert_parity(run(text).stored.complete(), wrong)
