"""Write what is left of a scale and shift per channel so that onnxruntime's CPU keeps its layout.

    Add(Mul(x, s), t)  ->  BatchNormalization(x; s, t, mean 0, variance 1, epsilon 0)

onnxruntime runs convolutions, pools and what stands between them on blocks of channels (NCHWc). A
Mul or Add of constants is not done on blocks, so the tensor is put in order before it and into
blocks behind it; a BatchNormalization is, together with the Relu behind it (see docs/targets.md).
For `ort-cpu` alone, between values that onnxruntime has in blocks, with a channel count that every
block size divides: elsewhere the operator is slower than an Add. A Mul or Add behind a convolution
that nobody else reads stays, since onnxruntime takes it into the convolution.

Exact over the reals; s and t are formed in float64 and rounded once. Source: the definition of
BatchNormalization in the ONNX operator specification, and onnxruntime's NchwcTransformer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.affine_maps import Map, map_chain, read_map
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.layout import Layout
from onnxnorm.module import Node
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Transfer

_RANK: Final = 4  # of what onnxruntime has in blocks
_BLOCK: Final = 16  # channels of a block with AVX-512; 8 with AVX2
_SINCE: Final = 9  # the opset from which on BatchNormalization is always one number a channel
_MAPS: Final = frozenset({"Add", "BatchNormalization", "Div", "Mul", "Sub"})
_WINDOWS: Final = frozenset({"AveragePool", "Conv", "MaxPool"})  # what puts a tensor into blocks
_KEEPING: Final = frozenset({"Relu", "Sigmoid", "Tanh"})  # of one tensor, done on blocks
_HOPS: Final = 64  # nodes between a value and the windows that made it


@dataclass(frozen=True)
class LowerChannelAffine(Pass):
    """Write scales and shifts between convolutions as a BatchNormalization.

    Attributes:
        target: `onnx`, `ort-cpu` or `ort-cuda`; given by --target.
    """

    target: str = "onnx"

    name: ClassVar = "lower-channel-affine"
    summary: ClassVar = "scales and shifts that stay between convolutions (--target ort-cpu)"
    equation: ClassVar = "s x + t -> BatchNormalization(x)"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every longest chain of constant maps between two values in blocks."""
        if self.target != "ort-cpu":
            return
        transfer, blocks, taken = Transfer(facts, find_sizes(facts)), _Blocks(facts), set[Node]()
        for node in reversed(list(facts.module.nodes())):
            found = None if node in taken else _chain(node, transfer, blocks)
            if found is not None:
                taken.update(found.nodes)
                yield Plan(node, found.nodes, found, action="lowered", into="BatchNormalization")

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Statistics that change nothing, and the map as scale and bias."""
        found: _Chain = plan.detail
        given = {"scale": found.scale, "bias": found.shift}
        same = {"mean": np.zeros_like(found.scale), "variance": np.ones_like(found.scale)}
        constants = [rw.constant(role, array) for role, array in (given | same).items()]
        rw.replace("BatchNormalization", [found.base, *constants], attrs={"epsilon": 0.0})


@dataclass(frozen=True, eq=False)
class _Chain:
    base: AnyValue
    nodes: tuple[Node, ...]
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


def _chain(last: Node, transfer: Transfer, blocks: _Blocks) -> _Chain | None:
    """The longest chain of maps that ends with a node, and begins with a value in blocks."""
    facts = transfer.facts
    if last.op not in _MAPS or last.domain or last.scope.opsets.get("", 0) < _SINCE:
        return None
    channels = blocks.channels(last.outputs[0])
    if channels is None or not blocks.go_on(last.outputs[0]):
        return None
    layout = Layout.whole_axes([1 - _RANK], [channels])
    step = read_map(last, layout, transfer)
    if not isinstance(step, Map):
        return None
    before = map_chain(step.source, last, layout, transfer)
    for base, (scale, shift, nodes) in reversed(before.items()):
        nodes = (*nodes, last)
        if not blocks.hold(base) or _fused(base, facts):
            continue
        if len(nodes) == 1 and last.op == "BatchNormalization":
            return None
        if step.scale is not None:
            scale, shift = step.scale * scale, step.scale * shift
        if step.shift is not None:
            shift = shift + step.shift
        with np.errstate(over="ignore"):
            rounded = scale.astype(np.float32), shift.astype(np.float32)
        if all(np.isfinite(each).all() for each in rounded):
            return _Chain(base, nodes, *rounded)
    return None


def _fused(base: AnyValue, facts: Facts) -> bool:
    """Whether onnxruntime takes the maps into the convolution that makes their input."""
    made = facts.producer(base)
    return made is not None and made.op == "Conv" and facts.alone(base)


class _Blocks:
    """Which values onnxruntime has in blocks of channels, as far as is known here."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._sizes = find_sizes(facts)
        self._held: dict[AnyValue, bool] = {}

    def channels(self, value: AnyValue) -> int | None:
        """The channels of a value of float32 that fill whole blocks; None where they do not."""
        known, dims = self._facts.type(value), self._sizes.of(value)
        if known is None or known.element != onnx.TensorProto.FLOAT:
            return None
        if dims is None or len(dims) != _RANK or not isinstance(dims[1], int):
            return None
        return dims[1] if dims[1] > 0 and dims[1] % _BLOCK == 0 else None

    def hold(self, value: AnyValue, hops: int = _HOPS) -> bool:
        """Whether a value is made in blocks."""
        if value not in self._held:
            self._held[value] = self._holds(value, hops)
        return self._held[value]

    def _holds(self, value: AnyValue, hops: int) -> bool:
        made = self._facts.producer(value)
        if hops == 0 or made is None or made.domain or self.channels(value) is None:
            return False
        if made.op == "Conv":
            return self._is_blocked(made)
        if made.op in _WINDOWS:
            return self.channels(made.inputs[0]) is not None
        if made.op in _KEEPING or made.op == "BatchNormalization":
            return self.hold(made.inputs[0], hops - 1)
        joins = made.op == "Concat" and made.attrs.get("axis", 0) in (1, 1 - _RANK)
        adds = made.op in ("Add", "Sum")
        return (joins or adds) and all(self.hold(each, hops - 1) for each in made.inputs)

    def _is_blocked(self, conv: Node) -> bool:
        """Whether a convolution is done on blocks: all in one group, or one channel a group."""
        weight = self._facts.constant(conv.inputs[1])
        if weight is None or len(weight.shape) != _RANK:
            return False
        group = int(conv.attrs.get("group", 1))
        return group == 1 or (group == weight.shape[0] and weight.shape[1] == 1)

    def go_on(self, value: AnyValue) -> bool:
        """Whether a value is read in blocks, by some reader, also behind an activation."""
        readers = self._readers(value)
        behind = [n.outputs[0] for n in readers if n.op in _KEEPING and not n.domain]
        return any(self._reads(n) for v in (value, *behind) for n in self._readers(v))

    def _readers(self, value: AnyValue) -> list[Node]:
        return [use.node for use in self._facts.uses(value)]

    def _reads(self, node: Node) -> bool:
        if node.domain:
            return False
        return self._is_blocked(node) if node.op == "Conv" else node.op in _WINDOWS
