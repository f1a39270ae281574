"""Fold the scales on residual streams into what writes and reads them: affine post-norms vanish.

    h' = a (h + f(h)) + c   ->   h~' = h~ + D^-1 (f(D h~) + c / a)        h = D h~,  D' = a D

An affine norm behind a residual Add (BatchNormalization, Unified Normalization, any constant scale
and shift per channel) cannot go into what reads it, since the next Add is among its readers, nor
into what feeds it, since one side of the Add is the stream. But the whole stream can be stored in
other units: what reads it linearly is multiplied by D, what writes it by D^-1, c goes into the bias
of the branch, and the skip path is a bare Add. Between two places where the stream has to be what
it is, as outputs of the graph or readers that are not linear, one affine stays; and where D leaves
its bounds, one stays and D begins anew behind it. An affine whose shift no bias takes stays whole
unless a node goes with its scale: an Add in place of one BatchNormalization would save nothing, and
what stays takes up any D. Relu and max pooling are crossed where all scales are above 0. In front
of the Relu of a pre-activation the shift goes too: the stream is stored with it, and the next
branch takes it back.

    h' = h + f(relu(a h + c))    ->    h~ = h + c / a,   h~' = h~ + f(a relu(h~)) + c' / a' - c / a

Exact over the reals. In floating point each constant is formed in float64 and rounded
once, and a factor for each feature changes no rounding error but by underflow and overflow, from
which the bound on D keeps away. `onnxnorm.gauge_region` has the rules, and
`onnxnorm.gauge` the choice.

Source: the units of a stream are a change of basis with a diagonal matrix; for norms with fixed
statistics in such networks Q. Yang et al., "Unified Normalization for Accelerating and Stabilizing
Transformers" (2022), and V. P. Dwivedi, X. Bresson, "A Generalization of Transformer Networks to
Graphs" (2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx

from onnxnorm.affine_maps import Map, Vector
from onnxnorm.constant_edits import ConstantEdits
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.gauge import Gauge
from onnxnorm.gauge_region import Region, find_regions
from onnxnorm.gauge_shift import Shifts
from onnxnorm.inverse_moves import undone
from onnxnorm.port import rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.storage import Array
from onnxnorm.transfer import Stop, Transfer, described

_HALF_BOUND: Final = 6  # float16 has 15 binary digits above 1, and activations need the others


@dataclass(frozen=True)
class StreamFoldAffine(Pass):
    """Remove the scales of affine norms from residual streams.

    Attributes:
        bound: How many binary digits the stored stream may differ from the stream; in float16 no
            more than 6.
        max_growth_mb: Weights that are shared are copied where their readers come to differ; refuse
            a stream for which the model would grow by more than this.
    """

    bound: int = 40
    max_growth_mb: int = 32

    name: ClassVar = "stream-fold-affine"
    summary: ClassVar = "affine norms on residual streams into what writes and reads the streams"
    equation: ClassVar = "a (h + f(h)) + c -> h~ + (f(D h~) + c / a) / D"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """One plan for each stream that loses a node; a reason for every scale that stays."""
        transfer = Transfer(facts, find_sizes(facts))
        for region in find_regions(transfer):
            yield from self._decided(region, transfer)

    def _decided(self, region: Region, transfer: Transfer) -> Iterator[Plan | Refusal]:
        facts = transfer.facts
        bound, pinned = self._bound(region, facts), _pinned(region, facts)
        begun = {**self._begun(region), **pinned}
        gauge, change, unpaid = self._settled(region, bound, begun, transfer)
        stays = dict(gauge.stays)
        if begun != pinned:  # those that stay because they stayed before: why they did
            stays.update(Gauge(region, bound, {**pinned, **unpaid}).stays)
        if change.gone or change.undone:
            stop = _apart(region) or change.misfit() or self._grown(change, facts)
            if stop is None:
                yield change.plan()
            else:
                stays.update(dict.fromkeys(gauge.removed, stop))
        for step, stop in stays.items():
            if not step.uniform:
                yield stop.refusal(step.node)

    def _settled(
        self, region: Region, bound: float, kept: dict[Map, Stop], transfer: Transfer
    ) -> tuple[Gauge, Rescaling, dict[Map, Stop]]:
        """The factors with which no map gives way to an Add alone, and the maps that stay for it.

        A map that stays has any ratio of factors and takes shifts as its Add would, so the others
        are as free as before.
        """
        unpaid: dict[Map, Stop] = {}
        while True:
            gauge = Gauge(region, bound, {**kept, **unpaid})
            change = Rescaling(region, gauge, transfer)
            if not change.unpaid:
                return gauge, change, unpaid
            unpaid.update(change.unpaid)

    def _bound(self, region: Region, facts: Facts) -> float:
        half = onnx.TensorProto.FLOAT16
        known = (facts.type(v) for v in region.values)
        narrow = any(t is not None and t.element == half for t in known)
        narrow = narrow or any(w.constant.dtype == np.float16 for w in region.writers)
        return float(min(self.bound, _HALF_BOUND) if narrow else self.bound)

    def _begun(self, region: Region) -> dict[Map, Stop]:
        """The maps at which this pass let the factors begin anew."""
        found = {}
        for step in region.maps:
            if step.scale is not None and step.node.made_by.startswith(f"{self.name}:"):
                told = f"{described(step.node)} is where the stored stream changes its units"
                found[step] = Stop(step.node, told)
        return found

    def _grown(self, change: Rescaling, facts: Facts) -> Stop | None:
        growth, most = change.edits.growth(facts)
        if growth <= self.max_growth_mb * 1_000_000 or most is None:
            return None
        told = f"'{most.name}' and others are shared, and copies would take {growth / 1e6:.0f} MB"
        return Stop(None, told)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Change the constants; what read the result of a map reads its input."""
        change: Rescaling = plan.detail
        change.edits.stage(rw, "rescaled")
        for step, scale, shift in change.written:
            value = step.source
            if scale is not None:
                made = rw.constant("scale", scale, at=step.node)
                if shift is None:
                    rw.replace("Mul", [value, made], at=step.node)
                    continue
                value = rw.add("Mul", [value, made], "scaled", at=step.node)
            assert shift is not None, "a map that stays does something"
            made = rw.constant("shift", shift, at=step.node)
            rw.replace("Add", [value, made], at=step.node)
        for before, after, _, shift in change.undone:
            if shift is None:
                rw.redirect(after, before)
                continue
            last = rw.facts.producer(after)
            assert last is not None, "a move makes it"
            rw.replace("Add", [before, rw.constant("shift", shift, at=last)], at=last)
        for step in change.gone:
            rw.redirect(step.result, step.source)


