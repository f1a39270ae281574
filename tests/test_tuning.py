"""Forms of norms chosen by measurement, and chosen again from a file; by a clock of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest

from onnxnorm import api, tuning, workbench
from onnxnorm.errors import UsageError
from onnxnorm.lowering import KEEP
from onnxnorm.report import Report
from tests.test_analysis import TWO, saved
from tests.test_slower import Clock, operators

CHAIN: Final = "the chain that onnxruntime fuses to LayerNormalization"
OPERATOR: Final = "LayerNormalization"
# Two layer norms of one kind over the last axis, and one over another size; x is read through Relu.
THREE: Final = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[n,4,8] x) => (float[n,4,8] y, float[n,4,2] z)
<float eps = {1e-5},
 float[8,2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}>
{
   r = Relu (x)
   m1 = ReduceMean <axes = [-1]> (r)  d1 = Sub (r, m1)  p1 = Mul (d1, d1)
   v1 = ReduceMean <axes = [-1]> (p1)  a1 = Add (v1, eps)  s1 = Sqrt (a1)  n1 = Div (d1, s1)
   t = Tanh (n1)
   m2 = ReduceMean <axes = [-1]> (t)  d2 = Sub (t, m2)  p2 = Mul (d2, d2)
   v2 = ReduceMean <axes = [-1]> (p2)  a2 = Add (v2, eps)  s2 = Sqrt (a2)  n2 = Div (d2, s2)
   y = Neg (n2)
   q = MatMul (n2, w)  u = Sigmoid (q)
   m3 = ReduceMean <axes = [-1]> (u)  d3 = Sub (u, m3)  p3 = Mul (d3, d3)
   v3 = ReduceMean <axes = [-1]> (p3)  a3 = Add (v3, eps)  s3 = Sqrt (a3)  z = Div (d3, s3)
}
"""
GIVEN: Final[dict[str, Any]] = {"provider": "cpu", "time_budget": 4.0, "latency": False}


class Shapes(Clock):
    """A clock that also keeps the inputs' shapes."""

    def __init__(self, costs: dict[str, float]) -> None:
        super().__init__(costs)
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, *given: Any, values: Any = None, **named: Any) -> dict[str, Any]:
        self.shapes += [value.shape for value in values.values()]
        return super().__call__(*given, **named)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], None]:
    """Put a clock in place of the measurement."""
    return lambda clock: monkeypatch.setattr(
        workbench.Workbench, "time", lambda *a, **k: clock(*a, **k)
    )


def choices(report: Report) -> dict[str, str]:
    found: dict[str, str] = dict(report.options["choices"])
    return found


def test_the_fastest_form_is_taken_and_equal_norms_are_measured_once(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Shapes({"LayerNormalization": 40.0})
    timed(clock)
    path = saved(tmp_path, THREE)
    report = api.optimize(path, tmp_path / "out.onnx", tune=True, **GIVEN).report
    assert set(choices(report)) == {"n1", "n2", "z"}
    assert OPERATOR not in choices(report).values()
    assert OPERATOR not in operators(tmp_path / "out.onnx")
    assert report.parity is not None
    assert report.parity["passed"]
    # Each form beside the operator: two norms of one size, and one of another.
    others = len(clock.asked) // 2
    assert others >= 2
    assert clock.shapes[:others] != clock.shapes[others:]
    assert {shape[-1] for shape in clock.shapes} == {8, 2}
    assert all(first == [OPERATOR] for first, *_ in clock.asked)
    assert any(": 3; with the form of the table: 0." in note for note in report.notes)
    assert any(note.startswith("n1 is written as ") for note in report.notes)


def test_without_a_clear_gain_the_form_of_the_table_stays(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Shapes({"LayerNormalization": 0.5}))
    path = saved(tmp_path, THREE)
    report = api.optimize(path, tmp_path / "out.onnx", tune=True, **GIVEN).report
    assert set(choices(report).values()) == {OPERATOR}
    plain = api.optimize(path, tmp_path / "plain.onnx", **GIVEN).report
    assert plain.options["choices"] is None
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "plain.onnx").read_bytes()


