"""The canonical norms against formulas by hand, and the proof that catches a wrong record."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx import parser

from onnxnorm import reference, storage
from onnxnorm.errors import VerificationError
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms
from onnxnorm.reference import canonical, confirm

X: Final = np.random.default_rng(3).standard_normal((2, 6, 3, 4)) * 2 + 0.7
TEXT: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[{dims}] x) => (float[?,?,?] y)
<float two = {{2}}, float e = {{0.05}}, float[4] g = {{1, 2, 0.5, 3}},
 float[4] b = {{0.25, -0.5, 1, 0}}>
{{ {body} }}
"""
LAYER: Final = (
    "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Pow (d, two)"
    " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) q = Div (d, s)"
    " w = Mul (q, g) y = Add (w, b)"
)
RMS: Final = (
    "p = Pow (x, two) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
    " q = Div (x, s) y = Mul (q, g)"
)


def found(body: str = LAYER, dims: str = "N,T,4") -> tuple[Norm, Facts]:
    model = parser.parse_model(TEXT.format(body=body, dims=dims))
    facts = Facts(Module(storage.from_proto(model)))
    (norm,) = find_norms(facts)
    return norm, facts


def record(kind: str, **fields: Any) -> Norm:
    """A norm that is nowhere."""
    blank, _ = found()
    plain = replace(blank, kind=kind, gamma=None, beta=None, epsilon=0.1, axes=(3,))
    return replace(plain, **fields)


# ** formulas by hand **


def test_a_layer_norm() -> None:
    g, b = np.arange(1.0, 5.0), np.arange(4.0)
    got = canonical(record("layer_norm", gamma=g, beta=b), X)
    for i, j, k in np.ndindex(2, 6, 3):
        row = X[i, j, k]
        wanted = (row - row.mean()) / np.sqrt(row.var() + 0.1) * g + b
        assert_allclose(got[i, j, k], wanted)


@pytest.mark.parametrize("axes", [(1,), (-1, -2), (1, 2, 3)])
def test_a_layer_norm_over_other_axes(axes: tuple[int, ...]) -> None:
    got = canonical(record("layer_norm", axes=axes), X)
    assert_allclose(
        got, (X - X.mean(axes, keepdims=True)) / np.sqrt(X.var(axes, keepdims=True) + 0.1)
    )
    assert_allclose(got.mean(axes), 0, atol=1e-12)


def test_an_instance_norm() -> None:
    g = np.arange(1.0, 7.0).reshape(6, 1, 1)
    got = canonical(record("instance_norm", axes=(2, 3), gamma=g), X)
    for i, c in np.ndindex(2, 6):
        plane = X[i, c]
        assert_allclose(got[i, c], (plane - plane.mean()) / np.sqrt(plane.var() + 0.1) * (c + 1))


def test_a_group_norm() -> None:
    got = canonical(record("group_norm", axes=(1, 2, 3), groups=3), X)
    for i, group in np.ndindex(2, 3):
        block = X[i, 2 * group : 2 * group + 2]
        wanted = (block - block.mean()) / np.sqrt(block.var() + 0.1)
        assert_allclose(got[i, 2 * group : 2 * group + 2], wanted)


@pytest.mark.parametrize("kind", ["rms_norm", "filter_response_norm"])
def test_an_rms_norm(kind: str) -> None:
    got = canonical(record(kind), X)
    assert_allclose(got, X / np.sqrt((X**2).sum(3, keepdims=True) / 4 + 0.1))


@pytest.mark.parametrize(
    ("rule", "length"),
    [
        ("inside", lambda s: np.sqrt(s + 0.1)),
        ("outside", lambda s: np.sqrt(s) + 0.1),
        ("maximum", lambda s: np.maximum(np.sqrt(s), 0.1)),
        ("clamped", lambda s: np.sqrt(np.maximum(s, 0.1))),
    ],
)
def test_an_l2_norm_has_its_rule(rule: str, length: Any) -> None:
    x = X * np.where(np.arange(6) % 2, 1.0, 0.01).reshape(6, 1, 1)
    got = canonical(record("l2_norm", rule=rule), x)
    assert_allclose(got, x / length((x**2).sum(3, keepdims=True)))


def test_softmax_and_its_logarithm() -> None:
    soft = canonical(record("softmax", axes=(1,)), X)
    assert_allclose(soft.sum(1), 1)
    assert_allclose(soft, np.exp(X) / np.exp(X).sum(1, keepdims=True))
    assert_allclose(canonical(record("log_softmax", axes=(1,)), X), np.log(soft))
    large = canonical(record("softmax", axes=(3,)), X * 1e5)
    assert np.isfinite(large).all()


def test_what_has_no_canonical_form_here() -> None:
    with pytest.raises(NotImplementedError, match="evo_norm"):
        canonical(record("evo_norm"), X)
    norm, _ = found()
    with pytest.raises(NotImplementedError, match="at run time"):
        canonical(replace(norm, gamma=norm.input), np.ones((2, 3, 4)))


