"""Which operator decided an integer output, and how far the trace goes."""

from __future__ import annotations

import pytest
from onnx import TensorProto, parser

from onnxnorm.decisions import trace

HEAD = '<ir_version: 9, opset_import: ["" : 17]> g (float[N,4] x, int64[2] k) => (int64[N] y) '
TYPES = {"x": (TensorProto.FLOAT, None), "e": (TensorProto.FLOAT, None)}


@pytest.mark.parametrize(
    ("body", "decided_by", "reals"),
    [
        ("y = ArgMax <axis: int = 1, keepdims: int = 0> (x)", "ArgMax", ("x",)),
        (
            "i = ArgMax <axis: int = 1> (x)  s = Squeeze (i)  y = Cast <to: int = 6> (s)",
            "ArgMax",
            ("x",),
        ),
        ("v, y = TopK (x, k)", "TopK", ("x",)),
        ("e = Exp (x)  y = Less (e, x)", "Less", ("e", "x")),
        ("y = Cast <to: int = 7> (x)", "Cast", ("x",)),
        ("e = Floor (x)  y = Cast <to: int = 7> (e)", "Cast", ("x",)),
        ("b = Greater (x, x)  y = NonZero (b)", "NonZero", ()),
    ],
)  # fmt: skip
def test_a_decision_is_found_through_operators_that_move(
    body: str, decided_by: str, reals: tuple[str, ...]
) -> None:
    found = trace(parser.parse_model(HEAD + "{" + body + "}"), "y", TYPES)
    assert found is not None
    assert found.node.op_type == decided_by
    assert found.reals == reals


@pytest.mark.parametrize(
    "body",
    [
        "y = Add (k, k)",
        "i = ArgMax <axis: int = 1, keepdims: int = 0> (x)  y = Mul (i, i)",
        "y = ArgMax <axis: int = 0> (k)",
        "y = NonZero (k)",
        "y = Identity (k)",
    ],
)
def test_what_is_not_decided_on_reals_has_no_decision(body: str) -> None:
    assert trace(parser.parse_model(HEAD + "{" + body + "}"), "y", TYPES) is None