def test_choices_make_the_same_model_again_without_measuring(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Shapes({"LayerNormalization": 40.0})
    timed(clock)
    path = saved(tmp_path, THREE)
    report = api.optimize(path, tmp_path / "out.onnx", tune=True, **GIVEN).report
    report.write(tmp_path / "report.json")
    bare = tmp_path / "choices.json"
    bare.write_text(json.dumps(choices(report)), encoding="utf-8")
    clock.asked.clear()
    for given in (tmp_path / "report.json", bare, choices(report)):
        again = api.optimize(path, tmp_path / "again.onnx", choices=given, **GIVEN).report
        assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
        assert choices(again) == choices(report)
    assert not clock.asked


def test_each_norm_can_have_a_form_of_its_own(tmp_path: Path) -> None:
    path = saved(tmp_path, THREE)
    wanted = {"n1": CHAIN, "n2": KEEP, "z": OPERATOR}
    report = api.optimize(path, tmp_path / "out.onnx", choices=wanted, **GIVEN).report
    rows = {row["output"]: row for row in report.norms}
    assert {name: rows[name]["into"] for name in ("n1", "z")} == {"n1": CHAIN, "z": OPERATOR}
    (site,) = (site for site in report.sites if site["site"] == "lower-norms:n2")
    assert (site["action"], site["reason"]) == ("kept", "the choices keep its own nodes")


def test_a_choice_for_a_place_without_a_norm_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path, THREE)
    report = api.optimize(
        path, tmp_path / "out.onnx", choices={"nowhere": OPERATOR}, **GIVEN
    ).report
    assert any("name nowhere, where lower-norms has met no norm" in w for w in report.warnings)


def test_the_values_are_those_that_reach_the_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def time(_: Any, one: Path, other: Path, *, values: Any, **__: Any) -> dict[str, Any]:
        for file in (one, other):
            (given,) = onnx.load(file).graph.input
            assert given.name in values
        seen.append(values)
        return {"verdict": "no measurable difference", "ratio": 1.0, "interval": [0.9, 1.1]}

    monkeypatch.setattr(workbench.Workbench, "time", time)
    api.optimize(saved(tmp_path, THREE), tmp_path / "out.onnx", tune=True, **GIVEN)
    (first, *_) = [v["r"] for v in seen if "r" in v]
    assert first.dtype == np.float32
    assert first.min() == 0.0  # it comes out of a Relu
    assert first.max() > 0.0


def test_a_norm_behind_a_fold_is_found_where_the_fold_leaves_it(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Shapes({"LayerNormalization": 40.0}))
    report = api.optimize(saved(tmp_path, TWO), tmp_path / "out.onnx", tune=True, **GIVEN).report
    assert set(choices(report)) == {"y"}
    assert "BatchNormalization" not in operators(tmp_path / "out.onnx")
    assert OPERATOR not in operators(tmp_path / "out.onnx")


