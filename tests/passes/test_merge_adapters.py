"""Static low-rank adapters go into the weights they adapt. Dyadic constants, exact goldens."""

from __future__ import annotations

import pytest
from onnx import parser

from onnxnorm.passes import merge_adapters
from onnxnorm.passes.merge_adapters import MergeAdapters
from onnxnorm.testing import assert_refuses, assert_rewrites, run
from tests.mutants import computes_the_same, mutated

RULE = MergeAdapters()
WEIGHTS = (
    "float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2,1] a = {1.0, 2.0}, float[1,2] b = {0.5, -1.0},"
    " float[2] k = {1.0, 2.0}, float c = {2.0}"
)
LORA = "u = MatMul (x, w)\n p = MatMul (x, a)\n q = MatMul (p, b)\n s = Mul (q, c)"
SUM = f"{LORA}\n z = Add (u, s)\n y = Relu (z)"
MERGED = "float[2,2] u_weight = {2.0, 0.0, 5.0, 0.0}"  # w + 2 a b


def graph(body: str, weights: str = WEIGHTS, outputs: str = "") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,3,2] x) => (float[N,3,2] y{outputs})
    <{weights}>
    {{
       {body}
    }}
    """


@pytest.mark.parametrize(
    ("body", "after", "weights"),
    [
        (f"{LORA}\n z = Add (u, s)\n y = Relu (z)", "u = MatMul (x, u_weight)\n y = Relu (u)", ""),
        (
            f"{LORA}\n v = Add (u, k)\n z = Add (s, v)\n y = Relu (z)",
            "u = MatMul (x, u_weight)\n v = Add (u, k)\n y = Relu (v)",
            "float[2] k = {1.0, 2.0}, ",
        ),
        (
            f"{LORA.replace('s = Mul (q, c)', 's = Div (q, h)')}\n z = Add (u, s)\n y = Relu (z)",
            "u = MatMul (x, u_weight)\n y = Relu (u)",
            "",
        ),
    ],
)
def test_an_adapter(body: str, after: str, weights: str) -> None:
    before = graph(body, f"{WEIGHTS}, float h = {{0.5}}")
    unused = before.replace(", float h = {0.5}", "") if "h)" not in body else before
    assert_rewrites(unused, _stripped(graph(after, f"{weights}{MERGED}"), before, body), RULE)


def _stripped(after: str, before: str, body: str) -> str:
    """The weights that nobody reads, before or after, stay where they are."""
    names = {"k": "float[2] k = {1.0, 2.0}", "c": "float c = {2.0}"}
    extra = [text for name, text in names.items() if f"{name})" not in body]
    return after.replace("    <float", f"    <{''.join(e + ', ' for e in extra)}float")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (graph(f"{LORA}\n y = Add (u, s)"), "'y' is a graph output"),
        (
            graph(SUM, WEIGHTS.replace("c = {2.0}", "c = {3e38}").replace("{0.5, -1", "{50.0, -1")),
            "the merged weight is not finite",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, reason: str) -> None:
    assert_refuses(text, RULE, reason)


@pytest.mark.parametrize(
    "body",
    [
        SUM.replace(
            "q = MatMul (p", "r = Relu (p)\n q = MatMul (r"
        ),  # something between that is not linear
        f"{LORA}\n z = Add (u, s)\n y = Mul (z, q)",  # the adapter is read elsewhere
        SUM.replace("p = MatMul (x", "t = Abs (x)\n p = MatMul (t"),  # of another value
        f"{LORA}\n z = Sub (u, s)\n y = Relu (z)",
    ],
)
def test_what_is_no_adapter(body: str) -> None:
    assert not run(graph(body), RULE).remarks


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.weight.float64() + self.scale * product", "self.weight.float64() + product"),
        ("factors.insert(0, factor_matrix)", "factors.append(factor_matrix)"),
        ("scale *= factor", "scale /= factor"),
    ],
)
def test_a_wrong_weight_would_be_seen(old: str, new: str) -> None:
    broken = mutated(merge_adapters, old, new)["MergeAdapters"]()
    square = WEIGHTS.replace("float[2,1] a = {1.0, 2.0}", "float[2,2] a = {1.0, 2.0, 3.0, 4.0}")
    square = square.replace("float[1,2] b = {0.5, -1.0}", "float[2,2] b = {0.5, -1.0, 2.0, 1.0}")
    model = parser.parse_model(graph(SUM, square))  # factors that can be multiplied in any order
    assert run(model, RULE).applied
    assert run(model, broken).applied
    assert computes_the_same(model, RULE)
    assert not computes_the_same(model, broken)
