"""Matching: what fits, what does not, and the reason that is given."""

from __future__ import annotations

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.matcher import Match, Mismatch, match
from onnxnorm.module import Module
from onnxnorm.pattern import Op, const, maybe, one_of, op, var

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x, float[2] u) => (float[2] y)
<float[2] scale = {1.0, 2.0}, float[2] shift = {3.0, 4.0}>
{
   m = Mul (scale, x)
   y = Add (m, shift)
}
"""
AFFINE = op("Add", op("Mul", var("x"), const("scale")), const("shift"), name="add")


def found(pattern: Op, source: str = MODEL, root: str = "y") -> Match | Mismatch:
    facts = Facts(Module(storage.from_proto(parser.parse_model(source))))
    (node,) = (n for n in facts.module.nodes() if any(v.name == root for v in n.outputs))
    return match(pattern, node, facts)


def test_binds_values_and_nodes_with_commutative_inputs_in_either_order() -> None:
    m = found(AFFINE)
    assert isinstance(m, Match)
    assert m.value("x").name == "x"
    assert m.array("scale").tolist() == [1.0, 2.0]
    assert m.node("mul").op == "Mul"


@pytest.mark.parametrize("first", ["m, shift", "shift, m"])
@pytest.mark.parametrize("second", ["scale, x", "x, scale"])
def test_every_order_of_a_commutative_chain(first: str, second: str) -> None:
    source = MODEL.replace("(m, shift)", f"({first})").replace("(scale, x)", f"({second})")
    m = found(AFFINE, source)
    assert isinstance(m, Match)
    assert m.value("shift").name == "shift"


def test_subtraction_is_not_commutative() -> None:
    source = MODEL.replace("Add (m, shift)", "Sub (shift, m)")
    assert isinstance(
        found(op("Sub", op("Mul", var("x"), const("s")), const("t")), source), Mismatch
    )


@pytest.mark.parametrize(
    ("old", "new", "reason", "structural"),
    [
        ("Mul (scale, x)", "Div (scale, x)", "it follows Div 'm', not Mul", True),
        ("Mul (scale, x)", "Mul (u, x)", "'x' is not constant: it is a graph input", False),
        (
            "=> (float[2] y)",
            "=> (float[2] y, float[2] m)",
            "its result 'm' is a graph output",
            False,
        ),
        ("y = Add", "z = Neg (m)\n y = Add", "'m' is also read by node 'z' (Neg)", False),
        ("Add (m, shift)", "Add (m, u)", "is not constant: it is a graph input", False),
        ("Add (m, shift)", "Add (x, shift)", "it follows 'x', which no node computes", True),
    ],
)
def test_reasons(old: str, new: str, reason: str, structural: bool) -> None:
    failed = found(AFFINE, MODEL.replace(old, new))
    assert isinstance(failed, Mismatch)
    assert reason in failed.reason
    assert failed.structural is structural


def test_a_value_that_a_body_reads_escapes() -> None:
    source = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[2] x, bool flag) => (float[2] y, float[2] z)
    <float[2] scale = {1.0, 2.0}, float[2] shift = {3.0, 4.0}>
    {
       m = Mul (scale, x)
       y = Add (m, shift)
       z = If (flag) <
         then_branch = a () => (float[2] p) { p = Neg (m) },
         else_branch = b () => (float[2] q) { q = Neg (x) }
       >
    }
    """
    failed = found(AFFINE, source)
    assert isinstance(failed, Mismatch)
    assert "'m' is also read by node 'p' (Neg)" in failed.reason


def test_nodes_of_other_domains_and_of_other_scopes_do_not_match() -> None:
    source = MODEL.replace('"" : 17', '"" : 17, "other" : 1').replace("= Mul", "= other.Mul")
    failed = found(AFFINE, source)
    assert isinstance(failed, Mismatch)
    assert failed.reason == "it follows other.Mul 'm', not Mul"
    source = MODEL.replace("(float[2] x,", "(bool flag, float[2] x,").replace(
        "y = Add (m, shift)",
        """y = If (flag) <then_branch = a () => (float[2] p) { p = Add (m, shift) },
                          else_branch = b () => (float[2] q) { q = Neg (x) }>""",
    )
    failed = found(AFFINE, source, "p")
    assert isinstance(failed, Mismatch)
    assert failed.reason == "it follows Mul 'm', which is outside the body y/then_branch/"
    assert not failed.structural


def test_a_repeated_name_is_one_value() -> None:
    square = op("Mul", var("x"), var("x"))
    assert isinstance(found(square, MODEL.replace("(scale, x)", "(x, x)"), "m"), Match)
    failed = found(square, root="m")
    assert isinstance(failed, Mismatch)
    assert "wanted one value as x, found two" in failed.reason


def test_optional_inputs_absent_empty_and_present() -> None:
    pattern = op("Clip", var("x"), maybe(const("low")), maybe(const("high")))
    for inputs, low, high in [
        ("x", False, False),
        ("x, scale", True, False),
        ("x, , scale", False, True),
        ("x, shift, scale", True, True),
    ]:
        m = found(pattern, MODEL.replace("Add (m, shift)", f"Clip ({inputs})"))
        assert isinstance(m, Match), inputs
        assert (m.has("low"), m.has("high")) == (low, high)
        assert m.float64("low", default=7.0).tolist() == (
            [3.0, 4.0] if low and high else [1.0, 2.0] if low else 7.0
        )


def test_further_inputs_do_not_match() -> None:
    failed = found(op("Clip", var("x")), MODEL.replace("Add (m, shift)", "Clip (x, scale)"))
    assert isinstance(failed, Mismatch)
    assert "further input 'scale'" in failed.reason


def test_alternatives_take_the_first_that_fits_and_explain_the_deepest() -> None:
    either = op(
        "Add", one_of(op("Div", var("x"), const("s")), op("Mul", var("x"), const("s"))), const("t")
    )
    m = found(either)
    assert isinstance(m, Match)
    assert set(m.nodes) == {"add", "mul"}
    neither = op(
        "Add",
        one_of(op("Div", var("x"), const("s")), op("Mul", const("r"), const("s"))),
        const("t"),
    )
    failed = found(neither)
    assert isinstance(failed, Mismatch)
    assert failed.reason.endswith("is not constant: it is a graph input")


def test_patterns_print_as_algebra() -> None:
    assert str(AFFINE) == "Add(Mul(x, scale), shift)"
    assert str(op(("Conv", "ConvTranspose"), var("x"), const("w"), maybe(const("b")))) == (
        "Conv|ConvTranspose(x, w, b?)"
    )
    assert str(one_of(var("a"), const("b"))) == "a | b"
