"""The driver: fixed point, sites, determinism, and what it does with passes that misbehave."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.constants import find_constants
from onnxnorm.errors import UsageError, VerificationError
from onnxnorm.facts import Facts
from onnxnorm.matcher import Match
from onnxnorm.norms import find_norms
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.pattern import const, op, var
from onnxnorm.pipeline import Pipeline
from onnxnorm.rewrite import Pass, Plan, Refusal, RewritePass, Rewriter
from onnxnorm.sizes import derived_sizes, find_sizes
from onnxnorm.storage import Stored

MODEL = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[2] x) => (float[2] z)
<float[2] a = {1.0, 2.0}, float[2] b = {4.0, 8.0}, float[2] c = {2.0, 4.0}>
{
   u = Add (x, a)
   y = Add (u, b)
   z = Add (y, c)
}
"""


@dataclass(frozen=True)
class JoinAdds(RewritePass):
    """Add(Add(x, a), b) -> Add(x, a + b)."""

    name: ClassVar = "join-adds"
    summary: ClassVar = "two constant additions into one"
    equation: ClassVar = "(x + a) + b -> x + (a + b)"
    pattern: ClassVar = op(
        "Add", op("Add", var("x"), const("a"), name="inner"), const("b"), name="outer"
    )

    def check(self, m: Match) -> Refusal | None:
        if (m.array("b") < 0).any():
            return Refusal("b is negative", at="inner", advice="Make it positive.")
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        total = rw.constant("sum", m.array("a") + m.array("b"))
        rw.replace("Add", [m.value("x"), total])


def stored(source: str = MODEL) -> Stored:
    return storage.from_proto(parser.parse_model(source))


def test_overlapping_places_wait_for_the_next_round() -> None:
    done = Pipeline([JoinAdds()]).run(stored())
    assert [r.site for r in done.applied] == ["join-adds:y", "join-adds:z"]
    (node,) = done.stored.proto.graph.node
    (weight,) = done.stored.proto.graph.initializer
    assert (node.op_type, list(node.input), list(node.output)) == ("Add", ["x", "z_sum"], ["z"])
    assert done.stored.array(weight).tolist() == [7.0, 14.0]
    assert done.nodes == (3, 1)


def test_remarks_say_what_went_and_what_came() -> None:
    first, second = Pipeline([JoinAdds()]).run(stored()).applied
    assert (first.removed, first.added) == (("Add y", "Add u"), ("Add y",))
    assert first.region is not None
    assert (first.region.inputs, first.region.outputs) == (("x",), ("y",))
    assert second.anchor == "z"


def test_refusals_come_with_place_and_advice() -> None:
    done = Pipeline([JoinAdds()]).run(stored(MODEL.replace("{2.0, 4.0}", "{-2.0, 4.0}")))
    (refused,) = (r for r in done.remarks if r.outcome == "refused")
    assert (refused.site, refused.at) == ("join-adds:z", "y")
    assert (refused.reason, refused.advice) == ("b is negative", "Make it positive.")
    (statistics,) = done.statistics
    assert (statistics.applied, statistics.refused) == (1, 1)


@pytest.mark.parametrize("site", ["join-adds:y", "y"])
def test_only_and_skip(site: str) -> None:
    only = Pipeline([JoinAdds()], only=[site]).run(stored())
    assert [r.site for r in only.applied] == ["join-adds:y"]
    skip = Pipeline([JoinAdds()], skip=[site]).run(stored())
    assert {r.site for r in skip.applied} == {"join-adds:z"}
    (skipped,) = (r for r in skip.remarks if r.outcome == "skipped")
    assert skipped.reason == "--skip names it"


@pytest.mark.parametrize("option", ["only", "skip"])
def test_a_site_that_does_not_exist_is_a_usage_error(option: str) -> None:
    pipeline = Pipeline([JoinAdds()], **{option: ["join-adds:nowhere"]})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="names 'join-adds:nowhere'"):
        pipeline.run(stored())


def test_denied_sites_are_left_out_and_later_ones_build_on_what_is_there() -> None:
    done = Pipeline([JoinAdds()]).run(stored(), deny=["join-adds:y"])
    # z takes up y's constant and then, in the next round, the one before it.
    assert [r.site for r in done.applied] == ["join-adds:z", "join-adds:z"]
    assert [n.op_type for n in done.stored.proto.graph.node] == ["Add"]
    allowed = Pipeline([JoinAdds()]).run(stored(), allow=["join-adds:y"])
    assert [r.site for r in allowed.applied] == ["join-adds:y"]


def test_what_was_found_before_a_commit_goes_with_it() -> None:
    known: list[weakref.ref[Facts]] = []

    class Looking(JoinAdds):
        def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
            find_sizes(facts)
            derived_sizes(facts)
            find_norms(facts)
            find_constants(facts)
            known.append(weakref.ref(facts))
            return super().plan(facts)

    gc.disable()  # a circle would stay until it is looked for
    try:
        Pipeline([Looking()]).run(stored())
        assert [facts() for facts in known[:-1]] == [None, None]
    finally:
        gc.enable()


def test_the_same_input_gives_the_same_bytes() -> None:
    results = {
        Pipeline([JoinAdds(), FoldBatchnorm()]).run(stored()).stored.proto.SerializeToString()
        for _ in range(3)
    }
    assert len(results) == 1


def test_without_changes_the_input_itself_comes_back() -> None:
    given = stored()
    assert Pipeline([]).run(given).stored is given
    assert Pipeline([FoldBatchnorm()]).run(given).stored is given


def test_after_pass_sees_each_changed_model() -> None:
    seen: list[tuple[str, int]] = []
    pipeline = Pipeline(
        [FoldBatchnorm(), JoinAdds()],
        after_pass=lambda name, s: seen.append((name, len(s.proto.graph.node))),
    )
    pipeline.run(stored())
    assert seen == [("join-adds", 1)]


@dataclass(frozen=True)
class Flip(Pass):
    """Swap the inputs of every Add, for ever."""

    name: ClassVar = "flip"
    summary: ClassVar = "never ends"
    equation: ClassVar = "a + b -> b + a"

    def plan(self, facts: Facts) -> Iterator[Plan]:
        for node in facts.module.nodes():
            yield Plan(node, (node,), None)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        rw.replace("Add", plan.root.inputs[::-1])


def test_a_pass_without_a_fixed_point_is_stopped() -> None:
    with pytest.raises(VerificationError, match="flip still changes the graph"):
        Pipeline([Flip()]).run(stored())


@dataclass(frozen=True)
class Invent(Flip):
    """Use an operator that does not exist."""

    name: ClassVar = "invent"

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        rw.replace("Plus", list(plan.root.inputs))


@dataclass(frozen=True)
class Widen(Flip):
    """Change the element type of a surviving value."""

    name: ClassVar = "widen"

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        rw.replace("Equal", list(plan.root.inputs))


@pytest.mark.parametrize(
    ("rule", "what"),
    [(Invent(), "Plus does not exist in opset 17"), (Widen(), "changed the element type of 'u'")],
)
def test_a_pass_that_breaks_an_invariant_is_named(rule: Pass, what: str) -> None:
    with pytest.raises(VerificationError) as error:
        Pipeline([rule]).run(stored())
    assert error.value.what.startswith(rule.name)
    assert what in error.value.what
    assert "please report it" in error.value.hint


def test_the_input_is_never_changed() -> None:
    given = parser.parse_model(MODEL)
    before = given.SerializeToString()
    Pipeline([JoinAdds()]).run(storage.from_proto(given))
    assert given.SerializeToString() == before
