"""Store centered streams without the direction that is always zero: d features in d - 1.

    x 1 = 0,  V^T V = I,  V V^T = C:     x -> x V,   W -> W V for writers,   W -> V^T W for readers
    RMS_eps(x) = sqrt(d / r) * RMS_eps'(x V) V^T      r = d - 1,   eps' = eps d / r

V are the first d - 1 columns of the reflection that takes 1 / sqrt(d) to the last axis. Exact over
the reals for streams whose writers have no mean (stream-fold-mean) and whose norms have no affine
(fold-norm-affine). In floating point every weight is formed in float64 and rounded once. A width of
d - 1 is rarely a good one for matrix multiplication, so it has to be asked for. Shapes that the
graph computes keep their meaning: what is computed from the size of a stream still gets d, and
where a stream is brought to a computed shape, that is made smaller there. Source: Z. Jiang, J. Gu,
H. Zhu, D. Z. Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers" (2023), section 3; they drop the last
feature, an orthonormal basis keeps the norm what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxnorm.basis_change import BasisChange, basis_changes
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.given import GivenNorm
from onnxnorm.module import Node
from onnxnorm.port import rounded
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.stream import Streams, called, find_streams
from onnxnorm.transfer import Demand, Stop, described

_SITE: Final = "stream-compress:"
_finfo: Final[Callable[[Any], Any]] = ml_dtypes.finfo  # it has no types of its own


@dataclass(frozen=True)
class StreamCompress(Pass):
    """Take one feature out of every centered RMS stream.

    Attributes:
        multiple: Refuse unless d - 1 is a multiple of this.
    """

    multiple: int = 1

    name: ClassVar = "stream-compress"
    summary: ClassVar = "centered RMS streams with d - 1 features in place of d"
    equation: ClassVar = "RMS(h W) U -> RMS'(h (W V)) (V^T U),   V V^T = I - 1 1^T / d"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every stream that an RMS norm reads."""
        for stream, change in basis_changes(facts):
            root = stream.norms[0].node
            nodes = [node for norm in stream.norms for node in norm.nodes]
            if any(n.site.startswith(_SITE) for n in nodes):
                continue  # a moment ago, by this run
            if any(n.made_by.startswith(_SITE) for n in nodes):
                yield Refusal("it is compressed already", root.label, node=root)
                continue
            streams = find_streams(facts)
            if isinstance(change, BasisChange):
                change = self._checked(change, stream.norms, streams) or change
            if isinstance(change, Stop):
                yield change.refusal(root)
                continue
            targets = _targets(change, streams)
            if isinstance(targets, Stop):
                yield targets.refusal(root)
                continue
            measured = _measured(change, streams)
            if isinstance(measured, Stop):
                yield measured.refusal(root)
                continue
            inside = sorted(change.inside, key=streams.order.__getitem__)
            yield Plan(
                root,
                tuple(dict.fromkeys((root, *inside, *measured))),
                _Detail(change, tuple(stream.norms), tuple(inside), targets, measured),
                outputs=change.outputs,
                local=False,
            )

    def _checked(
        self, change: BasisChange, norms: tuple[GivenNorm, ...], streams: Streams
    ) -> Stop | None:
        """Why a stream that could change its basis cannot lose a feature."""
        width = change.features - 1
        if width < 1 or width % self.multiple:
            wanted = max(1, round(width / self.multiple)) * self.multiple + 1
            told = (
                f"a stream of {change.features} features would have {width}, which is not a"
                f" multiple of {self.multiple}; a model of width {wanted} would have one"
            )
            return Stop(norms[0].node, told)
        for node, demand in change.writers:
            if not _centered(demand):
                name = "" if demand.constant is None else demand.constant.name
                told = f"'{name}' of {described(node)} has a mean; stream-fold-mean takes it out"
                return Stop(node, told)
        for norm in norms:
            if norm.gamma is None:
                return Stop(norm.node, f"{called(norm)} has no scale to correct")
        return None

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Copy what carries the stream, at the new width, and let the readers take the copies."""
        detail: _Detail = plan.detail
        change = detail.change
        weights = change.stage(rw, complement(change.features), "compressed")
        new: dict[AnyValue, AnyValue] = {}
        readers = {i.node: i for i, _ in change.readers if i.node.outputs[0] not in change.values}
        parameters = {
            key: value for norm in detail.norms for key, value in _parameters(norm, change, rw)
        }
        for node in detail.inside:
            if node in readers:
                at, weight = readers[node].index, readers[node].weight_index
                rw.rewire(node, at, new.get(node.inputs[at], node.inputs[at]))
                rw.rewire(node, weight, weights[node, weight])
                continue
            inputs: list[AnyValue] = []
            for index, value in enumerate(node.inputs):
                given = weights.get((node, index)) or parameters.get((node, index))
                if given is None and (node, index) in detail.targets:
                    target = detail.targets[node, index]
                    given = rw.constant("target", np.asarray(target.sizes, np.int64), at=node)
                    if target.removed:
                        given = rw.add("Sub", [value, given], "target", at=node)
                inputs.append(given if given is not None else new.get(value, value))
            made = rw.copy(node, inputs, "compressed", attrs=_attributes(node, detail, change))
            new.update(zip(node.outputs, made, strict=True))
        for node, missing in detail.measured.items():
            made = rw.copy(node, [new[node.inputs[0]]], "compressed")
            rw.replace("Add", [made[0], rw.constant("missing", missing, at=node)], at=node)


@dataclass(frozen=True)
class _Target:
    """A shape that names the width.

    Attributes:
        sizes: The new shape; or, if it is computed, what to take away from it.
        removed: Whether it is computed.
    """

    sizes: list[int]
    removed: bool


@dataclass(frozen=True)
class _Detail:
    change: BasisChange
    norms: tuple[GivenNorm, ...]
    inside: tuple[Node, ...]
    targets: dict[tuple[Node, int], _Target]
    measured: dict[Node, NDArray[np.int64]]


def complement(size: int) -> NDArray[np.float64]:
    """V, d x (d - 1), with V^T V = I and V V^T = I - 1 1^T / d.

    >>> v = complement(5)
    >>> bool(np.allclose(v.T @ v, np.eye(4)) and np.allclose(v.T @ np.ones(5), 0))
    True
    """
    u = -np.full(size, size**-0.5)
    u[-1] += 1.0
    reflection = np.eye(size) - 2.0 * np.outer(u, u) / (u @ u)
    return np.asarray(reflection[:, :-1])


def _centered(demand: Demand) -> bool:
    """Whether a writer's constant has no mean but for the rounding of its entries."""
    assert demand.constant is not None, "a writer is a constant"
    array = demand.constant.float64()
    layout = demand.basis.layout
    unit = float(_finfo(demand.constant.dtype).eps) / 2
    removed = np.abs(array - layout.centered(array)).max(initial=0.0)
    room = 4.0 * unit * np.sqrt(layout.features) * np.abs(array).max(initial=0.0)
    return bool(removed <= room)


