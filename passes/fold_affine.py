"""Fold a constant affine map per channel into its linear neighbours.

    s * (W x + b) + t  ->  (s * W) x + (s * b + t)        into what feeds it
    (s * x + t) W + b  ->  x (diag(s) W) + (b + t W)      else into all that reads it
    norm(x + t)        ->  norm(x)                        or to what ignores it

The map is a BatchNormalization with fixed statistics that stands behind something else than a
convolution, a batch normalization that was written out, or a chain of Mul, Add, Sub and Div with
constants, as LayerScale is. It flows through what moves channels (Transpose, Reshape, Slice, Split,
Concat, DepthToSpace ...), through sums and products, pools and resizes, and, where its factors are
positive and it has no shift, through ReLU and its kin, to Conv, ConvTranspose, Gemm and MatMul,
grouped or not, to another batch normalization, or to the scale and bias of a norm. A scale that
finds its place where the shift does not leaves one Add. Exact over the reals. In floating point s
and t are formed in float64 and every constant is rounded once. Source: the definitions of these
operators in the ONNX operator specification.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx

from onnxnorm import storage
from onnxnorm.affine import LARGEST, Affine, Vector, read, slim
from onnxnorm.change import copied, oversized, stage
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.flow import (
    Addition,
    Flow,
    changed_inputs,
    dtype_of,
    fits,
    rewire,
    stage_flow,
)
from onnxnorm.flow_back import flow_back
from onnxnorm.flow_forth import flow_forth, ignored
from onnxnorm.module import Node, Value
from onnxnorm.norm_operators import norm_operator
from onnxnorm.norms import Norm, find_norms
from onnxnorm.port import is_real, rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Stop, Transfer


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Remove affine maps per channel beside linear operators.

    Attributes:
        max_copy_mb: A weight that others read too is copied; refuse copies larger than this, all
            those of one map together.
        max_growth: By what share of its size a model may grow by such copies; a megabyte it may.
    """

    max_copy_mb: int = 256
    max_growth: float = 0.25

    name: ClassVar = "fold-affine"
    summary: ClassVar = "scales and shifts per channel into the linear operators beside them"
    equation: ClassVar = "s (W x + b) + t -> (s W) x + (s b + t)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every constant affine map per channel, but those that fold-batchnorm is for."""
        norms = find_norms(facts)
        transfer = Transfer(facts, find_sizes(facts))
        room = self._room(facts)
        for norm in norms:
            if norm.kind not in ("batch_norm", "channel_affine") or not norm.recognised:
                continue
            behind = _behind_convolution(norm, facts)
            if behind and len(facts.uses(norm.input)) == 1 and facts.pinned(norm.input) is None:
                continue
            affine = read(norm, transfer)
            if isinstance(affine, str):
                decided: Plan | Refusal = Refusal(affine, norm.node.label, node=norm.node)
            else:
                decided = self._decided(norm, affine, transfer)
            if isinstance(decided, Plan):
                size, largest = copied(decided.detail.flow.changes, facts)
                if size > 0 and size > room and largest is not None:
                    told = f"copies take {size / 1e6:.0f} MB, and the model may not grow by so much"
                    advice = "Raise fold-affine{max_growth=...}."
                    decided = Refusal(told, largest.node.label, advice, norm.node)
                else:
                    room -= size
            if isinstance(decided, Plan) or not behind:
                yield decided
        listed = {node for norm in norms for node in norm.nodes}
        for node in facts.module.nodes():
            if node.domain == "" and node not in listed:
                yield from self._unlisted(node, transfer)

    def _room(self, facts: Facts) -> float:
        """By how many bytes the model may still grow, after what it has grown in this run."""
        before = facts.module.stored.proto.graph.initializer
        now = (w.proto for w in facts.module.main.weights)
        grown = _bytes(t for t in now if isinstance(t, onnx.TensorProto)) - _bytes(before)
        return max(1e6, self.max_growth * facts.module.bytes_read) - grown

    def _unlisted(self, node: Node, transfer: Transfer) -> Iterator[Plan]:
        """What is no row of a report and can go all the same: scalars, and biases that are ignored.

        A scalar goes through layout operators only, to where the weight is not shared: what stands
        farther away is part of activations and of attention, which runtimes fuse as they are.
        """
        facts = transfer.facts
        if node.op in ("Mul", "Div"):
            found = _scalar(node, facts)
            if found is None:
                return
            value, factor = found
            norm = Norm("channel_affine", node, (node,), value, node.outputs[0])
            back = self._way_back(norm, Affine.of(factor), transfer)
            if isinstance(back, Refusal) or back.additions:
                return
            near = all(n in back.ends or n.op in _LAYOUT for n in back.between)
            if not near or copied(back.changes, facts)[0] > 0:
                return
            fold = self._fold(norm, back, True, None, transfer)  # reads the weights
            if isinstance(fold, Fold):
                yield fold.plan()
        elif node.op in ("Add", "Conv", "ConvTranspose"):
            bias = _bias(node, transfer)
            if bias is None or not bias.any():
                return
            flow = ignored(node.outputs[0], bias, transfer)
            if flow is None or not flow.results:  # nothing reads it
                return
            nodes = (node, *flow.nodes)
            results = tuple(flow.results)
            ended = next(iter(flow.results))
            maker = facts.producer(ended)
            into = "" if maker is None else maker.op
            yield Plan(node, nodes, Ignored(node), outputs=results, into=into)

    def _decided(self, norm: Norm, affine: Affine, transfer: Transfer) -> Plan | Refusal:
        """The way that leaves the fewest additions, of those that save something."""
        back = self._back(norm, affine, transfer)
        if isinstance(back, Fold) and not back.cost:
            return back.plan()
        forth = self._forth(norm, affine, transfer)
        found = [f for f in (back, forth) if isinstance(f, Fold)]
        if affine.shifts and affine.scales and len(norm.nodes) > 1:
            scale = Affine.of(affine.scale)
            parts = (
                self._back(norm, scale, transfer, affine),
                self._forth(norm, scale, transfer, affine),
            )
            found += [f for f in parts if isinstance(f, Fold)]
        paying = [f for f in found if f.pays]
        if paying:
            return min(paying, key=lambda f: (f.cost, f.traffic(transfer))).plan()
        refusals = [f.unpaid() if isinstance(f, Fold) else f for f in (back, forth)]
        first, second = refusals
        reason = f"{first.reason}; nor into what reads it: {second.reason}"
        return Refusal(reason, first.at, first.advice or second.advice, node=norm.node)

    def _back(
        self, norm: Norm, affine: Affine, transfer: Transfer, whole: Affine | None = None
    ) -> Fold | Refusal:
        flow = self._way_back(norm, affine, transfer)
        if isinstance(flow, Refusal):
            return flow
        return self._fold(norm, flow, True, None if whole is None else whole.shift, transfer)

    def _way_back(self, norm: Norm, affine: Affine, transfer: Transfer) -> Flow | Refusal:
        first = next(n for n in norm.nodes if norm.input in n.inputs)
        flow = flow_back(norm.input, affine, first, transfer)
        if isinstance(flow, Stop):
            return flow.refusal(norm.node)
        facts = transfer.facts
        maker = facts.producer(norm.input)
        assert maker is not None, "something makes what flows back"
        others = [u.node for u in facts.uses(norm.input) if u.node not in norm.nodes]
        several = sum(bool(v.name) for v in maker.outputs) > 1
        if (pinned := facts.pinned(norm.output)) is not None and (others or several):
            reads = f"'{others[0].label}' reads '{norm.input.name}' too" if others else ""
            told = reads or f"'{maker.label}' has several outputs"
            reason = f"{told}, and '{norm.output.name}' is {pinned}"
            return Refusal(reason, maker.label, node=norm.node)
        return flow

    def _forth(
        self, norm: Norm, affine: Affine, transfer: Transfer, whole: Affine | None = None
    ) -> Fold | Refusal:
        if unread := transfer.facts.unread(norm.output):
            return Refusal(unread, norm.node.label, node=norm.node)
        flow = flow_forth(norm.output, affine, transfer)
        if isinstance(flow, Stop):
            return flow.refusal(norm.node)
        rest = None
        if whole is not None:
            if not (whole.scale != 0.0).all():
                return Refusal("a channel is multiplied by 0", norm.node.label, node=norm.node)
            rest = slim(whole.shift / whole.scale)
        return self._fold(norm, flow, False, rest, transfer)

    def _fold(
        self, norm: Norm, flow: Flow, back: bool, rest: object, transfer: Transfer
    ) -> Fold | Refusal:
        """The fold where every constant can hold what it becomes."""
        kept: Addition | None = None
        if rest is not None:
            dtype = dtype_of(norm.output, transfer.facts)
            if dtype is None or not isinstance(norm.output, Value):
                return Refusal("its type is not known", norm.node.label, node=norm.node)
            kept = Addition(norm.output, slim(np.asarray(rest)), dtype)
        added = [a.change(norm.node) for a in (*flow.additions, *([kept] if kept else []))]
        for change in (*flow.changes, *added):
            if (misfit := change.misfit()) is not None:
                return Refusal(misfit, change.node.label, node=norm.node)
        too_large = oversized(flow.changes, transfer.facts, self.max_copy_mb, self.name, norm.node)
        if too_large is not None:
            return too_large
        return Fold(norm, flow, back, kept, transfer.facts)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Change the constants; what fed the map computes its result, or what read it reads x."""
        fold: Fold | Ignored = plan.detail
        if isinstance(fold, Ignored):
            _apply_ignored(fold.node, rw)
        elif fold.back:
            _apply_back(fold, rw)
        else:
            _apply_forth(fold, rw)


@dataclass(frozen=True, eq=False)
class Ignored:
    """A node that adds a constant which nothing behind it sees."""

    node: Node


@dataclass(frozen=True, eq=False)
class Fold:
    """One row, and where its map goes.

    Attributes:
        norm: The row.
        flow: What changes.
        back: Against the edges.
        kept: The shift that stays where the row is; None where it went too.
        facts: What is true of the graph.
    """

    norm: Norm
    flow: Flow
    back: bool
    kept: Addition | None
    facts: Facts

    @property
    def cost(self) -> int:
        """How many nodes stay or come."""
        return len(self.flow.additions) + (self.kept is not None)

    def traffic(self, transfer: Transfer) -> int:
        """How many numbers its additions read and write, for each example of a batch."""
        kept = [] if self.kept is None else [self.kept]
        total = 0
        for addition in (*self.flow.additions, *kept):
            dims = transfer.sizes.of(addition.value) or ()
            total += 2 * math.prod(n for n in dims if isinstance(n, int)) + addition.shift.size
        return total

    @property
    def pays(self) -> bool:
        """Whether nodes go; a BatchNormalization may become one Add of as many numbers."""
        gain = len(self.norm.nodes)
        return self.cost < gain or (self.cost == gain == 1 and self.norm.operator and self.back)

    def unpaid(self) -> Refusal:
        """Why it saves nothing."""
        at = self.flow.additions[0].value if self.flow.additions else self.norm.output
        node = self.facts.producer(at) or self.norm.node
        convolves = node.op in ("Conv", "ConvTranspose")
        lack = "pads with what is not shifted" if convolves else "has no bias"
        reason = f"'{node.label}' {lack}, and an Add behind it would save nothing"
        return Refusal(reason, node.label, node=self.norm.node)

    def plan(self) -> Plan:
        """It as a plan."""
        flow, norm = self.flow, self.norm
        ends = list(flow.ends) or list(flow.between)
        nodes = tuple(dict.fromkeys((*flow.nodes, *norm.nodes)))
        into = next((n.op for n in ends if n.op not in ("Add", "Sub")), ends[0].op if ends else "")
        if self.back:
            if not self.keeps_name:
                return Plan(norm.node, nodes, self, into=into)
            # What reads the result reads x: another change of the readers has to wait.
            readers = tuple(dict.fromkeys(u.node for u in self.facts.uses(norm.output)))
            results = tuple(v for n in readers for v in n.outputs if v.name)
            nodes = tuple(dict.fromkeys((*nodes, *readers)))
            return Plan(norm.node, nodes, self, outputs=results, local=bool(results), into=into)
        results = tuple(flow.results)
        return Plan(norm.node, nodes, self, outputs=results, local=bool(results), into=into)

    @property
    def keeps_name(self) -> bool:
        """Whether what makes x goes on making x, and the name of the result goes.

        It has to where several results share a node, and where others read x that do not see the
        difference; and a norm in front is a row of its own.
        """
        x, maker = self.norm.input, self.facts.producer(self.norm.input)
        here = self.kept is not None or any(a.value is x for a in self.flow.additions)
        if maker is None or here or self.facts.pinned(self.norm.output) is not None:
            return False
        several = sum(bool(v.name) for v in maker.outputs) > 1
        others = any(u.node not in self.norm.nodes for u in self.facts.uses(x))
        named = maker in self.flow.ends and norm_operator(maker, None) is not None
        return several or others or named


def _apply_back(fold: Fold, rw: Rewriter) -> None:
    norm, flow, facts = fold.norm, fold.flow, fold.facts
    x, result = norm.input, norm.output
    assert isinstance(result, Value), "a node computes it"
    weights = {c.node for c in flow.changes if not c.bias and c.constant is not None}
    named = dict.fromkeys(flow.ends, result.name) if len(weights) <= 1 else {}
    inputs = stage(flow.changes, rw, named)
    own: Addition | None = fold.kept
    for addition in flow.additions:
        if addition.value is x:
            own = addition
            continue
        inputs.update(_added(addition, rw, result.name if named else ""))
    last = facts.producer(x)
    assert last is not None, "something makes what flows back"
    if own is not None:
        rewire(rw, inputs)
        bias = rw.constant("bias", rounded(own.shift, own.dtype), name=f"{result.name}_bias")
        rw.replace("Add", [x, bias])
        return
    if fold.keeps_name:
        rewire(rw, inputs)
        rw.redirect(result, x)
        return
    rewire(rw, {key: v for key, v in inputs.items() if key[0] is not last})
    rw.replace_like(last, changed_inputs(last, inputs))


def _apply_forth(fold: Fold, rw: Rewriter) -> None:
    norm, flow = fold.norm, fold.flow
    result = norm.output
    assert isinstance(result, Value), "a node computes it"
    stage_flow(flow, rw)
    if fold.kept is None:
        rw.redirect(result, norm.input)
        return
    bias = rounded(fold.kept.shift, fold.kept.dtype)
    rw.replace("Add", [norm.input, rw.constant("bias", bias, name=f"{result.name}_bias")])


def _added(addition: Addition, rw: Rewriter, name: str) -> dict[tuple[Node, int], AnyValue]:
    """An Add behind a value, and the inputs that read it from then on."""
    value = addition.value
    array = rounded(addition.shift, addition.dtype)
    bias = rw.constant("bias", array, behind=value, name=f"{name or value.name}_bias")
    shifted = rw.add("Add", [value, bias], "shifted", behind=value)
    return {(u.node, u.index): shifted for u in rw.facts.uses(value)}


def _apply_ignored(node: Node, rw: Rewriter) -> None:
    if node.op != "Add":
        rw.replace_like(node, node.inputs[:2])
        return
    index = 0 if rw.facts.constant(node.inputs[0]) is None else 1
    rw.redirect(node.outputs[0], node.inputs[index])


# Where channels only move, and where a scalar may pass on its way to a weight.
_LAYOUT: Final = frozenset(
    {
        "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
        "Unsqueeze",
    }
)  # fmt: skip


def _scalar(node: Node, facts: Facts) -> tuple[AnyValue, float] | None:
    """What a node multiplies by one number, and the number; None where it does something else."""
    if len(node.inputs) != 2 or node.scope.opsets[""] < 7:
        return None
    for index, value in enumerate(node.inputs):
        constant = facts.constant(value)
        if constant is None or (node.op == "Div" and index == 0):
            continue
        other = node.inputs[1 - index]
        if math.prod(constant.shape) != 1 or not is_real(constant.dtype):
            return None
        rank, known = facts.type(other), len(constant.shape)
        if rank is None or rank.shape is None or len(rank.shape) < known:
            return None  # the constant may add axes
        number = float(constant.float64().reshape(-1)[0])
        if facts.constant(other) is not None or not np.isfinite(number) or number == 0.0:
            return None
        return other, 1.0 / number if node.op == "Div" else number
    return None


def _bias(node: Node, transfer: Transfer) -> Vector | None:
    """The constant that a node adds, as an array that broadcasts against its result."""
    facts = transfer.facts
    if node.op == "Add":
        known = [facts.constant(v) for v in node.inputs]
        constants = [c for c in known if c is not None]
        value = next((v for v, c in zip(node.inputs, known, strict=True) if c is None), None)
        if len(constants) != 1 or value is None or node.scope.opsets[""] < 7:
            return None
        if facts.pinned(node.outputs[0]) is not None:
            return None
        (constant,) = constants
        rank = transfer.rank(value)
        if math.prod(constant.shape) > LARGEST or rank is None or rank < len(constant.shape):
            return None
        if not is_real(constant.dtype):
            return None
        shift = slim(constant.float64())
        return shift if fits(value, Affine.of(1.0, shift), transfer) else None
    given = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
    bias = None if given is None else facts.constant(given)
    rank = transfer.rank(node.outputs[0])
    if bias is None or rank is None or rank < 3 or not is_real(bias.dtype):
        return None
    return bias.float64().reshape(-1, *(1,) * (rank - 2))


def _bytes(tensors: Iterable[onnx.TensorProto]) -> int:
    return sum(storage.payload_size(t) for t in tensors if t.data_type != t.STRING)


def _behind_convolution(norm: Norm, facts: Facts) -> bool:
    """Whether fold-batchnorm has a say: it tells its own reasons where it refuses."""
    made = facts.producer(norm.input)
    convolution = made is not None and made.op in ("Conv", "ConvTranspose") and made.domain == ""
    return norm.operator and convolution
