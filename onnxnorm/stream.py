"""Residual streams: who writes them, who reads them, and whose mean can be taken out beforehand.

    LN(x) = RMS(C x)        C = I - 1 1^T / d        C (u + v) = C u + C v

A stream is a set of values joined by operators that are transparent to C (`onnxnorm.transfer`). If
every writer of it is multiplied by C, it holds C x in place of x; a layer norm then is an RMS norm
with the same epsilon, and every reader that is blind to the mean reads the same. Nothing here knows
the name of an architecture. For every value two things can be so:

    static(x)      the value itself becomes C x, because all that it is made of does
    centered(x)    C x exists: x is static, or has no mean by itself, or ReduceMean and Sub make it

    static(x)    needs  centered(u) for every input u of the node that computes x,
                        static(y) for every y that a reader of x makes of it; and no reader that
                        sees the mean, no output of the graph, no writer that is not linear
    RMS(norm)    needs  centered(input of the norm)

Every norm that is converted gains; a ReduceMean and Sub, a weight that has to be stored twice and a
bias that needs an Add of its own cost. The best set is a maximum-weight closure
(`onnxnorm.closure`), so a stream that is blocked in one place still converts where that is sound.

Source: Z. Jiang, J. Gu, H. Zhu, D. Z. Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (2023), for
the equivalence; the closure, the transfer rules and the prices are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import numpy as np

from onnxnorm.closure import best_closure
from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.given import GivenNorm, given_norms
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.port import REAL
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Basis, Blind, Demand, Link, Stop, Transfer, described, quantized


@dataclass(frozen=True)
class Prices:
    """What changes cost, in units of what one converted norm saves.

    Attributes:
        centering: A ReduceMean and a Sub at run time.
        copy: A weight that others read unchanged, for each 10^6 bytes.
        max_copy: Bytes above which no weight is copied.
    """

    centering: float = 2.0
    copy: float = 0.1
    max_copy: int = 32_000_000


@dataclass(eq=False)
class Entry:
    """What is known of one value of a stream.

    Attributes:
        value: The value.
        basis: The change it would get.
        source: The node that computes it as a link; or why it cannot change by its inputs.
        readers: What each reader makes of it, or why it stands in the way.
        norms: The layer norms that normalize it over exactly its features.
        pinned: Why it must stay as it is whoever reads it; "" for no reason.
        zero: Whether it has no mean as it is.
    """

    value: AnyValue
    basis: Basis
    source: Link | Stop
    readers: list[Link | Stop] = field(default_factory=list)
    norms: list[GivenNorm] = field(default_factory=list)
    pinned: str = ""
    zero: bool = False

    @property
    def blockers(self) -> list[Stop]:
        """The readers for whose sake the value must stay as it is."""
        found = [r for r in self.readers if isinstance(r, Stop) and not isinstance(r, Blind)]
        return [*found, Stop(None, self.pinned)] if self.pinned else found


@dataclass(frozen=True, eq=False)
class Stream:
    """One stream.

    Attributes:
        features: Number of features.
        entries: Its values, in no order that means anything.
        norms: The norms that read it, layer norms and RMS norms.
    """

    features: int
    entries: tuple[Entry, ...]
    norms: tuple[GivenNorm, ...]

    @property
    def writers(self) -> list[Node | AnyValue]:
        """The nodes, or constants and inputs, that put features into it."""
        found: dict[Node | AnyValue, None] = {}
        for entry in self.entries:
            if isinstance(entry.source, Stop):
                found[entry.source.node or entry.value] = None
            elif not entry.source.values:
                found[entry.source.node] = None
        return list(found)


def find_streams(facts: Facts) -> Streams:
    """The streams of a graph, which hold as long as the facts do and are looked for once."""
    found: Streams | None = facts.kept.get("streams")
    if found is None:
        found = facts.kept["streams"] = Streams(facts)
    return found


class Streams:
    """All streams of a graph that a layer norm or an RMS norm reads.

    Args:
        facts: What is true of the graph.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.sizes = find_sizes(facts)
        self.transfer = Transfer(facts, self.sizes)
        self.norms = list(given_norms(facts))
        self.entries: dict[AnyValue, Entry] = {}
        self.inputs: dict[GivenNorm, Entry] = {}
        self._owner = {node: norm for norm in self.norms for node in norm.nodes}
        self._made: dict[AnyValue, GivenNorm] = {norm.output: norm for norm in self.norms}
        self.order = {n: i for i, n in enumerate(facts.module.nodes())}
        self._steps: dict[_State, tuple[list[Stop], list[Stop], list[_State]]] = {}
        for norm in self.norms:
            layout = self.layout_of(norm)
            if layout is not None and facts.constant(norm.input) is None:
                entry = self._explore(norm.input, Basis(layout))
                if entry.basis == Basis(layout):
                    self.inputs[norm] = entry
        self._find_zeros()

    def layout_of(self, norm: GivenNorm) -> Layout | None:
        """The features a norm takes its statistics over; None where they are not known."""
        if norm.axes is None:
            return None
        dims = self.sizes.of(norm.input)
        axes = (
            sorted(norm.axes)
            if all(a < 0 for a in norm.axes) or dims is None
            else sorted(a if a < 0 else a - len(dims) for a in norm.axes)
        )
        if not axes or any(a >= 0 for a in axes):
            return None
        sizes = []
        for axis in axes:
            size = None if dims is None or len(dims) < -axis else dims[axis]
            shape = () if norm.gamma is None else norm.gamma.shape
            if not isinstance(size, int) and len(shape) >= -axis and shape[axis] > 1:
                size = int(shape[axis])
            if not isinstance(size, int):
                return None
            sizes.append(size)
        return Layout.whole_axes(axes, sizes)

    # ** finding the values **

    def _explore(self, value: AnyValue, basis: Basis) -> Entry:
        """The entry of a value, with all that hangs together with it."""
        frontier = [(value, basis)]
        while frontier:
            at, wanted = frontier.pop()
            if at in self.entries or self.facts.constant(at) is not None:
                continue
            entry = Entry(at, wanted, self._source(at, wanted), pinned=self._pinned(at))
            self.entries[at] = entry
            if isinstance(entry.source, Link):
                frontier += entry.source.values
                frontier += entry.source.outputs
            for use in dict.fromkeys(self.facts.uses(at)):
                reader = self._read(use.node, use.index, entry)
                if isinstance(reader, GivenNorm):
                    if reader not in entry.norms:
                        entry.norms.append(reader)
                    continue
                entry.readers.append(reader)
                if isinstance(reader, Link):
                    frontier += reader.values
                    frontier += reader.outputs
        return self.entries[value]

    def _source(self, value: AnyValue, basis: Basis) -> Link | Stop:
        node = self.facts.producer(value)
        known = self.facts.type(value)
        if known is not None and known.element and known.element not in REAL:
            told = Stop(node, f"'{value.name}' does not hold real numbers")
            return told if node is None else quantized(node) or told
        if node is None:
            return Stop(None, f"'{value.name}' is {self._origin(value)}")
        norm = self._made.get(value)
        if norm is not None:
            return Stop(
                node, f"{called(norm)} writes this stream{self._mean_of(norm, basis.layout)}"
            )
        return self.transfer.back(node, value, basis)

    def _mean_of(self, norm: GivenNorm, layout: Layout) -> str:
        """What gives the result of a norm a mean over the features in `layout`."""
        if not norm.recognised:
            return f", and {norm.reason}"
        if norm.gamma is not None and not bool((norm.gamma == norm.gamma.flat[0]).all()):
            return " with a scale for each feature"
        if norm.kind == "rms_norm" and not norm.converted:
            return " and leaves its mean in it"
        if self.layout_of(norm) != layout:
            return " and normalizes it over other axes"
        return " with a bias that has a mean"

    def _origin(self, value: AnyValue) -> str:
        scope = value.scope
        if scope is not None and (scope.owner is not None or scope.is_function):
            return f"an input of {scope.path}"
        return "a graph input"

    def _pinned(self, value: AnyValue) -> str:
        why = self.facts.pinned(value)
        return "" if why is None else f"'{value.name}', which is on this stream, is {why}"

    def _read(self, node: Node, index: int, entry: Entry) -> Link | Stop | GivenNorm:
        norm = self._owner.get(node)
        if norm is not None and norm.input is entry.value:
            layout = self.layout_of(norm)
            what = called(norm)
            if norm.converted:
                return Blind(node, f"{what} reads this stream without its mean")
            if norm.kind == "rms_norm":
                return Stop(node, f"{what} reads this stream and sees its mean")
            if self._tells_mean(norm):
                return Stop(node, f"{what} gives the mean of this stream to others")
            if layout is None or entry.basis != Basis(layout):
                return Stop(node, f"{what} {self._together(layout, entry)}")
            if norm.nodes == (node,) and index != 0:
                return Stop(node, f"{what} reads this stream as its scale or bias")
            return norm
        if self._only_centers(node, entry):
            return Blind(node, f"{described(node)} takes the mean out")
        return self.transfer.forth(node, index, entry.basis)

    def _tells_mean(self, norm: GivenNorm) -> bool:
        """Whether a value inside a norm is read outside it."""
        inside = set(norm.nodes)
        inner = [v for n in norm.nodes for v in n.outputs if v.name and v is not norm.output]
        return any(
            self.facts.pinned(v) is not None
            or any(u.node not in inside for u in self.facts.uses(v))
            for v in inner
        )

    def _only_centers(self, node: Node, entry: Entry) -> bool:
        """Whether a reader is the ReduceMean or the Sub of x - mean(x) over the features."""
        layout = entry.basis.layout
        if entry.basis.scale is not None:
            return False
        if node.op == "ReduceMean" and node.domain == "":
            uses = self.facts.uses(node.outputs[0])
            if self.facts.pinned(node.outputs[0]) is not None:
                return False
            return all(
                u.node.op == "Sub" and u.index == 1 and self._is_mean(u.node, layout) for u in uses
            )
        return node.op == "Sub" and node.inputs[0] is entry.value and self._is_mean(node, layout)

    def _together(self, layout: Layout | None, entry: Entry) -> str:
        own = entry.basis.layout.features
        if layout is not None and layout.features > own:
            return (
                f"normalizes several positions of this stream together, {layout.features} features"
                f" at a time and not {own}"
            )
        return "normalizes this stream over other axes"

    # ** values without a mean **

    def _find_zeros(self) -> None:
        """Mark what has no mean as it is, in the order of computation."""

        def place(entry: Entry) -> int:
            node = self.facts.producer(entry.value)
            return -1 if node is None else self.order[node]

        ordered = sorted(self.entries.values(), key=place)
        for entry in ordered:
            entry.zero = entry.basis.scale is None and self._is_zero(entry)

    def _is_zero(self, entry: Entry) -> bool:
        norm = self._made.get(entry.value)
        layout = entry.basis.layout
        if norm is not None and (norm.kind == "layer_norm" or norm.converted):
            if not norm.recognised or self.layout_of(norm) != layout:
                return False
            uniform = norm.gamma is None or bool((norm.gamma == norm.gamma.flat[0]).all())
            return uniform and (norm.beta is None or _no_mean(norm.beta, layout))
        if isinstance(entry.source, Stop):
            return False
        node = entry.source.node
        if node.op == "Sub" and len(node.inputs) == 2 and self._is_mean(node, layout):
            return True
        if not entry.source.demands or entry.source.bypass:
            return False
        for demand in entry.source.demands:
            if demand.constant is not None:
                # What multiplies is not looked at: it takes time, and the next step is free anyhow.
                if not demand.bias or not _small_and_no_mean(demand):
                    return False
            elif not self.entries[node.inputs[demand.index]].zero:
                return False
        return True

    def _is_mean(self, node: Node, layout: Layout) -> bool:
        """Whether a Sub takes the mean over the features from its first input."""
        mean = self.facts.producer(node.inputs[1]) if len(node.inputs) == 2 else None
        if mean is None or mean.op != "ReduceMean" or mean.domain != "" or not mean.inputs:
            return False
        if mean.inputs[0] is not node.inputs[0] or mean.parameter("keepdims", "axes") is not None:
            return False
        axes = self.transfer.numbers(mean, 1, "axes")
        given = None if axes is None else self.transfer.from_right(mean.inputs[0], axes)
        return (
            given is not None
            and bool(mean.attrs.get("keepdims", 1))
            and layout.whole
            and tuple(sorted(given)) == layout.axes
        )

    # ** streams as a reader of a report sees them **

    def all(self) -> list[Stream]:
        """The streams, largest first in the order of their first norm."""
        groups: dict[AnyValue, AnyValue] = {v: v for v in self.entries}

        def root(value: AnyValue) -> AnyValue:
            while groups[value] is not value:
                groups[value] = groups[groups[value]]
                value = groups[value]
            return value

        for entry in self.entries.values():
            links = [entry.source, *entry.readers]
            for link in links:
                if isinstance(link, Link):
                    for other, _ in (*link.values, *link.outputs):
                        if other in groups:
                            groups[root(other)] = root(entry.value)
        members: dict[AnyValue, list[Entry]] = {}
        for value, entry in self.entries.items():
            members.setdefault(root(value), []).append(entry)
        norms: dict[AnyValue, list[GivenNorm]] = {}
        for norm in self.norms:
            if norm.input in self.entries:
                norms.setdefault(root(norm.input), []).append(norm)
        return [
            Stream(
                self.entries[read[0].input].basis.layout.features, tuple(members[key]), tuple(read)
            )
            for key, read in norms.items()
        ]

    # ** choosing what to change **

    def choose(
        self, gains: dict[GivenNorm, float], prices: Prices, forbidden: Iterable[AnyValue] = ()
    ) -> Choice:
        """The best set of changes.

        Args:
            gains: What converting each norm gains; those not named are not converted.
            prices: What changes cost.
            forbidden: Values that must not become static.
        """
        barred = set(forbidden)
        weights: dict[_Item, int] = {}
        needs: dict[_Item, list[_Item]] = {}
        for norm, gain in gains.items():
            entry = self.inputs.get(norm)
            if entry is not None:
                weights["norm", norm] = round(gain * _UNIT)
                needs["norm", norm] = [("centered", entry.value)]
        price = round(prices.centering * _UNIT)
        for value, entry in self.entries.items():
            static: _Item = ("static", value)
            centered: _Item = ("centered", value)
            possible = self.can_be_static(entry) and value not in barred
            if entry.zero:
                weights[centered] = 0
            elif self.can_center(entry):
                weights[centered] = -price
                weights[static] = price
            else:
                needs[centered] = [static]
            if not possible:
                weights[static] = -_NEVER
                continue
            wanted = needs.setdefault(static, [])
            wanted.append(centered)
            assert isinstance(entry.source, Link)
            wanted += [("centered", v) for v, _ in entry.source.values]
            wanted += [("static", v) for v, _ in entry.source.outputs if v is not value]
            for demand in self._shared(entry.source):
                assert demand.constant is not None
                cost = self._copy_price(demand.constant, prices)
                item: _Item = ("copy", demand.constant.source)
                weights[item] = -cost
                wanted.append(item)
            for reader in entry.readers:
                if isinstance(reader, Link):
                    wanted += [("static", v) for v, _ in reader.outputs]
        chosen = best_closure(weights, needs)
        return Choice(self, chosen)

    def can_be_static(self, entry: Entry) -> bool:
        """Whether nothing about a value itself forbids changing it."""
        if isinstance(entry.source, Stop) or entry.blockers:
            return False
        return all(
            v in self.entries and self.entries[v].basis == b
            for link in (entry.source, *entry.readers)
            if isinstance(link, Link)
            for v, b in (*link.values, *link.outputs)
        )

    def can_center(self, entry: Entry) -> bool:
        """Whether a ReduceMean and a Sub can make C x of a value."""
        return entry.basis.scale is None and entry.basis.layout.whole

    def _shared(self, link: Link) -> Iterator[Demand]:
        """The constants of a link that others read as they are, and that are worth a thought."""
        for demand in link.demands:
            if demand.constant is None or demand.constant.nbytes < _SMALL:
                continue
            if self.facts.readers(demand.constant) > self._writers.get(demand.constant.source, 0):
                yield demand

    @cached_property
    def _writers(self) -> dict[AnyValue, int]:
        """Of constants, how many of the places that read them are writers of a stream."""
        counted: dict[AnyValue, set[tuple[Node, int]]] = {}
        for entry in self.entries.values():
            if isinstance(entry.source, Link) and self.can_be_static(entry):
                for demand in entry.source.demands:
                    if demand.constant is not None:
                        place = (entry.source.node, demand.index)
                        counted.setdefault(demand.constant.source, set()).add(place)
        return {source: len(places) for source, places in counted.items()}

    def _copy_price(self, constant: Constant, prices: Prices) -> int:
        if constant.nbytes > prices.max_copy:
            return _NEVER
        return max(1, round(constant.nbytes / 1e6 * prices.copy * _UNIT))

    # ** reasons **

    def obstacles(self, norm: GivenNorm) -> tuple[list[tuple[int, Stop]], list[tuple[int, Stop]]]:
        """What stands in the way of a norm's input becoming static, nearest first.

        Returns:
            The readers for whose sake it must stay, and the writers that could be centered at a
            price; each with its distance.
        """
        entry = self.inputs.get(norm)
        if entry is None or entry.zero:
            return [], []
        readers: list[tuple[int, Stop]] = []
        writers: list[tuple[int, Stop]] = []
        start = (entry.value, True, False)
        distance = {start: 0}
        before: dict[_State, _State] = {}
        frontier = [start]
        for state in frontier:  # grows while it is walked: breadth first
            depth = distance[state]
            blocking, paying, further = self._step(state)
            if blocking:
                told = self._cut_from(state, before)
                readers += [(depth, Stop(s.node, f"{s.why}{told}")) for s in blocking]
                break  # no other is nearer
            writers += [(depth, stop) for stop in paying]
            for following in further:
                if following not in distance:
                    distance[following] = depth + 1
                    before[following] = state
                    frontier.append(following)
        return readers, writers

    def _cut_from(self, state: _State, before: dict[_State, _State]) -> str:
        """What a norm and a reader in its way are both cut out of, as q and v of one projection."""
        path = [state[0]]
        while state in before:
            state = before[state]
            path.insert(0, state[0])
        made = [self.facts.producer(value) for value in path]
        cut = [n if n is not None and n.op in _CUTS and not n.domain else None for n in made]
        for at, value in enumerate(path[1:-1], start=1):
            back, forth = cut[at - 1], cut[at + 1]
            if back and forth and back.inputs[0] is value is forth.inputs[0]:
                return f"; what both read is cut out of '{value.name}'"
        for one, other in itertools.pairwise(cut):
            if one is not None and one is other:
                return f"; what both read is cut out of '{one.inputs[0].name}'"
        return ""

    def _step(self, state: _State) -> tuple[list[Stop], list[Stop], list[_State]]:
        """What stands in the way at a value itself, and the values that follow from it.

        The norms of one stream all walk over the same values, so it is looked for once.
        """
        known = self._steps.get(state)
        if known is None:
            known = self._steps[state] = self._find_step(*state)
        return known

    def _find_step(
        self, value: AnyValue, must: bool, paid: bool
    ) -> tuple[list[Stop], list[Stop], list[_State]]:
        at = self.entries.get(value)
        if at is None or (at.zero and not must):
            return [], [], []
        writers: list[Stop] = []
        further: list[_State] = []
        paid = paid or (not must and self.can_center(at))
        if isinstance(at.source, Stop):
            writers.append(at.source)
        else:
            for demand in self._shared(at.source):
                name = demand.constant.name if demand.constant is not None else ""
                writers.append(Stop(at.source.node, f"the table '{name}' is read by others too"))
            further += [(v, False, paid) for v, _ in at.source.values]
            further += [(v, True, paid) for v, _ in at.source.outputs if v is not value]
        for reader in at.readers:
            if isinstance(reader, Link):
                further += [(v, True, paid) for v, _ in reader.outputs]
        if paid and isinstance(at.source, Stop):
            # It has to be centered at run time, for what writes it and for what reads it.
            why = ", and ".join(stop.why for stop in (at.source, *at.blockers[:1]))
            return [], [Stop(at.source.node, why)], []
        return list(at.blockers), writers, further