def _parameters(
    norm: GivenNorm, change: BasisChange, rw: Rewriter
) -> Iterator[tuple[tuple[Node, int], AnyValue]]:
    """The scale of a norm, and its epsilon where that is a constant: at the new width."""
    d, r = change.features, change.features - 1
    assert norm.gamma is not None, "checked before"
    scale = np.full(r, float(norm.gamma.flat[0]) * np.sqrt(d / r))
    for node in norm.nodes:
        for index, value in enumerate(node.inputs):
            constant = rw.facts.constant(value)
            if constant is None:
                continue
            if node is norm.node and (node.op == "Mul" or index == 1):
                array = rounded(scale, constant.dtype)
                yield (node, index), rw.constant("scale", array, at=node)
            elif node.op == "Add":
                array = rounded(np.asarray(norm.epsilon * d / r), constant.dtype)
                yield (node, index), rw.constant("epsilon", array, at=node)


def _attributes(node: Node, detail: _Detail, change: BasisChange) -> dict[str, Any]:
    """The attributes that change: epsilon, of a norm that is one operator."""
    d = change.features
    for norm in detail.norms:
        if norm.node is node and norm.nodes == (node,):
            return {"epsilon": norm.epsilon * d / (d - 1)}
    return {}


def _targets(change: BasisChange, streams: Streams) -> dict[tuple[Node, int], _Target] | Stop:
    """The shapes that name the width; or a node whose shape is not known."""
    found: dict[tuple[Node, int], _Target] = {}
    for node in change.inside:
        if node.op not in ("Reshape", "Expand", "Resize"):
            continue
        layout = change.values.get(node.outputs[0])
        if layout is None:
            continue
        target = streams.sizes.entries(node.inputs[1]) if node.op != "Resize" else None
        axis, part = layout.parts[0].axis, layout.parts[0]
        if target is None or (target.size >= -axis and not isinstance(target[axis], int)):
            return Stop(node, f"{described(node)} computes its shape")
        if target.size < -axis:
            return Stop(node, f"{described(node)} has a shape that does not name the features")
        if target[axis] != part.extent:
            continue  # 1, 0 and -1 fit every width
        fixed = streams.facts.constant(node.inputs[1]) is not None
        sizes = target.tolist() if fixed else [0] * target.size
        sizes[axis] = part.outer * (change.features - 1) if fixed else part.outer
        found[node, 1] = _Target(sizes, removed=not fixed)
    return found


def _measured(change: BasisChange, streams: Streams) -> dict[Node, NDArray[np.int64]] | Stop:
    """The nodes that take the shape of a value, with what the new shape lacks of the old."""
    found: dict[Node, NDArray[np.int64]] = {}
    for value, layout in change.values.items():
        for use in streams.facts.uses(value):
            node, rank = use.node, streams.transfer.rank(value)
            if node.op not in ("Shape", "Size") or node in found:
                continue
            bounds = node.parameter("start", "end")
            if node.op == "Size" or rank is None or bounds:
                return Stop(node, f"{described(node)} computes with the width of '{value.name}'")
            missing = np.zeros(rank, np.int64)
            missing[layout.parts[0].axis] = layout.parts[0].outer
            found[node] = missing[node.attrs.get("start", 0) : node.attrs.get("end", rank)]
    return found
