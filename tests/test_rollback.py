"""What a run changed, part by part, for models that are too large to be checked as a whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

import onnxnorm
from onnxnorm import rollback, storage
from onnxnorm.errors import VerificationError
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.pipeline import Pipeline
from onnxnorm.testing import run

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2,3,3] x) => (float[N,2,3,3] y)
<float[2,2,1,1] w = {1, 2, 3, 4}, float[2] g = {2, 3}, float[2] q = {4, 9},
 float[2,1,1] s = {2, 4}>
"""
NORM = "BatchNormalization ({}, g, g, g, q)"


@pytest.mark.parametrize(
    ("body", "regions"),
    [
        # Two maps in a row: the result of the first goes with the second, and both are one part.
        (f"c = Conv (x, w) n = {NORM.format('c')} k = Mul (n, s) y = Add (k, s)", [("x", "y")]),
        # Two that have nothing in common but a value that stays what it is.
        (
            (
                f"c = Conv (x, w) n = {NORM.format('c')} r = Relu (n) d = Conv (r, w)"
                f" y = {NORM.format('d')}"
            ),
            [("x", "n"), ("r", "y")],
        ),
        # The norm goes into what reads it, and the map in front of it into the norm before that.
        (
            f"r = Relu (x) k = Mul (r, s) n = {NORM.format('k')} y = Conv (n, w)",
            [("r", "y")],
        ),
    ],
)
def test_regions_that_share_a_value_that_changes_are_one(
    body: str, regions: list[tuple[str, str]]
) -> None:
    done = run(f"{HEAD} {{ {body} }}", FoldBatchnorm(), FoldAffine())
    found = rollback._parts(done)
    assert [(r.inputs, r.outputs) for r in found] == [((a,), (b,)) for a, b in regions]


CHAIN = f"""{HEAD} {{
    c0 = Conv (x, w) n0 = {NORM.format("c0")} c1 = Conv (n0, w) n1 = {NORM.format("c1")}
    c2 = Conv (n1, w) n2 = {NORM.format("c2")} c3 = Conv (n2, w) y = {NORM.format("c3")}
}}"""


class Judge:
    """A parity checker that knows what is wrong, and counts what it is asked."""

    def __init__(self, wrong: set[str], unproven: frozenset[str] = frozenset()) -> None:
        self.wrong, self.unproven = wrong, unproven
        self.checks = 0

    def check(self, candidate: Path, regions: tuple[Any, ...]) -> Any:
        self.checks += 1
        left = {n.output[0] for n in onnx.load(candidate).graph.node if "Batch" in n.op_type}
        folded = {"n0", "n1", "n2", "y"} - left
        late = tuple(r for r in regions if set(r.outputs) & self.unproven)
        passed = not folded & self.wrong and not late
        return SimpleNamespace(passed=passed, unproven=late, outputs=(), notes=("it is off",))


def proof(judge: Judge, budget: float) -> dict[str, str]:
    """What is taken back, and why."""
    source = storage.from_proto(onnx.parser.parse_model(CHAIN))
    pipeline = Pipeline([FoldBatchnorm()])
    bench: Any = SimpleNamespace(stored=source, budget=budget, checker=lambda: judge)
    with ExitStack() as keep:
        done = rollback.prove(bench, pipeline, source, pipeline.run(source), None, keep)
    return {r.site.rpartition(":")[2]: r.reason for r in done.taken_back}


def test_each_guilty_site_is_found_while_there_is_time() -> None:
    judge = Judge({"n1", "y"})
    taken = proof(judge, budget=1000.0)
    assert set(taken) == {"n1", "y"}
    assert taken["n1"] == "with it the outputs no longer agree: it is off"


def test_without_time_all_that_is_not_shown_to_agree_is_taken_back() -> None:
    judge = Judge({"n1", "y"})
    taken = proof(judge, budget=0.0)
    assert set(taken) == {"n0", "n1", "n2", "y"}
    assert judge.checks == 2, "the whole, and what is left of it"
    assert "or another of 4 sites the outputs no longer agree" in taken["n0"]
    assert "--time-budget gives more" in taken["n0"]


def test_sites_that_could_not_be_proven_are_taken_back() -> None:
    taken = proof(Judge(set(), frozenset({"n1"})), budget=1000.0)
    assert set(taken) == {"n1"}
    assert "could not be proven within the time budget" in taken["n1"]


def test_constants_that_the_graph_computes_are_no_ends_of_a_part() -> None:
    """In their place other numbers would be drawn, and what is right would seem wrong."""
    head = HEAD.replace("17", "11").replace("{2, 4}>", "{2, 4}, int64[1] n = {2}>")
    text = f"""{head} {{
        f = ConstantOfShape <value = float[1] {{3.0}}> (n) r = Relu (x)
        k = Unsqueeze <axes = [1, 2]> (f)
        b = {NORM.format("r")} m = Mul (b, k) y = Add (m, k)
    }}"""
    done = run(text, FoldAffine())
    assert done.applied
    assert [(r.inputs, r.outputs) for r in rollback._parts(done)] == [(("r",), ("y",))]


UNTRUE = """
<ir_version: 8, opset_import: ["" : 11]>
main (float[N,2,3] x) => (float[N,6] y, float[N,3,2] z)
<int64 i = {0}, int64[2] t = {3, 2}>
{
    s = Shape (x)
    m = Gather <axis: int = 0> (s, i)
    n = Unsqueeze <axes = [0]> (m)
    k = Concat <axis: int = 0> (n, t)
    y = Reshape (x, k)
    z = Reshape (x, k)
}
"""


def test_what_brings_an_untrue_shape_to_light_is_taken_back() -> None:
    """The file states two axes for y, which has three: a checker sees it once k is a constant."""
    model = onnx.parser.parse_model(UNTRUE)
    onnx.checker.check_model(model, full_check=True)
    done = onnxnorm.optimize(model, passes="fold-sizes", latency=False)
    onnx.checker.check_model(done.model, full_check=True)
    told = {site["site"]: (site["action"], site["reason"]) for site in done.report.sites}
    assert told["fold-sizes:z"][0] == "applied"
    action, reason = told["fold-sizes:y"]
    assert action == "rolled_back"
    assert reason.startswith("with it onnx.checker rejects the model: [ShapeInferenceError]")
    assert "1 change taken back; outputs agree" in " ".join(done.report.to_markdown().split())


def test_without_a_site_to_leave_out_the_checker_has_the_last_word() -> None:
    stored = storage.from_proto(onnx.parser.parse_model(UNTRUE))
    nothing = Pipeline([]).run(stored)
    with pytest.raises(VerificationError, match="the result: it says no"):
        rollback.made_valid(Pipeline([]), stored, nothing, "it says no")
