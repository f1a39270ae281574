"""The one driver: passes to a fixed point over every scope, with a log of what was done.

A run is a pure function of the stored model, the passes and the list of denied sites. Rolling a
site back is running again with that site denied: later commits may depend on earlier ones, so
nothing is undone in place.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from onnxnorm.errors import UsageError, VerificationError
from onnxnorm.facts import Facts
from onnxnorm.module import Module, Node
from onnxnorm.norms import Norm, find_norms
from onnxnorm.remark import Remark
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter, place_of, site_id
from onnxnorm.storage import Stored
from onnxnorm.verifier import Verifier

ROUNDS: Final = 100  # a fixed point comes after two or three; more means that passes fight


@dataclass
class PassStatistics:
    """What one pass did, over all rounds.

    Attributes:
        name: The pass.
        applied: Sites changed.
        refused: Sites with a reason not to, as of the last round.
        seconds: Wall time for planning, applying and verifying.
    """

    name: str
    applied: int = 0
    refused: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Run:
    """The outcome of a pipeline.

    Attributes:
        stored: The model after all passes; the input itself when nothing changed.
        remarks: Every decision: first what was done, in order, then what was not.
        statistics: Per pass, in the order in which they ran.
        nodes: Number of nodes in all scopes, before and after.
        norms: The normalizations of the input.
    """

    stored: Stored
    remarks: tuple[Remark, ...]
    statistics: tuple[PassStatistics, ...]
    nodes: tuple[int, int]
    norms: tuple[Norm, ...] = ()

    @property
    def applied(self) -> tuple[Remark, ...]:
        """The sites that were changed, in order."""
        return tuple(r for r in self.remarks if r.outcome == "applied")


class _Current:
    """A module and its facts as they are now."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.facts = Facts(module)  # which hold until a commit
        self.state = 0  # how many rounds of commits there have been

    def changed(self) -> None:
        """Forget what was true before a commit."""
        before = self.facts
        self.facts = Facts(self.module, before=before)
        self.state += 1
        before.kept.clear()  # what is kept refers to the facts: it would stay for the collector


