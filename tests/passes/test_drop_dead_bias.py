"""Biases that an instance norm takes out again."""

from __future__ import annotations

import pytest

from onnxnorm.passes.drop_dead_bias import DropDeadBias
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run

RULE = DropDeadBias()
WEIGHTS = (
    "float[2,1,1,1] w = {1.0, 2.0}, float[2] b = {0.5, 1.0}, float[2] g = {2.0, 3.0},"
    " float[2] h = {0.5, 1.0}"
)


def graph(body: str, weights: str = WEIGHTS, outputs: str = "float[N,2,4,4] y") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,1,4,4] x) => ({outputs})
    <{weights}>
    {{
       {body}
    }}
    """


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_the_bias_goes(kind: str) -> None:
    weights = WEIGHTS.replace("[2,1,1,1] w", "[1,2,1,1] w") if kind != "Conv" else WEIGHTS
    before = graph(f"c = {kind} (x, w, b)\n y = InstanceNormalization (c, g, h)", weights)
    after = graph(
        f"c = {kind} (x, w)\n y = InstanceNormalization (c, g, h)",
        weights.replace(" float[2] b = {0.5, 1.0},", ""),
    )
    done = assert_rewrites(before, after, RULE)
    assert [(r.site, r.region.outputs) for r in done.applied if r.region] == [
        ("drop-dead-bias:c", ("y",))
    ]


def test_in_front_of_one_that_was_written_out() -> None:
    body = (
        "c = Conv (x, w, b)\n m = ReduceMean <axes = [2, 3]> (c)\n d = Sub (c, m)"
        "\n q = Mul (d, d)\n v = ReduceMean <axes = [2, 3]> (q)\n e = Add (v, eps)"
        "\n r = Sqrt (e)\n y = Div (d, r)"
    )
    text = graph(body, f"{WEIGHTS}, float eps = {{0.001}}")
    done = run(text, RULE)
    assert len(done.applied) == 1
    assert_sound(text, done, RULE)
    assert_parity(run(text).stored.complete(), done.stored.complete())


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (
            "c = Conv (x, w, b)\n n = InstanceNormalization (c, g, h)\n y = Add (c, n)",
            "float[N,2,4,4] y",
            "'c' is also read by node 'y' (Add)",
        ),
        (
            "c = Conv (x, w, b)\n y = InstanceNormalization (c, g, h)",
            "float[N,2,4,4] y, float[N,2,4,4] c",
            "'c' is a graph output",
        ),
    ],
)
def test_one_that_is_read_elsewhere_stays(body: str, outputs: str, reason: str) -> None:
    assert_refuses(graph(body, outputs=outputs), RULE, reason)


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv (x, w)\n y = InstanceNormalization (c, g, h)",
        "c = Conv (x, w, b)\n y = BatchNormalization (c, g, h, h, g)",
        "c = Conv (x, w, b)\n y = LayerNormalization <axis = 1> (c, l)",
        "c = Conv (x, w, b)\n r = Relu (c)\n y = InstanceNormalization (r, g, h)",
    ],
)
def test_other_norms_do_not_ignore_it(body: str) -> None:
    weights = WEIGHTS + ", float[2,4,4] l = {" + ", ".join(["1.5"] * 32) + "}"
    assert not run(graph(body, weights), RULE).applied