# ** the proof **

FALSE: Final[dict[str, dict[str, Any]]] = {
    "epsilon": {"epsilon": 0.06},
    "epsilon by a percent": {"epsilon": 0.0505},
    "no epsilon": {"epsilon": None},
    "axes": {"axes": (1,)},
    "more axes": {"axes": (1, 2)},
    "kind": {"kind": "rms_norm"},
    "order of gamma": {"gamma": np.array([2.0, 1.0, 0.5, 3.0])},
    "no gamma": {"gamma": None},
    "sign of beta": {"beta": -np.array([0.25, -0.5, 1.0, 0.0])},
    "no beta": {"beta": None},
    "shape": {"gamma": np.ones((2, 1, 1, 4))},
}


def reproducer(error: pytest.ExceptionInfo[VerificationError]) -> Path:
    said = re.search(r"files in (\S+?)\.?$", str(error.value))
    assert said, str(error.value)
    return Path(said[1])


@pytest.mark.parametrize("name", FALSE)
def test_a_false_record_is_found_out_with_a_reproducer(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.tempfile, "tempdir", str(tmp_path))
    norm, facts = found()
    assert confirm(norm, facts) is None
    with pytest.raises(VerificationError, match="'y' do not agree with the") as error:
        confirm(replace(norm, **FALSE[name]), facts)
    folder = reproducer(error)
    assert folder.parent == tmp_path
    nodes = onnx.load(folder / "nodes.onnx").graph.node
    assert [n.op_type for n in nodes] == [n.op for n in norm.nodes]
    assert np.load(folder / "input.npy").shape[-1] == 4


@pytest.mark.parametrize("rule", ["outside", "maximum", "clamped"])
def test_a_false_rule_is_found_out(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference.tempfile, "tempdir", str(tmp_path))
    body = (
        "p = Mul (x, x) v = ReduceSum <keepdims = 1> (p, l) a = Add (v, e) s = Sqrt (a)"
        " y = Div (x, s)"
    )
    model = parser.parse_model(
        TEXT.format(body=body, dims="N,T,4").replace("float two", "int64[1] l = {-1}, float two")
    )
    facts = Facts(Module(storage.from_proto(model)))
    (norm,) = find_norms(facts)
    assert (norm.kind, norm.rule) == ("l2_norm", "inside")
    assert confirm(norm, facts) is None
    with pytest.raises(VerificationError):
        confirm(replace(norm, rule=rule), facts)


@pytest.mark.parametrize("dims", ["2,3,4", "N,T,4", "N,N,4", "?,?,4"])
def test_unknown_sizes_are_filled_in(dims: str) -> None:
    norm, facts = found(dims=dims)
    assert confirm(norm, facts) is None


def test_sizes_may_be_expressions_of_others() -> None:
    model = parser.parse_model(TEXT.format(body=LAYER, dims="N,T,4"))
    shape = model.graph.input[0].type.tensor_type.shape
    shape.dim[0].dim_param, shape.dim[1].dim_param = "2*(B + 1)", "not an expression"
    facts = Facts(Module(storage.from_proto(model)))
    (norm,) = find_norms(facts)
    assert confirm(norm, facts) is None


def test_a_large_norm_is_tried_on_a_small_part() -> None:
    norm, facts = found(dims="4096,4096,4")
    assert confirm(norm, facts) is None


@pytest.mark.parametrize("body", [LAYER, RMS])
def test_every_seed_confirms(body: str) -> None:
    norm, facts = found(body)
    assert [confirm(norm, facts, seed=s) for s in range(5)] == [None] * 5


def test_what_cannot_be_run_gives_a_reason() -> None:
    norm, facts = found()
    runtime = replace(norm, gamma=norm.input)
    assert confirm(runtime, facts) == "its factors are computed at run time"
    elsewhere = replace(norm, nodes=norm.nodes[1:])  # without the mean nothing can be evaluated
    reason = confirm(elsewhere, facts)
    assert reason is None or "not" in reason
    unknown = replace(norm, input=norm.nodes[0].outputs[0])
    assert "it depends on 'x', which is not known here" in (confirm(unknown, facts) or "")


def test_an_operator_that_is_not_known_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, facts = found()
    known = {k: v for k, v in reference.float64.OPERATORS.items() if k[1] != "Sqrt"}
    monkeypatch.setattr(reference.float64, "OPERATORS", known)
    assert confirm(norm, facts) == "Sqrt cannot be evaluated here"


def test_an_input_that_is_too_large_gives_a_reason() -> None:
    norm, facts = found(dims="4096,4096,4")
    wide = replace(norm, groups=4)  # then every size counts
    assert "too large to try" in (confirm(wide, facts) or "")