@dataclass
class Pipeline:
    """Passes in order, and which sites they may touch.

    Attributes:
        passes: The passes.
        only: Sites (or their anchor values) to restrict to; empty means all.
        skip: Sites (or their anchor values) that the user does not want changed.
        after_pass: Called with a pass's name and the model after it committed something.
        before: Called with the facts of the model as given, before a pass sees it.
    """

    passes: Sequence[Pass]
    only: Collection[str] = ()
    skip: Collection[str] = ()
    after_pass: Callable[[str, Stored], None] | None = None
    before: Callable[[Facts], None] | None = None
    _asked: set[str] = field(default_factory=set)

    def run(
        self,
        stored: Stored,
        *,
        deny: Collection[str] = (),
        allow: Collection[str] | None = None,
        check_sites: bool = True,
    ) -> Run:
        """Run the passes on a model.

        Args:
            stored: The model; it is not changed.
            deny: Sites that must not be touched.
            allow: If given, the only sites that may be touched.
            check_sites: Whether a site in `only` or `skip` that no pass knows is an error.

        Raises:
            ModelError: The graph is broken.
            UsageError: `only` or `skip` names a site that does not exist.
            VerificationError: A pass broke an invariant, or the passes reach no fixed point.
        """
        module = Module(stored)
        current = _Current(module)
        norms = tuple(find_norms(current.facts))
        if self.before is not None:
            self.before(current.facts)
        verifier = Verifier(module)
        before = sum(1 for _ in module.nodes())
        statistics = {p.name: PassStatistics(p.name) for p in self.passes}
        applied: list[Remark] = []
        final: dict[str, list[Remark]] = {}
        settled: dict[int, int] = {}  # the state in which a pass had nothing more to do
        self._asked = set()
        for _ in range(ROUNDS):
            committed = 0
            for i, rule in enumerate(self.passes):
                if settled.get(i) == current.state:
                    continue  # the graph is as it left it
                if rule.closing and committed:
                    continue  # its turn comes in a round in which nobody else had one
                started = time.perf_counter()
                done, rest = self._fixed_point(rule, current, verifier, deny, allow)
                applied += done
                final[rule.name] = rest
                settled[i] = current.state
                committed += len(done)
                entry = statistics[rule.name]
                entry.applied += len(done)
                entry.refused = sum(r.outcome == "refused" for r in rest)
                entry.seconds += time.perf_counter() - started
                if done and self.after_pass is not None:
                    self.after_pass(rule.name, module.export())
            if not committed or len(self.passes) == 1:
                break
        else:
            raise VerificationError(
                f"the passes still change the graph after {ROUNDS} rounds",
                "This is a defect; please report it with the model and the list of passes.",
            )
        if check_sites:
            self._check_sites()
        rest = [remark for remarks in final.values() for remark in remarks]
        after = sum(1 for _ in module.nodes())
        remarks, counted = (*applied, *rest), tuple(statistics.values())
        return Run(module.export(), remarks, counted, (before, after), norms)

    def _fixed_point(
        self,
        rule: Pass,
        current: _Current,
        verifier: Verifier,
        deny: Collection[str],
        allow: Collection[str] | None,
    ) -> tuple[list[Remark], list[Remark]]:
        """One pass until it has nothing to do: what it applied, and what it refused at the end."""
        applied: list[Remark] = []
        skipped: dict[str, Remark] = {}  # over all rounds: a later one may swallow the place
        module = current.module
        nodes, rounds = sum(1 for _ in module.nodes()), 0
        while rounds < ROUNDS:
            facts = current.facts
            rewriter = Rewriter(module, facts)
            rest: list[Remark] = []
            claimed: set[Node] = set()
            # Before the first commit, which may take away what others name.
            decided = [(plan, self._verdict(rule, plan, deny, allow)) for plan in rule.plan(facts)]
            for plan, remark in decided:
                if remark is not None and remark.outcome == "skipped":
                    skipped[remark.site] = remark
                elif remark is not None:
                    rest.append(remark)
                elif isinstance(plan, Plan):
                    if any(node in claimed or node in rewriter.dead for node in plan.nodes):
                        continue  # its turn comes in the next round, on the new graph
                    claimed.update(plan.nodes)
                    verifier.remember_types(facts)
                    rewriter.begin(rule.name, plan)
                    rule.apply(plan, rewriter)
                    rewriter.commit()
            rewriter.finish()
            applied += rewriter.log
            if not rewriter.log:
                return applied, [*rest, *skipped.values()]
            current.changed()
            verifier.check(rule.name, current.facts)
            before, nodes = nodes, sum(1 for _ in module.nodes())
            rounds += nodes >= before  # making a graph smaller comes to an end by itself
        raise VerificationError(
            f"{rule.name} still changes the graph after {ROUNDS} rounds",
            f"This is a defect of {rule.name}; please report it with the model.",
        )

    def _verdict(
        self,
        rule: Pass,
        plan: Plan | Refusal,
        deny: Collection[str],
        allow: Collection[str] | None,
    ) -> Remark | None:
        """The remark that keeps a place as it is; None to go ahead."""
        root = plan.root if isinstance(plan, Plan) else plan.node
        assert root is not None, f"{rule.name} refused a place without naming its node"
        anchor = root.outputs[0]
        site = site_id(rule.name, anchor)
        names = (site, site.partition(":")[2], anchor.name)
        self._asked.update(names)
        further = tuple(map(place_of, plan.anchors)) if isinstance(plan, Plan) else ()
        base = Remark(
            "skipped", rule.name, site, at=root.label, anchor=anchor.name, anchors=further
        )
        if isinstance(plan, Refusal):
            return Remark(
                "missed" if plan.missed else "kept" if plan.kept else "refused",
                rule.name,
                site,
                at=plan.at or root.label,
                reason=plan.reason,
                advice=plan.advice,
                anchor=anchor.name,
            )
        if any(name in self.skip for name in names):
            return _because(base, "--skip names it")
        if self.only and not any(name in self.only for name in names):
            return _because(base, "--only names others")
        if site in deny or (allow is not None and site not in allow):
            return _because(base, "denied")
        return None

    def _check_sites(self) -> None:
        for option, sites in (("--only", self.only), ("--skip", self.skip)):
            for site in sites:
                if site not in self._asked:
                    raise UsageError(
                        f"{option} names '{site}', which is no site of these passes",
                        "`onnxnorm inspect -v` lists the sites of a model, with the same --passes.",
                    )


def _because(remark: Remark, reason: str) -> Remark:
    return replace(remark, reason=reason)
