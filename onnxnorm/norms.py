"""Every normalization of a model in its canonical form, whatever operators spell it.

    layer_norm     gamma * (x - E[x]) / sqrt(Var[x] + eps) + beta      over any axes
    rms_norm       gamma * x / sqrt(E[x^2] + eps)                      over any axes
    l2_norm        gamma * x / |x|, with the rule by which its eps comes in
    softmax, log_softmax, batch_norm, group_norm, instance_norm, filter_response_norm, evo_norm,
    weight_standardization, channel_affine

The canonical form of a norm is a value, a `Norm`: its kind, the tensor it normalizes, axes, eps,
factors, and the nodes that compute it now. The graph itself is not touched by recognition: a file
of IR version 7 or older cannot hold a function for a canonical node to call, and a norm that no
pass improves has to come back as it was. So passes read norms from here and write through
`forms.py`.

Of nested readings the outermost wins: a layer norm over the RMS norm inside it, a group norm over
the instance norm on its groups. A near miss is a row too, with the first condition that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.channelwise import Affine, Channelwise
from onnxnorm.exponentials import Exponentials
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.layout import Dim
from onnxnorm.module import Node, Scope
from onnxnorm.moment_rules import Moments
from onnxnorm.moments import Form, M, Miss, Normal, X
from onnxnorm.norm_operators import Axes, norm_operator
from onnxnorm.region import Escape, Region, slice_back
from onnxnorm.runtime_fusions import misfused
from onnxnorm.statics import Statics


@dataclass(frozen=True)
class Norm:
    """One normalization of a model, in canonical form.

    Attributes:
        kind: What it is; for a near miss what it resembles.
        node: The node that computes the result.
        nodes: Every node that computes it, in graph order.
        input: The value that is normalized.
        output: The result.
        axes: What the statistics are over; non-negative where the rank is known, None where the
            kind has none or they need a rank that is not known.
        epsilon: As the kind has it, to the last digit; None where it has none.
        meant: The decimal that epsilon is rounded from: the shortest that its type does not tell
            apart from it.
        recognised: False for a near miss.
        reason: For a near miss, the first condition that failed.
        at: The node where it failed; None where nothing did.
        gamma: What multiplies the normalized value, right-aligned to the input, in float64; a
            `Value` where it is computed at run time; None for 1.
        beta: What is added to it; in the same three forms.
        rule: How epsilon comes in: "inside" the root, "outside" of it, as a "maximum" of the
            norm, or "clamped" as a maximum of its square.
        groups: How many groups of channels; 0 where there are none.
        channel: For groups, the axis of the channels.
        operator: Whether a single operator computes it.
        obstacle: Why its nodes cannot be replaced although it is recognised; "" where they can.
        obstacle_at: The node that stands in the way.
        dims: Dims of the input, as far as they follow from the graph, numbers or names; None
            where not even the rank does.
        notes: What else was seen around it.
        stable: For a decomposed softmax, whether the maximum is subtracted before exp.
        warning: What onnxruntime would make of its nodes when it loads the model, where that is
            wrong; "" where it is right.
    """

    kind: str
    node: Node
    nodes: tuple[Node, ...]
    input: AnyValue
    output: AnyValue
    axes: Axes = None
    epsilon: float | None = None
    recognised: bool = True
    reason: str = ""
    at: Node | None = None
    gamma: NDArray[np.float64] | AnyValue | None = None
    beta: NDArray[np.float64] | AnyValue | None = None
    rule: str = "inside"
    groups: int = 0
    channel: int = 1
    operator: bool = False
    obstacle: str = ""
    obstacle_at: Node | None = None
    dims: tuple[Dim, ...] | None = None
    notes: tuple[str, ...] = ()
    meant: float | None = None
    stable: bool = True
    warning: str = ""


def find_norms(facts: Facts) -> list[Norm]:
    """Every normalization of a model, in graph order, the main graph first.

    What is found holds as long as the facts do, and is looked for once.
    """
    found: list[Norm] | None = facts.kept.get("norms")
    if found is None:
        scopes = [s for s in facts.module.scopes if not s.is_ours]
        found = [norm for scope in scopes for norm in _Recogniser(facts, scope).norms()]
        facts.kept["norms"] = found
    return found


@dataclass
class _Recogniser:
    """The norms of one scope."""

    facts: Facts
    scope: Scope
    found: dict[Node, Norm] = field(default_factory=dict)  # by root
    claimed: dict[Node, Norm] = field(default_factory=dict)

    def norms(self) -> Iterator[Norm]:
        order = self.facts.in_order(self.scope)
        statics = Statics(self.facts)
        self.moments = Moments(self.facts, self.scope, statics)
        self.exponentials = Exponentials(self.moments)
        forward = [node for node in order if node.inputs and node.outputs]  # no Constant
        for node in forward:
            self.moments.visit(node)
            self.exponentials.visit(node)
        backward = forward[::-1]
        for node in backward:
            self._claim(self._activation(node))
        for node in backward:
            self._claim(self._softmax(node))
        for node in backward:
            self._claim(self._normal(node))
        for node in forward:
            self._claim(self._standardized(node))
        for node in forward:
            self._claim(self._operator(node))
        for node in backward:
            self._claim(self._near_miss(node))
        for affine in Channelwise(self.moments, frozenset(self.claimed)).affines(forward):
            self._claim(self._affine(affine))
        place = {node: i for i, node in enumerate(order)}
        for root in sorted(self.found, key=lambda n: place[n]):
            norm = self._noted(self._shared(self.found[root]))
            yield replace(norm, nodes=tuple(sorted(norm.nodes, key=lambda n: place[n])))

    def _claim(self, norm: Norm | None) -> None:
        if norm is None:
            return
        self.found[norm.node] = norm
        for inner in norm.nodes:
            self.claimed.setdefault(inner, norm)

    def _free(self, node: Node) -> bool:
        named = bool(node.outputs) and bool(node.outputs[0].name)
        return named and bool(node.inputs) and node not in self.claimed

    # ** norms by their moments **

    def _normal(self, node: Node) -> Norm | None:
        """The outermost norm whose result `node` computes."""
        if not self._free(node) or not self._may_end(node):
            return None
        operator = norm_operator(node, None) is not None
        found: list[tuple[Norm, Escape | None]] = []
        for reading in self.moments.readings(node.outputs[0]):
            normal = self.moments.normal(reading) if isinstance(reading, Form) else None
            if not isinstance(normal, Normal):
                continue
            region = slice_back(self.moments, node, normal.base)
            if region is None or not self._may_share(region.nodes, normal):
                continue
            if operator and len(region.nodes) == 1:
                continue  # it is listed as the operator it is
            norm = self._named(normal, region)
            if norm is None:
                continue
            if region.escape is not None:
                if self._ends_at(region.escape.value, normal):
                    continue  # a smaller norm ends where others read: its turn comes
                norm = replace(norm, obstacle=region.escape.reason, obstacle_at=region.escape.node)
            found.append((norm, region.escape))
        best = self._outermost(found)
        if best is not None and operator and self._reads_centred(best, node):
            best = None  # the operator by itself, on a tensor that others read as well
        return best if best is None else self._extended(best)

    def _reads_centred(self, norm: Norm, node: Node) -> bool:
        """Whether what stands in the way of a norm is that others read what an operator reads."""
        at = norm.obstacle_at
        return at is not None and self.moments.source(node.inputs[0]) is at.outputs[0]

    def _outermost(self, found: list[tuple[Norm, Escape | None]]) -> Norm | None:
        """The largest of several readings of one result.

        Where what it centres is read by others too, that is a tensor by itself, and the RMS norm
        over it is what can be treated.
        """
        if not found:
            return None
        best, escape = max(found, key=lambda f: len(f[0].nodes))
        if escape is not None:
            for norm, inner in found:
                if inner is None and self.moments.source(norm.input) is escape.value:
                    return norm
        return best

    def _may_share(self, nodes: tuple[Node, ...], normal: Normal) -> bool:
        """Whether what is claimed already are statistics of the same tensor in another norm."""
        for node in nodes:
            other = self.claimed.get(node)
            if other is not None:
                same = self.moments.source(other.input) is normal.base
                if not same or other.node is node or other.operator:
                    return False
        return True

    def _shared(self, norm: Norm) -> Norm:
        """A norm whose inner values are read only by norms of the same tensor has no obstacle."""
        if not norm.obstacle or not norm.recognised:
            return norm
        others: dict[Node, None] = {}
        for node in norm.nodes:
            for value in node.outputs:
                if node is norm.node or not value.name:
                    continue
                if self.facts.pinned(value) is not None:
                    return norm
                for use in self.facts.uses(value):
                    if use.node not in norm.nodes:
                        others[use.node] = None
        base = self.moments.source(norm.input)
        for node in others:
            other = self.claimed.get(node)
            if other is None or self.moments.source(other.input) is not base:
                return norm
            if not other.recognised:
                return norm
        note = "it shares its statistics with another norm of the same tensor"
        return replace(norm, obstacle="", obstacle_at=None, notes=(*norm.notes, note))

    def _may_end(self, node: Node) -> bool:
        """Whether a norm can end at a node: not at a mere copy, but for the Cast that goes back."""
        if node.outputs[0] not in self.moments.origin:
            return True
        if node.op != "Cast":
            return False
        base = next((r.base for r in self.moments.readings(node.outputs[0])), None)
        types = [self.facts.type(v) for v in (base, node.inputs[0], node.outputs[0]) if v]
        if len(types) < 3 or None in types:
            return False
        first, inner, outer = (t.element for t in types if t is not None)
        return first == outer != inner

    def _ends_at(self, value: AnyValue, normal: Normal) -> bool:
        """Whether a value is itself a norm of the same tensor."""
        for reading in self.moments.readings(value):
            if isinstance(reading, Form) and reading.base is normal.base:
                smaller = self.moments.normal(reading)
                if isinstance(smaller, Normal) and smaller.kind == normal.kind:
                    return True
        return False

    def _named(self, normal: Normal, region: Region) -> Norm | None:
        """A norm by its moments under the name of its kind; None where a smaller one is it."""
        base, statistic = normal.base, normal.statistic
        rank = self.moments.rank(base)
        varying = self._varying(normal, rank)
        if varying is None:
            return None
        axes, kind = statistic.axes, normal.kind
        spatial = rank is not None and rank > 2 and axes == tuple(range(2, rank))
        # TensorFlow has the channels last.
        last = rank is not None and rank > 2 and axes == tuple(range(1, rank - 1))
        per_channel = (spatial and varying == {1}) or (
            last and rank is not None and varying == {rank - 1}
        )
        miss = ""
        if statistic.groups:
            if kind != "layer_norm" or not varying <= {statistic.channel}:
                return None
            kind = "group_norm"
            if statistic.groups == self._dim(base, statistic.channel) and rank and rank > 2:
                kind = "instance_norm"
                axes = tuple(a for a in range(1, rank) if a != statistic.channel)
        elif kind == "layer_norm":
            whole = rank is not None and len(axes) == rank
            if rank is not None and rank > 1 and 0 in axes and not whole:
                kind, miss = "batch_norm", "its statistics come from the batch, as in training"
            elif per_channel:
                kind = "instance_norm"
            elif not self._belongs(normal, rank, axes):
                return None
            elif not varying and (
                (spatial and rank != 3)
                or (axes == (2,) and rank in (3, None) and self._modulated(region.root))
            ):
                kind = "instance_norm"
        elif kind == "rms_norm":
            if per_channel:
                kind = "filter_response_norm"
            elif not self._belongs(normal, rank, axes):
                return None
        elif not varying <= set(axes) or normal.beta is not None:
            return None
        return Norm(
            kind,
            region.root,
            region.nodes,
            region.input,
            region.root.outputs[0],
            axes,
            normal.epsilon,
            recognised=not miss,
            reason=miss,
            at=region.root if miss else None,
            gamma=normal.gamma,
            beta=normal.beta,
            rule=normal.rule,
            groups=statistic.groups,
            channel=statistic.channel,
        )

    def _belongs(self, normal: Normal, rank: int | None, axes: tuple[int, ...]) -> bool:
        """Whether gamma and beta are those of a norm over some axes.

        They vary along these axes; a gamma along all of them may vary along others too, as one for
        each head of an attention does.
        """
        own = set(axes)
        gamma = self._varying(replace(normal, beta=None), rank) or set()
        # Along an axis whose size is not known a gamma could as well expand its input.
        known = all(self._dim(normal.base, axis) is not None for axis in gamma - own)
        wide = own | gamma if own <= gamma and known else own
        return (self._varying(normal, rank) or set()) <= wide

    def _varying(self, normal: Normal, rank: int | None) -> set[int] | None:
        """The axes along which gamma or beta vary; None where they cannot be told from others."""
        varying: set[int] = set()
        for array in (normal.gamma, normal.beta):
            if array is not None:
                varying |= {a - array.ndim for a, n in enumerate(array.shape) if n > 1}
        if not varying:
            return varying
        if rank is None:
            return varying if normal.statistic.axes[0] < 0 else None
        return {a + rank for a in varying}

    def _modulated(self, root: Node) -> bool:
        """Whether the result is multiplied by something computed per channel, as AdaIN does it."""
        for use in self.facts.uses(root.outputs[0]):
            if use.node.op == "Mul" and not use.node.domain:
                known = self.facts.type(use.node.inputs[1 - use.index])
                shape = known.shape if known is not None else None
                if shape is not None and shape[-1:] == (1,) and shape[-2:-1] not in ((), (1,)):
                    return True
        return False

    def _dim(self, value: AnyValue, axis: int) -> int | None:
        shape = self.moments.statics.shape_of(value)
        dim = shape[axis] if shape is not None and axis < len(shape) else None
        return dim if isinstance(dim, int) else None

    def _meant(self, norm: Norm) -> float | None:
        if norm.epsilon is None:
            return None
        known = self.facts.type(norm.input)
        element = known.element if known is not None else 0
        tolerance = _HALF_ULP.get(element, _HALF_ULP[onnx.TensorProto.FLOAT])
        for digits in range(1, 17):
            candidate = float(f"{norm.epsilon:.{digits}g}")
            if abs(candidate - norm.epsilon) <= tolerance * abs(norm.epsilon):
                return candidate
        return norm.epsilon

    def _extended(self, norm: Norm) -> Norm:
        """A filter response norm goes on through the maximum with its threshold."""
        if norm.kind == "filter_response_norm" and not norm.obstacle:
            uses = self.facts.uses(norm.output)
            if len(uses) == 1 and self.facts.pinned(norm.output) is None:
                after = uses[0].node
                if after.op == "Max" and len(after.inputs) == 2 and after.scope is self.scope:
                    other = after.inputs[1 - uses[0].index]
                    if self.moments.statics.array(other) is not None:
                        return replace(
                            norm,
                            node=after,
                            nodes=(*norm.nodes, after),
                            output=after.outputs[0],
                            notes=(*norm.notes, f"its threshold is the Max '{after.label}'"),
                        )
        return norm

    # ** softmax **

    def _softmax(self, node: Node) -> Norm | None:
        if not self._free(node):
            return None
        part = self.exponentials.normal(node.outputs[0])
        if part is None or node.op in ("Softmax", "LogSoftmax"):
            return None
        region = slice_back(self.moments, node, part.base)
        if region is None or any(n in self.claimed for n in region.nodes):
            return None
        norm = Norm(
            part.what,
            node,
            region.nodes,
            region.input,
            node.outputs[0],
            part.axes,
            stable=part.stable,
        )
        if region.escape is not None:
            if self.exponentials.normal(region.escape.value) is not None:
                return None
            norm = replace(norm, obstacle=region.escape.reason, obstacle_at=region.escape.node)
        return norm

    # ** operators **

    def _operator(self, node: Node) -> Norm | None:
        if not self._free(node):
            return None
        rank = self.moments.rank(node.inputs[0])
        known = norm_operator(node, rank)
        if known is None:
            return None
        return Norm(
            known.kind,
            node,
            (node,),
            node.inputs[0],
            node.outputs[0],
            known.axes,
            known.epsilon,
            recognised=not known.reason,
            reason=known.reason,
            at=node if known.reason else None,
            gamma=self._factor(node, known.scale),
            beta=self._factor(node, known.bias),
            groups=int(node.attrs.get("num_groups", 0)) if known.kind == "group_norm" else 0,
            operator=True,
        )

    def _factor(self, node: Node, index: int | None) -> AnyValue | None:
        if index is None or index >= len(node.inputs) or not node.inputs[index].name:
            return None
        value: AnyValue = node.inputs[index]
        return value

    # ** normalization and activation in one **

    def _activation(self, node: Node) -> Norm | None:
        """EvoNorm: x * sigmoid(v x) / std, and x / max(std_batch, v x + std_instance)."""
        if node.op not in ("Div", "Mul") or node.domain or not self._free(node):
            return None
        operands = [node.inputs] if node.op == "Div" else [node.inputs, node.inputs[::-1]]
        for value, divisor in operands:
            core = self._evo_s0(node, value, divisor) or self._evo_b0(node, value, divisor)
            if core is not None:
                return self._with_affine(core)
        return None

    def _deviation(self, value: AnyValue, power: int) -> Form | None:
        """A standard deviation, or its inverse, as a form; None for anything else."""
        for reading in self.moments.readings(value):
            if (
                isinstance(reading, Form)
                and reading.root is not None
                and reading.root.kind == "variance"
                and reading.layout is None
                and not reading.full
                and [p[3] for p in reading.terms] == [power]
            ):
                return reading
        return None

    def _evo_s0(self, node: Node, value: AnyValue, divisor: AnyValue) -> Norm | None:
        form = self._deviation(divisor, 1 if node.op == "Div" else -1)
        gated = self.facts.producer(value)
        if form is None or form.root is None or gated is None or gated.op != "Mul":
            return None
        for x, gate in (gated.inputs, gated.inputs[::-1]):
            sigmoid = self.facts.producer(gate)
            if sigmoid is None or sigmoid.op != "Sigmoid":
                continue
            scaled = self._is_scaled(sigmoid.inputs[0], form.base)
            if scaled and self.moments.source(x) is form.base:
                return self._evo(node, form)
        return None

    def _evo_b0(self, node: Node, value: AnyValue, divisor: AnyValue) -> Norm | None:
        larger = self.facts.producer(divisor)
        if node.op != "Div" or larger is None or larger.op != "Max" or len(larger.inputs) != 2:
            return None
        for constant, other in (larger.inputs, larger.inputs[::-1]):
            total = self.facts.producer(other)
            if not self._is_constant(constant) or total is None or total.op != "Add":
                continue
            for scaled, deviation in (total.inputs, total.inputs[::-1]):
                form = self._deviation(deviation, 1)
                if form is None or not self._is_scaled(scaled, form.base):
                    continue
                if self.moments.source(value) is form.base:
                    return self._evo(node, form)
        return None

    def _is_constant(self, value: AnyValue) -> bool:
        """Whether a value is a constant, or one that is only expanded at run time."""
        made = self.facts.producer(value)
        if made is not None and made.op == "Expand":
            value = made.inputs[0]
        return self.moments.statics.array(value) is not None

    def _is_scaled(self, value: AnyValue, base: AnyValue) -> bool:
        """Whether a value is the base, or a constant times it."""
        if self.moments.source(value) is base:
            return True
        made = self.facts.producer(value)
        return (
            made is not None
            and made.op == "Mul"
            and any(self.moments.source(v) is base for v in made.inputs)
            and any(self.moments.statics.array(v) is not None for v in made.inputs)
        )

    def _evo(self, node: Node, form: Form) -> Norm | None:
        assert form.root is not None
        assert form.statistic is not None
        region = slice_back(self.moments, node, form.base)
        if region is None:
            return None
        n = self.moments.elements(form)
        total = form.root.factor * (n ** (form.root.halves / 2) if n else 1)
        return Norm(
            "evo_norm",
            node,
            region.nodes,
            region.input,
            node.outputs[0],
            form.statistic.axes,
            form.root.epsilon / total,
            groups=form.statistic.groups,
            obstacle=region.escape.reason if region.escape else "",
            obstacle_at=region.escape.node if region.escape else None,
        )

    def _with_affine(self, norm: Norm) -> Norm:
        """A norm with the constant Mul and Add that follow it."""
        for ops in (("Mul",), ("Add",)):
            uses = self.facts.uses(norm.output)
            if len(uses) != 1 or self.facts.pinned(norm.output) is not None:
                break
            after = uses[0].node
            if after.op not in ops or after.scope is not self.scope or not self._free(after):
                continue
            if self.moments.statics.array(after.inputs[1 - uses[0].index]) is not None:
                nodes = (*norm.nodes, after)
                norm = replace(norm, node=after, nodes=nodes, output=after.outputs[0])
        return norm

    # ** near misses **

    def _near_miss(self, node: Node) -> Norm | None:
        if not self._free(node) or not self._may_end(node):
            return None
        out = node.outputs[0]
        if out in self.exponentials.misses:
            kind, base, over, reason, at = self.exponentials.misses[out]
            return self._missed(kind, node, base, over, reason, at)
        best: Norm | None = None
        for reading in self.moments.readings(out):
            axes = reading.statistic.axes if reading.statistic is not None else None
            if isinstance(reading, Miss):
                if reading.stage != "norm":
                    continue
                at, why = reading.node, reading.reason
            else:
                said = self.moments.normal(reading)
                if isinstance(said, Normal) and self._varying(said, None) is None:
                    said = f"rank unknown at '{reading.base.name}', which its factors need"
                if not isinstance(said, str):
                    continue
                at, why = self._first_to_fail(node, reading.base, said), said
            norm = self._missed(reading.kind, node, reading.base, axes, why, at)
            if norm is not None and (best is None or self._reach(norm) > self._reach(best)):
                best = norm
        return best

    def _reach(self, norm: Norm) -> tuple[int, bool]:
        """How much a near miss covers; of two that cover the same that of the outer input more."""
        return len(norm.nodes), self.facts.producer(norm.input) not in norm.nodes

    def _first_to_fail(self, node: Node, base: AnyValue, said: str) -> Node:
        """The first of the nodes behind a form that is no norm for the same reason."""
        for value in node.inputs:
            made = self.facts.producer(value)
            for reading in self.moments.readings(value) if made is not None else ():
                if not isinstance(reading, Form) or reading.base is not base or made is None:
                    continue
                if self.moments.normal(reading) == said:
                    return self._first_to_fail(made, base, said)
        return node

    def _missed(
        self, kind: str, node: Node, base: AnyValue, axes: Axes, reason: str, at: Node
    ) -> Norm | None:
        region = slice_back(self.moments, node, base, partly=True)
        if region is None:
            return None
        inner = [self.claimed[n] for n in region.nodes if n in self.claimed]
        if any(not norm.obstacle for norm in inner):
            return None  # that part is a norm, and will be treated as one
        return Norm(
            kind,
            node,
            region.nodes,
            region.input,
            node.outputs[0],
            axes,
            recognised=False,
            reason=reason,
            at=at,
        )

    # ** per channel **

    def _affine(self, affine: Affine) -> Norm | None:
        if any(node in self.claimed for node in affine.nodes):
            return None
        return Norm(
            affine.kind,
            affine.nodes[-1],
            affine.nodes,
            affine.base,
            affine.nodes[-1].outputs[0],
            affine.axes,
            affine.epsilon,
            gamma=affine.scale,
            beta=affine.shift,
        )

    # ** weights **

    def _standardized(self, node: Node) -> Norm | None:
        """A weight that is standardized in the graph: a subgraph on constants."""
        if node.op not in ("Conv", "ConvTranspose") or node.domain or len(node.inputs) < 2:
            return None
        value = node.inputs[1]
        made = self.facts.producer(value)
        if made is None or made in self.claimed or made.op == "Constant":
            return None
        if self.facts.constant(value) is not None:
            return None
        nodes: dict[Node, None] = {}
        leaves: list[Constant] = []
        pending = [value]
        while pending:
            at = pending.pop()
            known = self.facts.constant(at) if at.name else None
            source = self.facts.producer(at)
            if known is not None:
                leaves.append(known)
            elif source is None or source.scope is not self.scope:
                if at.name:
                    return None
            elif source not in nodes:
                nodes[source] = None
                pending += source.inputs
        ops = {n.op for n in nodes}
        means = ops & {"ReduceMean", "ReduceSum"} and ops & {"Sqrt", "Pow", "ReduceL2"}
        # Batch statistics of a constant are constant too: some networks standardize with them.
        if not (means and "Sub" in ops) and "BatchNormalization" not in ops:
            return None
        weight = max(leaves, key=lambda c: c.nbytes, default=None)
        if weight is None:
            return None
        epsilons = [
            scalar
            for n in nodes
            if n.op in ("Add", "Max", "Clip")
            for v in n.inputs[1:] + n.inputs[:1]
            if (scalar := self.moments.statics.scalar(v)) is not None
        ]
        epsilons += [n.attrs.get("epsilon", 1e-5) for n in nodes if n.op == "BatchNormalization"]
        return Norm(
            "weight_standardization",
            made,
            tuple(nodes),
            weight.source,
            value,
            tuple(range(1, len(weight.shape))),
            epsilons[0] if epsilons else None,
            notes=("the weight is constant, so this can be computed once",),
        )

    # ** what else is there **

    def _noted(self, norm: Norm) -> Norm:
        notes = list(norm.notes)
        if norm.kind == "group_norm" and self._is_gated(norm.output):
            notes.append("a SiLU follows")
        if norm.kind in ("softmax", "log_softmax"):
            notes += self._in_front(norm.input)
        if norm.kind in ("instance_norm", "batch_norm") and self._is_split(norm):
            notes.append("half of an IBN split")
        if norm.kind == "rms_norm" and (centred := self._centred(norm)) is not None:
            notes.append(f"'{centred.name}' is centred in front of a Transpose: a layer norm of it")
        guard = misfused(norm.nodes, self.facts)
        warning = guard.reason if guard is not None else ""
        return replace(
            norm,
            dims=self.moments.statics.shape_of(norm.input),
            notes=tuple(notes),
            warning=warning,
            meant=self._meant(norm),
        )

    def _centred(self, norm: Norm) -> AnyValue | None:
        """What an RMS norm is a layer norm of, where a Transpose stands between its two halves.

        onnxruntime writes it so into the models that it saves: it takes a Transpose in front of a
        decomposed layer norm through x - E[x], where it reads one value instead of two.
        """
        made = self.facts.producer(self.moments.source(norm.input))
        if made is None or made.op != "Transpose" or made.domain or made.parameter("perm"):
            return None
        order = made.attrs.get("perm")
        if order is None or norm.axes is None:
            return None
        wanted = {axis % len(order) for axis in norm.axes}
        for form in self.moments.readings(made.inputs[0]):
            if not isinstance(form, Form) or form.statistic is None or form.statistic.groups:
                continue
            if form.layout is not None or form.root or form.terms.keys() != {X, M}:
                continue
            over = {order.index(axis % len(order)) for axis in form.statistic.axes}
            if over == wanted and np.array_equal(form.terms[X], -form.terms[M]):
                return form.base
        return None

    def _is_gated(self, value: AnyValue) -> bool:
        """Whether x * sigmoid(x) follows."""
        users = [u.node for u in self.facts.uses(value)]
        if [n.op for n in users] == ["Swish"]:
            return True
        if sorted(n.op for n in users) != ["Mul", "Sigmoid"]:
            return False
        sigmoid, mul = sorted(users, key=lambda n: n.op != "Sigmoid")
        return any(v is sigmoid.outputs[0] for v in mul.inputs)

    def _in_front(self, value: AnyValue) -> Iterator[str]:
        made = self.facts.producer(self.moments.source(value))
        if made is not None and made.op == "Add" and self._score_like(made) is not None:
            mask = made.inputs[self._score_like(made) or 0]
            yield f"the mask '{mask.name}' is added in front"
            other = made.inputs[1 - (self._score_like(made) or 0)]
            made = self.facts.producer(self.moments.source(other))
        if made is not None and made.op in ("Mul", "Div") and len(made.inputs) == 2:
            for index in (1, 0) if made.op == "Mul" else (1,):
                scale = self.moments.statics.scalar(made.inputs[index])
                if scale:
                    factor = 1 / scale if made.op == "Div" else scale
                    yield f"a scale of {factor:.6g} stands in front"
                    return

    def _score_like(self, add: Node) -> int | None:
        """Which input of an Add is the mask: the other one comes from a product of matrices."""
        for index in (0, 1):
            made = self.facts.producer(self.moments.source(add.inputs[index]))
            if made is not None and made.op in ("MatMul", "Mul", "Div", "Einsum"):
                return 1 - index
        return None

    def _is_split(self, norm: Norm) -> bool:
        """Whether a norm stands on a part of the channels whose other part is normed otherwise."""
        split = self.facts.producer(norm.input)
        if split is None or split.op not in ("Split", "Slice"):
            return False
        concats = {u.node for u in self.facts.uses(norm.output) if u.node.op == "Concat"}
        other = "batch_norm" if norm.kind == "instance_norm" else "instance_norm"
        for concat in concats:
            for value in concat.inputs:
                made = self.facts.producer(value)
                known = self.claimed.get(made) if made is not None else None
                if known is not None and known.kind == other:
                    return True
        return False


_HALF_ULP: Final[dict[int, float]] = {
    onnx.TensorProto.FLOAT16: 2.0**-11,
    onnx.TensorProto.BFLOAT16: 2.0**-8,
    onnx.TensorProto.FLOAT: 2.0**-23,
    onnx.TensorProto.DOUBLE: 2.0**-23,  # exporters write float32 decimals into float64 models
}