_CUTS: Final = frozenset({"Gather", "Slice", "Split"})
_Item = tuple[str, object]
# A value; whether it itself has to change; whether a centering at run time would do in its place.
_State = tuple[AnyValue, bool, bool]
_UNIT: Final = 1000  # prices are whole numbers of this part
_NEVER: Final = 1 << 40
_SMALL: Final = 64 << 10  # bytes; nobody minds a second copy of less


class Choice:
    """A set of changes.

    Args:
        streams: The streams it is of.
        chosen: The members of the closure.
    """

    def __init__(self, streams: Streams, chosen: set[_Item]) -> None:
        self.streams = streams
        self._chosen = chosen

    def converts(self, norm: GivenNorm) -> bool:
        """Whether a norm becomes an RMS norm."""
        return ("norm", norm) in self._chosen

    def static(self, value: AnyValue) -> bool:
        """Whether a value itself becomes C x."""
        return ("static", value) in self._chosen

    def centered(self, value: AnyValue) -> bool:
        """Whether C x exists in some way."""
        return ("centered", value) in self._chosen

    def explicit(self, value: AnyValue) -> bool:
        """Whether ReduceMean and Sub make C x of a value."""
        entry = self.streams.entries[value]
        return self.centered(value) and not self.static(value) and not entry.zero

    def groups(self) -> list[Group]:
        """The changes, those that depend on each other together."""
        streams = self.streams
        leader: dict[object, object] = {}

        def root(key: object) -> object:
            leader.setdefault(key, key)
            while leader[key] is not key:
                leader[key] = leader[leader[key]]
                key = leader[key]
            return key

        def join(one: object, other: object) -> None:
            leader[root(one)] = root(other)

        values = [v for v in streams.entries if self.static(v) or self.explicit(v)]
        norms = [n for n in streams.inputs if self.converts(n)]
        for norm in norms:
            join(norm, norm.input)
            # Where its own result is centered, its bias rides along.
            if norm.output in streams.entries and self.explicit(norm.output):
                join(norm, norm.output)
        for value in values:
            entry = streams.entries[value]
            root(value)
            if not self.static(value) or not isinstance(entry.source, Link):
                continue
            for other, _ in (*entry.source.values, *entry.source.outputs):
                join(value, other)
            for demand in entry.source.demands:
                if demand.constant is not None and demand.constant.nbytes >= _SMALL:
                    join(value, demand.constant.source)
        found: dict[object, Group] = {}
        for norm in norms:
            found.setdefault(root(norm), Group()).norms.append(norm)
        for value in values:
            group = found.get(root(value))
            if group is not None:
                (group.static if self.static(value) else group.explicit).append(value)
        return list(found.values())


