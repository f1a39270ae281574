"""Diagonal gauges: the factors by which the values of a stream may be stored, feature by feature.

    x = a * x'      x is what the model means, x' what it stores, a one factor for each feature

    y = s * x + t    a_y = s a_x  makes it  y' = x' + t / a_y:  the scale is gone

Values of a region with one and the same factor are a class; an affine map between two classes
either goes, and fixes the ratio of their factors, or stays and takes up whatever they are. `Gauge`
lets as many go as agree with each other, with the classes that must stay as they are, with the
signs that Relu asks for, and with a bound on a. So where both ends of a stream are fixed, one map
stays; and where a product grows too large, one map stays and the product begins anew behind it.

Source: the equivalence is that of a change of basis with a diagonal matrix, as in M. Nagel et al.,
"Data-Free Quantization through Weight Equalization and Bias Correction" (2019), section 4.1, there
for one layer and its successor; the rules, the classes and the bound are ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np

from onnxnorm.affine_maps import Map, Vector
from onnxnorm.facts import AnyValue
from onnxnorm.gauge_region import Region
from onnxnorm.module import Node
from onnxnorm.transfer import Stop, described

_SAME: Final = 2.0**-40  # two products of the same factors in another order differ by less


@dataclass(eq=False)
class _Set:
    """Classes whose factors are known relative to each other."""

    factors: dict[int, Vector]


class Gauge:
    """The factors of a region, and the maps that go.

    Args:
        region: The region.
        bound: How large |log2 a| may become.
        kept: Maps that have to stay, with the reason.

    Attributes:
        removed: The maps whose scale goes.
        stays: The other maps with a scale, each with what stands in the way.
    """

    def __init__(self, region: Region, bound: float, kept: dict[Map, Stop]) -> None:
        self.region = region
        self.bound = bound
        self.removed: list[Map] = []
        self.stays: dict[Map, Stop] = {}
        self._class = _classes(region)
        self._fixed: dict[int, Stop] = {}
        self._positive: dict[int, Node] = {}
        for value, stop in region.fixed.items():
            self._fixed.setdefault(self._class[value], stop)
        left = {step: why for step in region.maps if (why := self._left(step)) is not None}
        for step, why in left.items():
            self._fixed.setdefault(self._class[step.result], why)
        for value, node in region.positive.items():
            self._positive.setdefault(self._class[value], node)
        ones = np.ones(region.features)
        self._sets = {c: _Set({c: ones}) for c in dict.fromkeys(self._class.values())}
        for step in region.maps:
            if step.scale is None:
                continue
            told = kept.get(step) or left.get(step) or self._joined(step)
            if told is None:
                self.removed.append(step)
            else:
                self.stays[step] = told
        self._bases = {id(s): self._base(s) for s in self._sets.values()}

    def factor(self, value: AnyValue) -> Vector:
        """The factor a of a value, one number for each feature."""
        at = self._class[value]
        if at in self._fixed:
            return np.ones(self.region.features)
        owner = self._sets[at]
        found: Vector = owner.factors[at] / self._bases[id(owner)]
        return found

    def _left(self, step: Map) -> Stop | None:
        """Why a map is no business of a stream: one number behind what is not linear, as in Gelu.

        The runtime fuses the two, but not with another number in its place.
        """
        if not step.uniform or step.scale is None or step.scale[0] == 1.0:
            return None
        stop = self.region.fixed.get(step.source)
        return None if stop is None else Stop(step.node, f"it scales what is fixed: {stop.why}")

    def _joined(self, step: Map) -> Stop | None:
        """Let a map go, if that agrees with all that went before; else what it disagrees with."""
        assert step.scale is not None, "a map without a scale is no question"
        source, result = self._class[step.source], self._class[step.result]
        one, other = self._sets[source], self._sets[result]
        if not step.scale.all():
            dead = int(np.flatnonzero(step.scale == 0.0)[0])
            return Stop(step.node, f"feature {dead} of {described(step.node)} has the scale 0")
        wanted = step.scale * one.factors[source]
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            by = wanted / other.factors[result]
        if one is other:
            if bool((np.abs(by - 1.0) <= _SAME).all()):
                return None
            told = f"what {described(step.node)} scales is added to its result again"
            return Stop(step.node, told)
        merged = dict(one.factors)
        merged.update({c: f * by for c, f in other.factors.items()})
        stop = self._disagreement(merged, step)
        if stop is None:
            union = _Set(merged)
            for at in merged:
                self._sets[at] = union
        return stop

    def _disagreement(self, factors: dict[int, Vector], step: Map) -> Stop | None:
        fixed = [c for c in factors if c in self._fixed]
        base = factors[fixed[0]] if fixed else None
        for at in fixed[1:]:
            if not bool((np.abs(factors[at] / factors[fixed[0]] - 1.0) <= _SAME).all()):
                one, other = self._fixed[fixed[0]], self._fixed[at]
                told = f"the stream is fixed at both ends: {one.why}, and {other.why}"
                return Stop(other.node or one.node, told)
        signs = [(c, np.sign(factors[c])) for c in factors if c in self._positive]
        reference = None if base is None else np.sign(base)
        for at, sign in signs:
            reference = sign if reference is None else reference
            if not bool((sign == reference).all()):
                node = self._positive[at]
                told = f"{described(step.node)} has scales below 0, and {described(node)} reads it"
                return Stop(node, told)
        low, high = _range(factors.values())
        if base is not None:
            shift = np.log2(np.abs(base))
            reach = max(float((high - shift).max()), float((shift - low).max()))
        else:
            reach = float((high - low).max()) / 2
        if reach > self.bound:
            told = f"the scales multiply to 2^{reach:.0f}, beyond 2^{self.bound:g}"
            return Stop(step.node, f"{told}; the product begins anew at {described(step.node)}")
        return None

    def _base(self, owner: _Set) -> Vector:
        """What factors that are known relative to each other have to be divided by."""
        for at, factor in owner.factors.items():
            if at in self._fixed:
                return factor
        base = np.ones(self.region.features)
        low, high = _range(owner.factors.values())
        if max(float(high.max()), float(-low.min())) > self.bound:
            base = 2.0 ** np.rint((high + low) / 2)  # a power of two rounds nothing
        for at, factor in owner.factors.items():
            if at in self._positive:
                return np.asarray(base * np.sign(factor))
        return base


def _range(factors: Iterable[Vector]) -> tuple[Vector, Vector]:
    """The least and the largest log2 |a| of every feature."""
    logs = np.log2(np.abs(np.stack(list(factors))))
    return logs.min(axis=0), logs.max(axis=0)


def _classes(region: Region) -> dict[AnyValue, int]:
    """The class of every value: values that are tied have one and the same."""
    leader: dict[AnyValue, AnyValue] = {v: v for v in region.values}

    def root(value: AnyValue) -> AnyValue:
        while leader[value] is not value:
            leader[value] = leader[leader[value]]
            value = leader[value]
        return value

    for one, other in region.ties:
        leader[root(other)] = root(one)
    numbers: dict[AnyValue, int] = {}
    return {v: numbers.setdefault(root(v), len(numbers)) for v in region.values}
