"""Take the mean out of residual streams, so that their layer norms become RMS norms.

    LN(x) = gamma * C x / sqrt(mean((C x)^2) + epsilon) + beta  =  RMS(C x) + beta
    C = I - 1 1^T / d,   C (h W + b) = h (W C) + b C

Every writer of a stream is multiplied by C; what cannot be is centered by ReduceMean and Sub where
the stream gains by it. Epsilon and gamma stay what they are. beta goes into the biases behind the
norm, which are vectors, or is added by itself. Exact over the reals. In floating point each weight
is formed in float64 and rounded once; the mean of a stream, which a layer norm subtracts with all
its rounding error, is never in it, so streams with a large common part become more accurate.

Source: Z. Jiang, J. Gu, H. Zhu, D. Z. Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent
and Efficient Pre-LN Transformers" (2023). What a stream is, and what may change, is said in
`onnxnorm.stream`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx

from onnxnorm import forms
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm, given_norms, per_feature
from onnxnorm.module import Node, Value
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.shift import Sinks, sinks
from onnxnorm.stream import Choice, Group, Prices, find_streams
from onnxnorm.stream_edit import Edits, misfit
from onnxnorm.stream_prices import times
from onnxnorm.transfer import Link, Stop, described


@dataclass(frozen=True)
class StreamFoldMean(Pass):
    """Turn layer norms into RMS norms, stream by stream.

    Attributes:
        centering: What a ReduceMean and a Sub cost, in units of what one converted norm saves; by
            default what `onnxnorm.stream_prices` has for the target.
        add: What an Add for beta costs that no bias can take, in the same unit and by default from
            the same table.
        copy_mb: What a copy of a shared weight costs, for each MB.
        max_copy_mb: A weight that others read unchanged is copied up to this size.
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
    """

    centering: float | None = None
    add: float | None = None
    copy_mb: float = 0.1
    max_copy_mb: int = 32
    target: str = "onnx"

    name: ClassVar = "stream-fold-mean"
    summary: ClassVar = "the mean out of residual streams: layer norms become RMS norms"
    equation: ClassVar = "LN(h W + b) -> RMS(h (W C) + b C), C = I - 1 1^T / d"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """One plan for each stream, or part of one, that gains; a reason for every other norm."""
        if not any(n.kind == "layer_norm" for n in given_norms(facts)):
            return
        survey = Survey(facts, self)
        done: set[GivenNorm] = set()
        for group in survey.groups():
            done.update(group.norms)
            yield survey.plan(group)
        for norm in survey.streams.norms:
            if norm.kind == "layer_norm" and norm not in done:
                yield survey.refusal(norm)

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Change the writers, center what has to be, write the RMS norms."""
        detail: Detail = plan.detail
        for value, to in detail.bypassed:
            rw.redirect(value, to)
        copies: dict[AnyValue, Value] = {}
        for value in detail.group.explicit:
            assert isinstance(value, Value), "a constant is centered in place"
            layout = detail.survey.streams.entries[value].basis.layout
            axes = detail.survey.axes(value, layout.axes)
            copies[value] = forms.center(rw, value, axes, dtype=detail.survey.dtype(value))
        for node, index in detail.reading:
            rw.rewire(node, index, copies[node.inputs[index]])
        detail.edits.stage(rw)
        for norm in detail.group.norms:
            layout = detail.survey.streams.inputs[norm].basis.layout
            axes = detail.survey.axes(norm.input, layout.axes)
            forms.rms_norm(
                rw,
                copies.get(norm.input, norm.input),
                norm.gamma,
                axes,
                norm.epsilon,
                dtype=detail.survey.dtype(norm.input, norm),
                features=[p.size for p in layout.parts],
                trailing=layout.axes == tuple(range(-len(layout.axes), 0)),
                at=norm.node,
                shift=norm.beta if norm in detail.added else None,
            )


