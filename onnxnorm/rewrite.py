"""Passes, and the one way in which they change a graph.

A pass has two methods. `plan(facts)` is pure and gives every place it has an opinion on, as a
`Plan` or a `Refusal` with a reason. `apply(plan, rewriter)` is arithmetic and cannot fail: it
stages new nodes and constants with a `Rewriter`, which commits a site as a whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import onnx

from onnxnorm.facts import AnyValue, Facts
from onnxnorm.matcher import Match, Mismatch, match
from onnxnorm.module import Module, Node, Scope, Value, Weight, reads
from onnxnorm.pattern import Op
from onnxnorm.remark import Region, Remark
from onnxnorm.storage import Array


def site_id(rule: str, anchor: AnyValue) -> str:
    """The stable name of a place: the pass, and the value that its root node computes.

    Values of bodies and functions carry the way to their scope, since names repeat there.
    """
    path = anchor.scope.path if anchor.scope is not None else ""
    return f"{rule}:{path}{anchor.name}"


@dataclass(frozen=True)
class Refusal:
    """A no, with its reason.

    Attributes:
        reason: What stands in the way, as a clause that names values and nodes.
        at: The binding or the node where it failed.
        advice: What the user could change, as a sentence; "" where there is nothing.
        node: The root of the place; filled in by the pass.
        missed: The place only resembles what the pass is for.
        kept: The place is what the pass is for, and is in its best form already.
    """

    reason: str
    at: str = ""
    advice: str = ""
    node: Node | None = None
    missed: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Plan:
    """One place that a pass would change.

    Attributes:
        root: The node whose output value survives; it names the site.
        nodes: Every node that the change replaces. Plans of one round never share one.
        detail: What `apply` needs; a `Match` for a local pattern.
        into: What the place becomes, for the report; "" for the last operator that comes.
    """

    root: Node
    nodes: tuple[Node, ...]
    detail: Any
    into: str = ""


class Pass(ABC):
    """One idea. Passes are frozen dataclasses: their fields are their options.

    Attributes:
        name: What the user calls it.
        summary: One line for the catalogue.
        equation: What becomes what.
        approximate: Whether it changes the function over the reals; such a pass is never on
            unless it is asked for.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    equation: ClassVar[str]
    approximate: ClassVar[bool] = False

    @abstractmethod
    def plan(self, facts: Facts) -> Iterable[Plan | Refusal]:
        """Every place this pass has an opinion on; pure."""

    @abstractmethod
    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Stage the change of one place; cannot fail."""


class RewritePass(Pass):
    """A pass with a local pattern: `check` says every way it could be wrong, `rewrite` computes.

    The engine has checked before `check` that inner values are not read elsewhere and that
    further outputs are unused. The root's first output survives by identity.
    """

    pattern: ClassVar[Op]

    def check(self, m: Match) -> Refusal | None:
        """A reason not to rewrite this match; None to go ahead."""
        return None

    @abstractmethod
    def rewrite(self, m: Match, rw: Rewriter) -> None:
        """Stage the new nodes; the last one must be made by `rw.replace` or `rw.replace_like`."""

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Match the pattern at every node of its root type."""
        for node in facts.module.nodes():
            if node.op not in self.pattern.types or node.domain != self.pattern.domain:
                continue
            if not node.outputs or not node.outputs[0].name:
                continue  # it computes nothing that could be named
            found = match(self.pattern, node, facts)
            if isinstance(found, Mismatch):
                yield Refusal(found.reason, found.node.label, node=node, missed=found.structural)
            elif refusal := self.check(found):
                at = found.nodes[refusal.at].label if refusal.at in found.nodes else refusal.at
                yield replace(refusal, at=at or node.label, node=node)
            else:
                yield Plan(node, tuple(found.nodes.values()), found)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Rewrite one match."""
        self.rewrite(plan.detail, rw)


@dataclass(frozen=True)
class _Draft:
    proto: onnx.NodeProto
    inputs: tuple[AnyValue, ...]
    outputs: tuple[Value, ...]


class Rewriter:
    """Stages the edits of one site after another, and commits each as a whole.

    New values are named after the root's output: `<output>_<role>`. A constant is always a new
    one: a weight that others share is never edited in place.

    Args:
        module: The module to change.
        facts: The facts under which the plans were made.

    Attributes:
        dead: Nodes that are gone; a plan that names one of them no longer holds.
        log: The sites that were committed, in order.
    """

    def __init__(self, module: Module, facts: Facts) -> None:
        self.module = module
        self.facts = facts
        self.dead: set[Node] = set()
        self.log: list[Remark] = []
        self._plan: Plan | None = None
        self._site = ""
        self._rule = ""
        self._drafts: list[_Draft] = []
        self._constants: list[Weight] = []
        self._inserted: dict[Node, list[Node]] = {}  # a removed root -> what stands in its place
        self._scopes: dict[Scope, None] = {}

    # ** staging **

    def begin(self, rule: str, plan: Plan) -> None:
        """Start a site."""
        self._plan, self._rule = plan, rule
        self._site = site_id(rule, plan.root.outputs[0])
        self._drafts, self._constants = [], []

    @property
    def root(self) -> Node:
        """The root of the site being staged."""
        assert self._plan is not None, "begin() starts a site"
        return self._plan.root

    def constant(self, role: str, array: Array) -> AnyValue:
        """A new constant named after its role; in a function, a Constant node."""
        scope = self.root.scope
        name = self.module.fresh_name(f"{self.root.outputs[0].name}_{role}")
        tensor = self.module.stored.keep(name, array)
        if not scope.is_function:
            weight = Weight(tensor, scope, self.module.stored)
            self._constants.append(weight)
            return weight
        tensor.name = ""
        proto = onnx.helper.make_node("Constant", [], [name], value=tensor)
        return self._stage(proto, (), Value(name, scope))

    def add(
        self,
        op: str,
        inputs: Sequence[AnyValue | None],
        role: str,
        *,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> Value:
        """A new node with one output, named after its role; returns the output."""
        name = self.module.fresh_name(f"{self.root.outputs[0].name}_{role}")
        proto = onnx.helper.make_node(op, [], [], name=name, domain=domain, **(attrs or {}))
        return self._stage(proto, inputs, Value(name, self.root.scope))

    def replace(
        self,
        op: str,
        inputs: Sequence[AnyValue | None],
        *,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """A new node that computes the root's output from now on, under the root's name."""
        proto = onnx.helper.make_node(
            op, [], [], name=self.root.name, domain=domain, **(attrs or {})
        )
        self._stage(proto, inputs, self.root.outputs[0])

    def replace_like(self, like: Node, inputs: Sequence[AnyValue | None]) -> None:
        """A copy of the node `like`, with other inputs, that computes the root's output.

        Its name, attributes, doc string and metadata are those of `like`.
        """
        self._stage(like.proto, inputs, self.root.outputs[0])

    def _stage(
        self, proto: onnx.NodeProto, inputs: Sequence[AnyValue | None], output: Value
    ) -> Value:
        given = [Value("", self.root.scope) if v is None else v for v in inputs]
        while given and not given[-1].name:
            given.pop()  # trailing empty inputs say nothing
        self._drafts.append(_Draft(proto, tuple(given), (output,)))
        return output

    # ** committing **

    def commit(self) -> Remark:
        """Put the staged nodes in the root's place; remove what nobody needs any more."""
        plan = self._plan
        assert plan is not None, "begin() starts a site"
        root, scope = plan.root, plan.root.scope
        anchor = root.outputs[0]
        gone = [_described(root)]
        region = self._region(plan)
        freed = self._unlink(root)
        made = []
        for draft in self._drafts:
            node = Node(draft.proto, scope, draft.inputs, draft.outputs, self._site)
            self.module.names.update(v.name for v in draft.outputs)
            for value in draft.outputs:
                scope.values[value.name] = value
            made.append(node)
        for weight in self._constants:
            scope.values[weight.name] = weight
            scope.weights[weight] = None
        self._inserted[root] = made
        gone += self._sweep([*freed, *(v for n in plan.nodes for v in n.outputs)])
        remark = Remark(
            "applied",
            self._rule,
            self._site,
            at=gone[0].partition(" ")[2],
            removed=tuple(gone),
            added=tuple(_described(n) for n in made),
            region=region,
            anchor=anchor.name,
            into=plan.into or (made[-1].op if made else ""),
        )
        self.log.append(remark)
        self._plan = None
        return remark

    def finish(self) -> None:
        """Rebuild the node lists of the scopes that were changed, each in one go."""
        for scope in self._scopes:
            nodes: list[Node] = []
            for node in scope.nodes:
                nodes += self._inserted.get(node, ())
                if node not in self.dead:
                    nodes.append(node)
            scope.graph.nodes[:] = nodes

    def _sweep(self, candidates: list[AnyValue]) -> list[str]:
        """Remove what computed these values where nobody reads them now; says what went."""
        gone = []
        while candidates:
            value = candidates.pop()
            if value.outputs or self.facts.pinned(value) is not None:
                continue
            if isinstance(value, Weight):
                scope = value.scope
                if value in scope.weights:
                    del scope.weights[value]
                    scope.touch()
                    if self.module.proto.ir_version < 4:
                        # It was listed as an input only because it is an initializer.
                        scope.graph.inputs[:] = [v for v in scope.inputs if v is not value]
                continue
            node = value.inputs[0] if value.inputs else None
            if node is None or node in self.dead:
                continue
            if any(v.outputs or self.facts.pinned(v) is not None for v in node.outputs):
                continue
            gone.append(_described(node))
            candidates += self._unlink(node)
        return gone

    def _unlink(self, node: Node) -> list[AnyValue]:
        """Take a node and its bodies out of the graph; returns what they read."""
        freed = list(node.inputs)
        for _, _, body in node.bodies:
            freed += body.outputs
            for inner in body.nodes:
                freed += self._unlink(inner)
            self.module.scopes.remove(body)
        node.inputs.clear()
        node.outputs.clear()
        self.dead.add(node)
        node.scope.touch()
        self._scopes[node.scope] = None
        return freed

    def _region(self, plan: Plan) -> Region | None:
        nodes, scope, outputs = plan.nodes, plan.root.scope, plan.root.outputs
        while scope.owner is not None:
            nodes, outputs = (scope.owner,), scope.owner.outputs
            scope = scope.owner.scope
        if scope.is_function:
            return None
        inside = {v for node in nodes for v in node.outputs}
        outside: dict[str, None] = {}
        for node in nodes:
            for value in reads(node):
                local = value.scope is not scope
                skip = not value.name or value in inside or local
                if not skip and self.facts.constant(value) is None:
                    outside[value.name] = None
        return Region(self._site, tuple(outside), tuple(v.name for v in outputs if v.name))


def _described(node: Node) -> str:
    return f"{node.op} {node.label}"