def test_axes_that_are_inputs_tell_norms_apart(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    one = """
       m{0} = ReduceMean (x, k{0})  d{0} = Sub (x, m{0})  p{0} = Mul (d{0}, d{0})
       v{0} = ReduceMean (p{0}, k{0})  a{0} = Add (v{0}, eps)  s{0} = Sqrt (a{0})
       n{0} = Div (d{0}, s{0})
    """
    text = f"""
    <ir_version: 8, opset_import: ["" : 18]>
    main (float[2,4,4,8] x) => (float[2,4,4,8] n1, float[2,4,4,8] n2, float[2,4,4,8] n3)
    <float eps = {{1e-5}}, int64[1] k1 = {{1}}, int64[1] k2 = {{2}}, int64[1] k3 = {{2}}>
    {{ {one.format(1)} {one.format(2)} {one.format(3)} }}
    """
    clock = Shapes({"LayerNormalization": 40.0})
    timed(clock)
    report = api.optimize(saved(tmp_path, text), None, tune=True, parity=False, **GIVEN).report
    assert set(choices(report)) == {"n1", "n2", "n3"}
    assert set(choices(report).values()) == {KEEP}
    assert len(clock.asked) == 2


NORM: Final = """
   m{0} = ReduceMean <axes = [-1]> ({1})  d{0} = Sub ({1}, m{0})  p{0} = Mul (d{0}, d{0})
   v{0} = ReduceMean <axes = [-1]> (p{0})  a{0} = Add (v{0}, e{0})  s{0} = Sqrt (a{0})
   n{0} = Div (d{0}, s{0})
"""
EPS: Final = "e{0} = Constant <value = float {{1e-5}}> ()"
# A layer norm in each branch of an If that takes the first, in a Loop of three turns, in a Scan,
# and in a function that is called with two sizes.
INNER: Final = f"""
<ir_version: 8, opset_import: ["" : 17, "f" : 1]>
main (float[2,8] x, float[3,8] w)
  => (float[2,8] y, float[2,8] l, float[2,8] c, float[2,8] g, float[3,8] h)
<bool yes = {{1}}, int64 three = {{3}}>
{{
   r = Relu (x)
   y = If (yes) <
     then_branch = a () => (float[2,8] n1) {{ {EPS.format(1)} {NORM.format(1, "r")} }},
     else_branch = b () => (float[2,8] n2) {{
       u = Neg (r) {EPS.format(2)} {NORM.format(2, "u")} }}>
   l = Loop (three, yes, r) <
     body = body (int64 i, bool c, float[2,8] k) => (bool go, float[2,8] n3) {{
       go = Identity (c) {EPS.format(3)} {NORM.format(3, "k")} }}>
   c = Scan <num_scan_inputs = 1, body = rows (float[8] t) => (float[8] n4) {{
       {EPS.format(4)} {NORM.format(4, "t")} }}> (r)
   g = f.norm (x)
   h = f.norm (w)
}}
<domain: "f", opset_import: ["" : 17]>
norm (x) => (n5) {{ {EPS.format(5)} {NORM.format(5, "x")} }}
"""
PLACES: Final[dict[str, set[tuple[int, ...]]]] = {
    "y/then_branch/n1": {(2, 8)},
    "y/else_branch/n2": {(2, 8)},
    "l/body/n3": {(2, 8)},
    "c/body/n4": {(8,)},
    "f.norm/n5": {(2, 8), (3, 8)},
}


class Sized(Shapes):
    """A clock for which a form can cost more for some rows."""

    def __init__(self, costs: dict[str, float], slow: int) -> None:
        super().__init__(costs)
        self.slow = slow

    def __call__(self, *given: Any, values: Any = None, **named: Any) -> dict[str, Any]:
        told = super().__call__(*given, values=values, **named)
        slow = any(v.shape[0] == self.slow for v in values.values())
        return {**told, "verdict": "slower", "ratio": 2.0} if slow else told


def test_norms_of_bodies_and_functions_have_choices_too(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    clock = Shapes({"LayerNormalization": 40.0})
    timed(clock)
    path = saved(tmp_path, INNER)
    report = api.optimize(path, tmp_path / "out.onnx", tune=True, **GIVEN).report
    assert set(choices(report)) == set(PLACES)
    assert OPERATOR not in choices(report).values()
    assert set(clock.shapes) == set().union(*PLACES.values())
    assert report.parity is not None
    assert report.parity["passed"]
    (told,) = (n for n in report.notes if n.startswith("Norms that nothing reaches"))
    assert "y/else_branch/n2; they were measured with random numbers" in told
    assert any(n.startswith("f.norm/n5 is written as ") and "2 shapes" in n for n in report.notes)
    clock.asked.clear()
    api.optimize(path, tmp_path / "again.onnx", choices=choices(report), **GIVEN)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()
    assert not clock.asked


def test_one_size_of_a_function_that_gets_slower_keeps_its_form(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Sized({"LayerNormalization": 40.0}, slow=3))
    path = saved(tmp_path, INNER)
    report = api.optimize(path, tmp_path / "out.onnx", tune=True, **GIVEN).report
    found = choices(report)
    assert found.pop("f.norm/n5") == OPERATOR
    assert OPERATOR not in found.values()


def test_what_a_body_reads_is_what_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def time(_: Any, one: Path, other: Path, *, values: Any, **__: Any) -> dict[str, Any]:
        for file in (one, other):  # both run by themselves on it
            onnx.checker.check_model(onnx.load(file), full_check=True)
        seen.update(values)
        return {"verdict": "no measurable difference", "ratio": 1.0, "interval": [0.9, 1.1]}

    monkeypatch.setattr(workbench.Workbench, "time", time)
    api.optimize(saved(tmp_path, INNER), tmp_path / "out.onnx", tune=True, **GIVEN)
    # The norm of the Loop is that of the then-branch, and is not measured again.
    assert {name: (v.dtype, v.shape) for name, v in seen.items()} == {
        "r": (np.float32, (2, 8)),
        "t": (np.float32, (8,)),
        "x": (np.float32, (3, 8)),
    }
    assert seen["r"].min() == 0.0  # it comes out of a Relu
    np.testing.assert_array_equal(seen["t"], seen["r"][0])


def test_inputs_that_take_the_other_branch_are_looked_for(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Shapes({"LayerNormalization": 40.0}))
    text = INNER.replace(
        "y = If (yes)", "w1 = ReduceMax <keepdims = 0> (w) o = Less (w1, one) y = If (o)"
    )
    text = text.replace("bool yes = {1}", "bool yes = {1}, float one = {1}")
    report = api.optimize(saved(tmp_path, text), None, tune=True, parity=False, **GIVEN).report
    assert set(choices(report)) == set(PLACES)
    assert not any(note.startswith("Norms that") for note in report.notes)


def test_a_norm_of_unknown_size_that_nothing_reaches_is_not_measured(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Shapes({}))
    path = saved(tmp_path, INNER.replace("[2,8]", "[n,8]"))
    report = api.optimize(path, None, tune=True, parity=False, **GIVEN).report
    assert set(choices(report)) == set(PLACES) - {"y/else_branch/n2"}
    (told,) = (n for n in report.notes if n.startswith("Norms that --tune did not measure"))
    assert "y/else_branch/n2; with these inputs nothing reached it" in told


def test_no_time_to_see_what_reaches_a_body_is_told(
    tmp_path: Path, timed: Callable[[Clock], None]
) -> None:
    timed(Shapes({}))
    given = {**GIVEN, "time_budget": 1e-9, "parity": False}
    report = api.optimize(saved(tmp_path, INNER), None, tune=True, **given).report
    assert choices(report) == {}
    assert any("the time budget ended before values reached it" in n for n in report.notes)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"tune": True, "dry_run": True}, "dry run"),
        ({"tune": True, "choices": {}}, "both --tune and --choices"),
        ({"tune": True, "passes": "fold-batchnorm"}, "without the pass lower-norms"),
        ({"choices": {}, "passes": "none"}, "without the pass lower-norms"),
        ({"choices": "absent.json"}, "cannot be read as choices"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, given: dict[str, Any], why: str) -> None:
    path = saved(tmp_path, THREE)
    with pytest.raises(UsageError, match=why):
        api.optimize(path, None, **given)


@pytest.mark.parametrize(
    "text", ["[]", '{"n1": 3}', '{"schema": 1, "options": {}}', '{"schema": 1}', "{", '"n1"']
)
def test_a_file_without_choices_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="choices"):
        tuning.read_choices(tmp_path / "c.json")