@dataclass(frozen=True, eq=False)
class Detail:
    """What one site needs."""

    survey: Survey
    group: Group
    edits: Edits
    reading: list[tuple[Node, int]]  # inputs that read the centered copy
    bypassed: list[tuple[AnyValue, AnyValue]]  # results of a folded scale -> what they scaled
    added: set[GivenNorm]  # norms whose beta is added


class Survey:
    """The streams of a graph, and what is best done with them.

    Args:
        facts: What is true of the graph.
        options: The pass, for its prices.
    """

    def __init__(self, facts: Facts, options: StreamFoldMean) -> None:
        self.facts = facts
        self.options = options
        self.streams = find_streams(facts)
        known, self.measured = times(options.target)
        centering, _ = known.prices
        self.centering = centering if options.centering is None else options.centering
        self.prices = Prices(
            centering=self.centering,
            copy=options.copy_mb,
            max_copy=options.max_copy_mb * 1_000_000,
        )
        self.betas: dict[GivenNorm, Sinks | str] = {}
        self.gains: dict[GivenNorm, float] = {}
        self.misfits: dict[AnyValue, Stop] = {}
        norms = [n for n in self.streams.inputs if n.kind == "layer_norm"]
        self._converted = {node for norm in norms for node in norm.nodes}  # or may be
        for norm in self.streams.inputs:
            if norm.kind == "layer_norm" and norm.recognised and self._one_type(norm):
                self.betas[norm] = self._beta(norm)
                paid = isinstance(self.betas[norm], str)
                self.gains[norm] = 1.0 - (self.add(norm) if paid else 0.0)
        self.choice = self._choose()

    def add(self, norm: GivenNorm) -> float:
        """What an Add behind a norm costs, in units of what the norm saves."""
        if self.options.add is not None:
            return self.options.add
        dims = self.streams.sizes.of(norm.input)
        known = [d for d in dims or () if isinstance(d, int)]
        elements = math.prod(known) if dims is not None and len(known) == len(dims) else None
        return times(self.options.target, elements)[0].prices[1]

    def _one_type(self, norm: GivenNorm) -> bool:
        """Whether the type of a norm is known, and its result has the type of its input."""
        before, after = self._element(norm.input, norm), self._element(norm.output, norm)
        return before != 0 and after in (0, before)

    def _element(self, value: AnyValue, norm: GivenNorm | None = None) -> int:
        known = self.facts.type(value)
        if known is not None and known.element:
            return known.element
        scale = norm.node.inputs[1] if norm is not None and len(norm.node.inputs) > 1 else None
        constant = None if scale is None or not scale.name else self.facts.constant(scale)
        if constant is None:
            return 0
        return int(onnx.helper.np_dtype_to_tensor_dtype(constant.dtype))

    def dtype(self, value: AnyValue, norm: GivenNorm | None = None) -> np.dtype[Any]:
        """The element type of a value."""
        element = self._element(value, norm)
        if not element:  # in a function: that of the norms of its stream
            element = next(e for n in self.streams.inputs if (e := self._element(n.input, n)))
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element))

    def axes(self, value: AnyValue, axes: tuple[int, ...]) -> tuple[int, ...]:
        """Axes as the operators of the value's opset take them: before 11 from the left."""
        rank = self.streams.transfer.rank(value)
        assert value.scope is not None, "every value of a graph has a scope"
        if value.scope.opsets[""] >= 11 or rank is None:
            return axes
        return tuple(a + rank for a in axes)

    def _beta(self, norm: GivenNorm) -> Sinks | str:
        """Where beta goes: into these biases, or why it cannot."""
        if norm.beta is None or not norm.beta.any():
            return Sinks()
        found = sinks(norm.output, self.streams.inputs[norm].basis.layout, self.streams.transfer)
        for place in found.places if isinstance(found, Sinks) else ():
            if place.node in self._converted:
                return f"{described(place.node)} has the bias of another norm, which goes itself"
        return found

    def _choose(self) -> Choice:
        while True:
            gains = {n: g for n, g in self.gains.items() if g > 0}
            choice = self.streams.choose(gains, self.prices, self.misfits)
            wrong = self._misfits(choice)
            if not wrong:
                return choice
            self.misfits.update(wrong)

    def _misfits(self, choice: Choice) -> dict[AnyValue, Stop]:
        """The values that cannot be static because a constant would not hold the result."""
        found: dict[AnyValue, Stop] = {}
        for group in choice.groups():
            for value in group.static:
                source = self.streams.entries[value].source
                assert isinstance(source, Link)
                for demand in source.demands:
                    if demand.constant is None:
                        continue
                    if why := misfit(demand.constant, demand.basis):
                        told = f"'{demand.constant.name}' of {described(source.node)} {why}"
                        found[value] = Stop(source.node, told)
        return found

    def groups(self) -> list[Group]:
        """The sites, in the order of their first norm."""
        order = {norm: at for at, norm in enumerate(self.streams.norms)}
        groups = self.choice.groups()
        for group in groups:
            group.norms.sort(key=order.__getitem__)
        return sorted(groups, key=lambda g: order[g.norms[0]])

    def plan(self, group: Group) -> Plan:
        """The site of one group."""
        edits, reading, bypassed, inside = Edits(), [], [], dict[Node, None]()
        explicit = set(group.explicit)
        for value in group.static:
            source = self.streams.entries[value].source
            assert isinstance(source, Link)
            node = source.node
            inside[node] = None
            for demand in source.demands:
                given = node.inputs[demand.index]
                if demand.constant is not None:
                    edits.change(node, demand.index, demand.constant, demand.basis)
                elif given in explicit and (node, demand.index) not in reading:
                    reading.append((node, demand.index))
            if source.bypass:
                bypassed.append((value, node.inputs[source.demands[0].index]))
        added, outputs, far = set(), dict[AnyValue, None](), False
        for norm in group.norms:
            beta = self.betas[norm]
            if isinstance(beta, str):
                added.add(norm)
            if isinstance(beta, str) or not (beta.places or beta.unseen):
                outputs[norm.output] = None
                continue
            assert norm.beta is not None, "it goes somewhere only where there is one"
            vector = per_feature(norm.beta, self.streams.inputs[norm].basis.layout.features)
            inside.update(dict.fromkeys(beta.between))
            outputs.update(dict.fromkeys(beta.unseen))
            # What else these read has to fit to the norm.
            far |= bool(beta.unseen) or any(s.inlet is None for s in beta.places)
            for sink in beta.places:
                dtype = self.dtype(norm.input, norm)
                edits.shift(sink.node, sink.index, sink.bias, sink.shift(vector), dtype)
                result = sink.node.outputs[0]
                entry = self.streams.entries.get(result)
                if entry is None or not self.choice.static(result):
                    outputs[result] = None
        norms = [node for norm in group.norms for node in norm.nodes]
        changed = dict.fromkeys(
            [*norms, *edits.nodes, *(n for n, _ in reading), *self._folded(bypassed)]
        )
        return Plan(
            group.norms[0].node,
            tuple(changed),
            Detail(self, group, edits, reading, bypassed, added),
            anchors=tuple(n.output for n in group.norms[1:]),
            inside=tuple(inside),
            outputs=tuple(outputs),
            local=len(group.norms) == 1 and not far,
            action="converted",
            into="rms_norm",
            note=self._price(group, added),
        )

    def _price(self, group: Group, added: set[GivenNorm]) -> str:
        """What a site costs and gains."""
        saved = len(group.norms)
        parts = [f"{saved} converted, which saves {saved} mean{'s' if saved > 1 else ''}"]
        if group.explicit:
            names = ", ".join(f"'{v.name}'" for v in group.explicit)
            number = len(group.explicit)
            price = f"{self.centering:g}{' each' if number > 1 else ''}"
            parts.append(f"{number} centered at run time ({names}) at the price of {price}")
        for cost, count in sorted(Counter(self.add(norm) for norm in added).items()):
            biases = "1 bias added behind its norm"
            if count > 1:
                biases = f"{count} biases added behind their norms"
            parts.append(f"{biases} at the price of {cost:g}{' each' if count > 1 else ''}")
        given = self.options
        by_table = (group.explicit and given.centering is None) or (added and given.add is None)
        if by_table and not self.measured:
            parts.append(_UNMEASURED.format(given.target))
        return "; ".join(parts)

    def _folded(self, bypassed: list[tuple[AnyValue, AnyValue]]) -> list[Node]:
        found = [self.facts.producer(value) for value, _ in bypassed]
        return [node for node in found if node is not None]

    # ** reasons **

    def refusal(self, norm: GivenNorm) -> Refusal:
        """Why a layer norm stays one."""
        if not norm.recognised:
            return Refusal(norm.reason, norm.node.label, node=norm.node)
        if norm not in self.streams.inputs:
            return self._outside(norm)
        if norm not in self.gains:
            reason = "its element type is not known, or its result has another than its input"
            return Refusal(reason, norm.node.label, _SHAPES, norm.node)
        readers, writers = self.streams.obstacles(norm)
        writers += [(0, stop) for stop in self._unfit(norm)]
        beta = self.betas[norm]
        if readers:
            stop = min(readers, key=lambda pair: pair[0])[1]
            at = stop.node.label if stop.node is not None else norm.input.name
            return Refusal(stop.why, at, _advice(stop), norm.node)
        if writers:
            stop = min(writers, key=lambda pair: pair[0])[1]
            count = len({s.why for _, s in writers})
            more = f" (and {count - 1} more)" if count > 1 else ""
            price = self.centering
            reason = (
                f"{stop.why}{more}: taking its mean out at run time costs {price:g} times what a"
                f" converted norm saves, which the norms that would gain do not repay"
            )
            at = stop.node.label if stop.node is not None else norm.input.name
            return Refusal(reason, at, _PRICE, norm.node)
        if isinstance(beta, str):
            reason = (
                f"its bias would need an Add, since {beta}; that costs {self.add(norm):g} times"
                " what the mean saves"
            )
            return Refusal(reason, norm.node.label, "stream-fold-mean{add=0} does it.", norm.node)
        return Refusal("nothing is gained", norm.node.label, node=norm.node)

    def _outside(self, norm: GivenNorm) -> Refusal:
        """Why a layer norm reads no stream."""
        at, layout = norm.node.label, self.streams.layout_of(norm)
        if self.facts.constant(norm.input) is not None:
            return Refusal("it normalizes a constant", at, node=norm.node)
        if layout is None:
            reason = "the size of the normalized axes is not known"
            return Refusal(reason, at, _SHAPES, norm.node)
        own = self.streams.entries[norm.input].basis.layout.features
        if layout.features > own:
            reason = (
                f"it normalizes {layout.features} features together, those of several positions of"
                f" a stream of {own}: their joint mean is not the mean of each"
            )
        else:
            reason = (
                f"it normalizes {layout.features} features of a stream that others read as {own}"
            )
        return Refusal(reason, at, node=norm.node)

    def _unfit(self, norm: GivenNorm) -> list[Stop]:
        return (
            [self.misfits[norm.input]]
            if norm.input in self.misfits
            else list(self.misfits.values())[:1]
        )


_SHAPES: Final = "Export the model with static feature sizes, or run shape inference on it."
_UNMEASURED: Final = "nothing was measured for {}: these are the CPU's prices"
_PRICE: Final = "stream-fold-mean{centering=...} sets the price."


def _advice(stop: Stop) -> str:
    if stop.node is None:
        return "If this output is not needed, leave it out of the export."
    return ""
