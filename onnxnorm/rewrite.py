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

from onnxnorm.facts import AnyValue, Facts, Use
from onnxnorm.matcher import Match, Mismatch, match
from onnxnorm.module import Module, Node, Scope, Value, Weight, reads
from onnxnorm.ops import bodies
from onnxnorm.pattern import Op
from onnxnorm.remark import Region, Remark
from onnxnorm.storage import Array


def place_of(anchor: AnyValue) -> str:
    """The name of a value, behind the way to its scope: names repeat in bodies and functions."""
    return f"{anchor.scope.path if anchor.scope is not None else ''}{anchor.name}"


def site_id(rule: str, anchor: AnyValue) -> str:
    """The stable name of a place: the pass, and the value that its root node computes."""
    return f"{rule}:{place_of(anchor)}"


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
        nodes: Every node that the change replaces or edits. Plans of one round never share one.
        detail: What `apply` needs; a `Match` for a local pattern.
        anchors: Further values that the site stands for, where it covers more than its root.
        inside: Nodes that stay and whose results change; they belong to the region.
        outputs: What the region computes, where that is not the root's outputs: values that mean
            the same before and after.
        local: Whether the region can be run by itself. One that goes through the whole model
            cannot: what it reads in many places has to fit together.
        action: What it does to a norm: "folded", "converted", "lowered".
        into: What the place becomes, for the report; "" for the last operator that comes.
        note: What it costs and gains, as a clause for the report.
    """

    root: Node
    nodes: tuple[Node, ...]
    detail: Any
    anchors: tuple[AnyValue, ...] = ()
    inside: tuple[Node, ...] = ()
    outputs: tuple[AnyValue, ...] | None = None
    local: bool = True
    action: str = "folded"
    into: str = ""
    note: str = ""


class Pass(ABC):
    """One idea. Passes are frozen dataclasses: their fields are their options.

    Attributes:
        name: What the user calls it.
        summary: One line for the catalogue.
        equation: What becomes what.
        approximate: Whether it changes the function over the reals; such a pass is never on
            unless it is asked for.
        closing: Whether it waits until no other pass has anything left to do, since what it does
            would stand in their way.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    equation: ClassVar[str]
    approximate: ClassVar[bool] = False
    closing: ClassVar[bool] = False

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
    scope: Scope
    at: Node | Scope  # the node in whose place it goes, or behind which; or where a scope begins
    behind: bool
    replaces: bool
    merged: tuple[Node, ...] = ()  # further nodes whose outputs it computes from now on


@dataclass(frozen=True)
class _Rewiring:
    node: Node
    index: int
    value: AnyValue