@dataclass(eq=False)
class Group:
    """Changes that belong together: one site.

    Attributes:
        norms: The norms that become RMS norms.
        static: The values that become C x.
        explicit: The values of which ReduceMean and Sub make C x.
    """

    norms: list[GivenNorm] = field(default_factory=list)
    static: list[AnyValue] = field(default_factory=list)
    explicit: list[AnyValue] = field(default_factory=list)


def called(norm: GivenNorm) -> str:
    """A norm in words, however many nodes it is, as it is in the model that was given.

    What was a layer norm there is one by name, also where its mean went in an earlier round.
    """
    kind = "layer_norm" if norm.converted else norm.kind
    words = {"layer_norm": "the layer norm", "rms_norm": "the RMS norm"}
    return f"{words.get(kind, kind)} '{norm.label}'"


def _no_mean(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]], layout: Layout) -> bool:
    """Whether an array has no mean over the features, but for the rounding of its values."""
    if not layout.covers(array.shape):
        return not array.any()
    removed = np.abs(array - layout.centered(array)).max(initial=0.0)
    return bool(removed <= 2.0**-26 * np.abs(array).max(initial=0.0))


def _small_and_no_mean(demand: Demand) -> bool:
    assert demand.constant is not None
    if demand.constant.nbytes > _SMALL:
        return False
    return _no_mean(demand.constant.float64(), demand.basis.layout)