def _apart(region: Region) -> Stop | None:
    """Why scales would only move from one Mul to another, as the cosines of a rotary embedding."""
    if region.writers or region.intakes:
        return None
    return Stop(None, "no linear operator writes or reads the values around it")


def _pinned(region: Region, facts: Facts) -> dict[Map, Stop]:
    """The maps whose results have to stay what they are."""
    found = {}
    for step in region.maps:
        if step.scale is not None and (why := facts.pinned(step.result)) is not None:
            found[step] = Stop(step.node, f"'{step.result.name}' is {why}")
    return found


class Rescaling:
    """What becomes of one region.

    Args:
        region: The region.
        gauge: The factors of its values.
        transfer: The rules on this graph.

    Attributes:
        edits: The constants that change.
        gone: The maps whose nodes go.
        written: The maps that are written anew, as a Mul and an Add of these constants.
        undone: Values before and after moves that undo each other when the maps between them are
            gone, with the map that leaves a shift there, and the shift.
        unpaid: The maps of one node that would give way to one Add, with what keeps their shift
            from a bias.
    """

    def __init__(self, region: Region, gauge: Gauge, transfer: Transfer) -> None:
        self.region = region
        self.gauge = gauge
        self.transfer = transfer
        self.facts = transfer.facts
        self.edits = ConstantEdits()
        self.shifts = Shifts(region, self.facts, self.edits)
        self.gone = self.shifts.gone
        self.written: list[tuple[Map, Array | None, Array | None]] = []
        self.undone: list[tuple[AnyValue, AnyValue, Map | None, Array | None]] = []
        self.unpaid: dict[Map, Stop] = {}
        self._adds = self.shifts.adds
        self._scale()
        self._shift()
        self._undo()
        self._add()

    def _scale(self) -> None:
        for writer in self.region.writers:
            factors = writer.spread(1.0 / self.gauge.factor(writer.value))
            self.edits.scale(writer.node, writer.index, writer.constant, factors)
        for value, intake in self.region.intakes:
            layout = self.region.values[value]
            factors = layout.spread(self.gauge.factor(value), 0).reshape(-1)
            self.edits.scale(intake.node, intake.index, intake.constant, intake.spread(factors))
        for step in self.gauge.stays:
            before, after = self.gauge.factor(step.source), self.gauge.factor(step.result)
            if step.nodes:
                assert step.scale is not None, "it has one, or it would not be asked"
                shift = None if step.shift is None else step.shift / after
                self._write(step, step.scale * before / after, shift)
                continue
            if step.node.op == "BatchNormalization":
                for index, by in ((1, before / after), (2, 1.0 / after), (3, 1.0 / before)):
                    constant = self.facts.constant(step.node.inputs[index])
                    assert constant is not None, "it has been read"
                    self.edits.scale(step.node, index, constant, by)
                continue
            index, constant = self._constant(step)
            by = after / before if step.node.op == "Div" else before / after
            rank = len(constant.shape)
            self.edits.scale(step.node, index, constant, step.layout.spread(by, rank))

    def _write(self, step: Map, scale: Vector | None, shift: Vector | None) -> None:
        """Write a map anew."""
        arrays = [
            None if a is None else rounded(step.layout.spread(a, 0), self._dtype(step))
            for a in (scale, shift)
        ]
        self.written.append((step, arrays[0], arrays[1]))

    def _dtype(self, step: Map) -> np.dtype[Any]:
        """The type of what a map computes with."""
        known = self.facts.type(step.source)
        if known is not None and known.element:
            return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(known.element))
        given = [self.facts.constant(v) for n in (step.node, *step.nodes) for v in n.inputs]
        return next(c.dtype for c in given if c is not None)

    def _constant(self, step: Map) -> tuple[int, Constant]:
        """The constant of a map that is a Mul, Div, Add or Sub."""
        index = 1 if step.node.inputs[0] is step.source else 0
        constant = self.facts.constant(step.node.inputs[index])
        assert constant is not None, "it has been read"
        return index, constant

    def _shift(self) -> None:
        removed = set(self.gauge.removed)
        for step in self.region.maps:
            if step.scale is None or step in removed:
                factor = self.gauge.factor(step.result)
                self.shifts.settle(step, None if step.shift is None else step.shift / factor)

    def _undo(self) -> None:
        """Find the moves that are for nothing when the maps between them are gone."""
        through = {step.source: step for step in (*self.gone, *self._adds)}
        results = {step.result for step in through.values()}
        for step in list(through.values()):
            if step.source in results and len(self.facts.uses(step.source)) == 1:
                continue  # not the first
            run = [step]
            while len(self.facts.uses(run[-1].result)) == 1 and run[-1].result in through:
                run.append(through[run[-1].result])
            if not any(s in self.gone or s.scale is not None for s in run):
                continue
            pair = undone(step.source, run[-1].result, self.transfer, step.nodes)
            left = [s for s in run if s in self._adds]
            if pair is None or (left and pair[0] not in self.region.values):
                continue
            last, shift = None, None
            for last in left:  # one at most: it takes what the others add
                layout = self.region.values[pair[0]]
                shift = rounded(layout.spread(self._adds.pop(last), 0), self._dtype(last))
            self.undone.append((*pair, last, shift))

    def _add(self) -> None:
        """Write what is still added."""
        for step, shift in self._adds.items():
            if step.scale is not None:
                if not step.nodes:
                    stop = self.shifts.stops[step]
                    told = f"{stop.why}, and an Add in place of it would save nothing"
                    self.unpaid[step] = Stop(stop.node, told)
                self._write(step, None, shift)
                continue
            assert step.shift is not None, "it adds something"
            factor = self.gauge.factor(step.result)
            index, constant = self._constant(step)
            rank = len(constant.shape)
            self.edits.scale(step.node, index, constant, step.layout.spread(1.0 / factor, rank))
            more = shift - step.shift / factor
            if more.any():
                sign = -1.0 if step.node.op == "Sub" else 1.0
                spread = step.layout.spread(sign * more, rank)
                self.edits.shift(step.node, index, constant, spread)

    def misfit(self) -> Stop | None:
        """The first constant whose type cannot hold what it would become."""
        for node, _, edit in self.edits:
            if (why := edit.misfit()) is not None:
                return Stop(node, f"{described(node)} would get {why}")
        for step, *arrays in self.written:
            for array in arrays:
                if array is not None and not np.isfinite(array.astype(np.float64)).all():
                    return Stop(step.node, f"{described(step.node)} would not be finite")
        return None

    def plan(self) -> Plan:
        """The site."""
        shifted = [step for _, _, step, _ in self.undone if step is not None]
        first = [*self.gone, *shifted][0]
        changed = [n for n, _, _ in self.edits] + [s.node for s, _, _ in self.written]
        region = self.region
        inside = [self.facts.producer(v) for v in region.values]
        readers = [intake.node for _, intake in region.intakes]
        maps = [*self.gone, *shifted, *(s for s, _, _ in self.written)]
        parts = [n for s in maps for n in (*s.nodes, s.node)]
        moves = [
            self.facts.producer(after) for _, after, step, _ in self.undone if step is not None
        ]
        changed += [node for node in moves if node is not None]
        return Plan(
            first.node,
            tuple(dict.fromkeys([*parts, *changed])),
            self,
            anchors=tuple(dict.fromkeys(n.outputs[0] for n in parts)),
            inside=tuple(dict.fromkeys(n for n in inside if n is not None)),
            outputs=tuple(dict.fromkeys(n.outputs[0] for n in readers)),
            local=False,
            into=next(iter([*readers, *(w.node for w in region.writers)])).op,
        )