class Rewriter:
    """Stages the edits of one site after another, and commits each as a whole.

    New values are named after the root's output: `<output>_<role>`. A constant is always a new
    one: a weight that others share is never edited in place.

    A site need not be one place. `at=` puts new nodes in the place of another node than the root,
    `behind=` right behind the producer of a value; `rewire` gives an existing node another input,
    `redirect` gives all readers of a value another one. All of it is staged, and committed whole.

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
        self._rewirings: list[_Rewiring] = []
        self._redirects: dict[AnyValue, AnyValue] = {}
        self._inserted: dict[Node, list[Node]] = {}  # a removed node -> what stands in its place
        self._behind: dict[Node | Scope, list[Node]] = {}  # a producer -> what follows it
        self._scopes: dict[Scope, None] = {}

    # ** staging **

    def begin(self, rule: str, plan: Plan) -> None:
        """Start a site."""
        self._plan, self._rule = plan, rule
        self._site = site_id(rule, plan.root.outputs[0])
        self._drafts, self._constants = [], []
        self._rewirings, self._redirects = [], {}

    @property
    def root(self) -> Node:
        """The root of the site being staged."""
        assert self._plan is not None, "begin() starts a site"
        return self._plan.root

    def constant(
        self,
        role: str,
        array: Array,
        *,
        at: Node | None = None,
        behind: Value | None = None,
        name: str | None = None,
    ) -> AnyValue:
        """A new constant named after its role, or `name`; in a function, a Constant node."""
        place = self.root if at is None else at
        scope = place.scope if behind is None else _scope(behind)
        name = self.module.fresh_name(name or f"{_named(place, behind)}_{role}")
        tensor = self.module.stored.keep(name, array)
        if not scope.is_function:
            weight = Weight(tensor, scope, self.module.stored)
            self._constants.append(weight)
            return weight
        tensor.name = ""
        proto = onnx.helper.make_node("Constant", [], [name], value=tensor)
        return self._stage(proto, (), Value(name, scope), behind or place)

    def add(
        self,
        op: str,
        inputs: Sequence[AnyValue | None],
        role: str,
        *,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
        at: Node | None = None,
        behind: Value | None = None,
    ) -> Value:
        """A new node with one output, named after its role; returns the output."""
        place = self.root if at is None else at
        name = self.module.fresh_name(f"{_named(place, behind)}_{role}")
        proto = onnx.helper.make_node(op, [], [], name=name, domain=domain, **(attrs or {}))
        scope = place.scope if behind is None else _scope(behind)
        return self._stage(proto, inputs, Value(name, scope), behind or place)

    def replace(
        self,
        op: str,
        inputs: Sequence[AnyValue | None],
        *,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
        at: Node | None = None,
    ) -> None:
        """A new node that computes the root's output from now on, under the root's name.

        With `at`, it does so for that node and not for the root.
        """
        place = self.root if at is None else at
        proto = onnx.helper.make_node(op, [], [], name=place.name, domain=domain, **(attrs or {}))
        self._stage(proto, inputs, place.outputs[0], place, replaces=True)

    def call(
        self, name: str, inputs: Sequence[AnyValue], attrs: Mapping[str, Any] | None = None
    ) -> None:
        """A call of an operator of our own that computes the root's output.

        The model gets the function with its body, and the import of our domain.
        """
        root = self.root
        names = [value.name for value in inputs]
        made = bodies.node(name, names, root.outputs[0].name, label=root.name, **(attrs or {}))
        self.module.carry(name)
        self._stage(made, inputs, root.outputs[0], root, replaces=True)

    def merge(
        self,
        op: str,
        inputs: Sequence[AnyValue | None],
        outputs: Sequence[Value | None],
        merged: Sequence[Node],
        *,
        at: Node,
        name: str,
        domain: str = "",
        attrs: Mapping[str, Any] | None = None,
    ) -> None:
        """A new node in the place of `at` that computes what `at` and the `merged` nodes did.

        Args:
            op: The operator; one of onnxruntime's own where `domain` says so.
            inputs: What it reads; None for an input that is left out.
            outputs: What it computes: outputs of the nodes that go, or fresh values; None for an
                output that is left out.
            merged: Further nodes that go. None of their inputs may depend on a value that is
                computed behind `at`.
            at: The node in whose place it goes.
            name: Of the new node.
            domain: Of the operator.
            attrs: Its attributes.
        """
        if domain:
            self.module.use(domain)
        proto = onnx.helper.make_node(op, [], [], name=name, domain=domain, **(attrs or {}))
        given = [Value("", at.scope) if v is None else v for v in inputs]
        made = [Value("", at.scope) if v is None else v for v in outputs]
        for values in (given, made):
            while values and not values[-1].name:
                values.pop()
        draft = _Draft(proto, tuple(given), tuple(made), at.scope, at, False, True, tuple(merged))
        self._drafts.append(draft)

    def fresh(self, role: str, *, at: Node) -> Value:
        """A new value for an output of `merge`, named after its role."""
        return Value(self.module.fresh_name(f"{_named(at, None)}_{role}"), at.scope)

    def replace_like(self, like: Node, inputs: Sequence[AnyValue | None]) -> None:
        """A copy of the node `like`, with other inputs, that computes the root's output.

        Its name, attributes, doc string and metadata are those of `like`.
        """
        self._stage(like.proto, inputs, self.root.outputs[0], self.root, replaces=True)

    def copy(
        self,
        node: Node,
        inputs: Sequence[AnyValue],
        role: str,
        *,
        attrs: Mapping[str, Any] | None = None,
    ) -> list[Value]:
        """A copy of a node in front of it, with other inputs; its outputs are new values.

        For a change after which they have other shapes: a value that stays keeps its shape.
        """
        made = [
            Value(self.module.fresh_name(f"{v.name}_{role}") if v.name else "", node.scope)
            for v in node.outputs
        ]
        proto = onnx.NodeProto()
        proto.CopyFrom(node.proto)
        if proto.name:
            proto.name = self.module.fresh_name(f"{proto.name}_{role}")
        for name, value in (attrs or {}).items():
            for old in [a for a in proto.attribute if a.name == name]:
                proto.attribute.remove(old)
            proto.attribute.append(onnx.helper.make_attribute(name, value))
        draft = _Draft(proto, tuple(inputs), tuple(made), node.scope, node, False, False)
        self._drafts.append(draft)
        return made

    def rewire(self, node: Node, index: int, value: AnyValue) -> None:
        """Let a node that stays read another value as its input `index`; it names the site."""
        self._rewirings.append(_Rewiring(node, index, value))

    def redirect(self, value: AnyValue, to: AnyValue) -> None:
        """Let all that reads `value` read `to`; what computes it goes when nobody needs it.

        The value must not be an output of its scope. Edits of the same site that name `value` mean
        `to`.
        """
        assert self.facts.pinned(value) is None, "an output keeps its producer"
        self._redirects[value] = to

    def _stage(
        self,
        proto: onnx.NodeProto,
        inputs: Sequence[AnyValue | None],
        output: Value,
        at: Node | Value,
        *,
        replaces: bool = False,
    ) -> Value:
        scope = at.scope if isinstance(at, Node) else _scope(at)
        place: Node | Scope = at if isinstance(at, Node) else self.facts.producer(at) or scope
        behind = not isinstance(at, Node)
        given = [Value("", scope) if v is None else v for v in inputs]
        while given and not given[-1].name:
            given.pop()  # trailing empty inputs say nothing
        draft = _Draft(proto, tuple(given), (output,), scope, place, behind, replaces)
        self._drafts.append(draft)
        return output

    # ** committing **

    def commit(self) -> Remark:
        """Put the staged nodes in their places; remove what nobody needs any more."""
        plan = self._plan
        assert plan is not None, "begin() starts a site"
        root = plan.root
        anchor = root.outputs[0]
        replaced = [n for d in self._drafts if d.replaces for n in (d.at, *d.merged)]
        removed = [n for n in dict.fromkeys(replaced) if isinstance(n, Node)]
        gone = [_described(n) for n in removed]
        region = self._region(plan)
        outputs = [v for n in plan.nodes for v in n.outputs]
        freed = [v for n in removed for v in self._unlink(n)]
        made = [self._place(draft) for draft in self._drafts]
        for weight in self._constants:
            weight.scope.values[weight.name] = weight
            weight.scope.weights[weight] = None
            weight.scope.touch()
        edited = [self._rewired(r, freed) for r in self._rewirings]
        for value, to in self._redirects.items():
            for use in [Use(n, i) for n in dict.fromkeys(value.outputs) for i in _places(n, value)]:
                use.node.inputs[use.index] = self._meant(to)
                use.node.scope.touch()
            freed.append(value)
        gone += self._sweep([*freed, *outputs])
        changed = [n for n in dict.fromkeys(edited) if n not in self.dead]
        remark = Remark(
            "applied",
            self._rule,
            self._site,
            at=root.label if root not in self.dead or not gone else gone[0].partition(" ")[2],
            removed=tuple(gone),
            added=tuple(_described(n) for n in made),
            region=region,
            anchor=anchor.name,
            anchors=tuple(place_of(v) for v in plan.anchors),
            edited=tuple(_described(n) for n in changed),
            action=plan.action,
            into=plan.into or (made[-1].op if made else ""),
            note=plan.note,
        )
        self.log.append(remark)
        self._plan = None
        return remark

    def _place(self, draft: _Draft) -> Node:
        """Make a staged node and put it down for its place."""
        scope = draft.scope
        inputs = [self._meant(v) for v in draft.inputs]
        node = Node(draft.proto, scope, inputs, draft.outputs, self._site)
        for value in draft.outputs:
            if value.name:
                self.module.names.add(value.name)
                scope.values[value.name] = value
        if isinstance(draft.at, Node) and not draft.behind:
            self._inserted.setdefault(draft.at, []).append(node)
        else:
            self._behind.setdefault(draft.at, []).append(node)
        scope.touch()
        self._scopes[scope] = None
        return node

    def _rewired(self, edit: _Rewiring, freed: list[AnyValue]) -> Node:
        node = edit.node
        while len(node.inputs) <= edit.index:
            node.inputs.append(Value("", node.scope))
        freed.append(node.inputs[edit.index])
        node.inputs[edit.index] = self._meant(edit.value)
        node.site = self._site
        node.scope.touch()
        return node

    def _meant(self, value: AnyValue) -> AnyValue:
        """The value that stands for `value` when the site is committed."""
        while value in self._redirects:
            value = self._redirects[value]
        return value

    def finish(self) -> None:
        """Rebuild the node lists of the scopes that were changed, each in one go."""
        for scope in self._scopes:
            nodes: list[Node] = []
            nodes += self._behind.get(scope, ())
            for node in scope.nodes:
                nodes += self._inserted.get(node, ())
                nodes.append(node)
                # Also behind a node that is gone: what replaced it computes the same values.
                nodes += self._behind.get(node, ())
            # New nodes can be gone too: a site whose result nobody reads, or one that built on it.
            scope.graph.nodes[:] = [node for node in nodes if node not in self.dead]

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
        """Where a site changes the main graph; None where a part cannot be told apart."""
        if not plan.local:
            return None
        nodes = dict.fromkeys(outermost(n) for n in (*plan.nodes, *plan.inside))
        if plan.outputs is None:
            outputs = outermost(plan.root).outputs
        else:
            outputs = [o for v in plan.outputs for o in self._seen_outside(v)]
        if any(node.scope.is_function for node in nodes):
            return None
        inside = {v for node in nodes for v in node.outputs}
        outside: dict[str, None] = {}
        for node in nodes:
            for value in reads(node):
                local = value.scope is not node.scope
                skip = not value.name or value in inside or local
                if not skip and not self.facts.fixed(value):
                    outside[value.name] = None
        names = dict.fromkeys(v.name for v in outputs if v.name)
        between = dict.fromkeys(v.name for v in inside if v.name and v.name not in names)
        return Region(self._site, tuple(outside), tuple(names), tuple(sorted(between)))

    def _seen_outside(self, value: AnyValue) -> list[Value]:
        """A value of the main graph; what the outermost node around it computes otherwise."""
        node = self.facts.producer(value)
        if node is None or not isinstance(value, Value):
            return []
        outer = outermost(node)
        return [value] if outer is node else list(outer.outputs)


def outermost(node: Node) -> Node:
    """The node of the main graph or of a function in whose bodies a node stands, or itself."""
    while node.scope.owner is not None:
        node = node.scope.owner
    return node


def _described(node: Node) -> str:
    return f"{node.op} {node.label}"


def _scope(value: Value) -> Scope:
    assert value.scope is not None, "every value of a graph has a scope"
    return value.scope


def _named(place: Node, behind: Value | None) -> str:
    return place.outputs[0].name if behind is None else behind.name


def _places(node: Node, value: AnyValue) -> list[int]:
    return [index for index, given in enumerate(node.inputs) if given is value]
