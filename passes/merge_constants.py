"""Keep a large constant once where the model has it several times.

    W_1 = W_2 (the same type, shape and bytes)  ->  all that read W_2 read W_1

An exporter writes a weight once for each module that uses it, transposed or cast on the way, and a
network can have equal ones by itself: layers that share their weights, padding, tables. The file
and the session then hold copies, and a processor reads each of them into its cache anew:
light_shufflenet, whose weights are one number each, runs at 0.95 of its latency once equal ones
are one (docs/benchmark.md). onnxruntime, which computes nodes that are the same only once, does not
see that two initializers are equal. The same numbers, bit for bit. What a graph output, a
quantization annotation or training names stays, and so do constants of other graphs: a body may be
cut out of the model.

It runs when no other pass has anything left to do, since these may change a constant of one reader
without a copy of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm.facts import AnyValue, Constant, Facts
from onnxnorm.module import Node, Scope
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter

_PROBE: Final = 4096  # bytes of each constant that are looked at before all of two are compared

_Merge: TypeAlias = tuple[AnyValue, AnyValue]  # what goes, and what is read in its place


@dataclass(frozen=True)
class MergeConstants(Pass):
    """Let equal constants be one.

    Attributes:
        min_bytes: The smallest constant that is looked at; below it there is nothing to gain.
    """

    min_bytes: int = 128

    name: ClassVar = "merge-constants"
    summary: ClassVar = "equal weights are kept once"
    equation: ClassVar = "f(W1), g(W2), W1 = W2 -> f(W1), g(W1)"
    closing: ClassVar = True

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every node that is the first to read a constant which is there already."""
        merges: dict[Node, list[_Merge]] = {}
        for scope in (s for s in facts.module.scopes if not s.is_ours):
            for gone, kept in self._equal(scope, facts):
                merges.setdefault(_first_reader(gone, facts), []).append((gone, kept))
        for root, found in merges.items():
            readers = dict.fromkeys(use.node for gone, _ in found for use in facts.uses(gone))
            yield Plan(
                root,
                (root,),
                tuple(found),
                inside=tuple(readers),
                outputs=tuple(v for node in readers for v in node.outputs if v.name),
                into="constant",
                note="; ".join(f"'{gone.name}' is '{kept.name}'" for gone, kept in found),
            )

    def _equal(self, scope: Scope, facts: Facts) -> Iterator[_Merge]:
        """The constants of a scope that are equal to an earlier one, with that one."""
        alike: dict[object, list[tuple[AnyValue, Constant]]] = {}
        for value in _stored(scope):
            constant = facts.constant(value)
            if constant is None or constant.dtype.kind == "O" or constant.nbytes < self.min_bytes:
                continue
            alike.setdefault((constant.dtype, constant.shape), []).append((value, constant))
        for found in alike.values():
            known: dict[bytes, list[tuple[AnyValue, Constant]]] = {}
            for value, constant in found if len(found) > 1 else ():
                values = _bytes(constant)
                before = known.setdefault(values[:_PROBE].tobytes(), [])
                kept = next((v for v, c in before if np.array_equal(_bytes(c), values)), None)
                if kept is None:
                    before.append((value, constant))
                elif facts.pinned(value) is None and _may_go(value, kept, facts):
                    yield value, kept

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """All readers read the one that stays."""
        for gone, kept in plan.detail:
            rw.redirect(gone, kept)


def _stored(scope: Scope) -> Iterator[AnyValue]:
    """The tensors that a scope holds: initializers, then those of Constant nodes, in order."""
    yield from (w for w in scope.weights if isinstance(w.proto, onnx.TensorProto))
    for node in scope.nodes:
        if node.op == "Constant" and not node.domain and "value" in node.attrs:
            yield node.outputs[0]


def _may_go(gone: AnyValue, kept: AnyValue, facts: Facts) -> bool:
    """Whether somebody reads `gone`, and nobody before `kept` is there."""
    if not facts.uses(gone):
        return False
    made = facts.producer(kept)
    at = facts.positions
    return made is None or at[made] < at[_first_reader(gone, facts)]


def _first_reader(value: AnyValue, facts: Facts) -> Node:
    """The first node of the scope of a value that reads it, by itself or in a body."""
    readers = []
    for use in facts.uses(value):
        node = use.node
        while node.scope is not value.scope:
            owner = node.scope.owner
            assert owner is not None, "a value is read in its scope and in the bodies inside it"
            node = owner
        readers.append(node)
    return min(readers, key=facts.positions.__getitem__)


def _bytes(constant: Constant) -> NDArray[np.uint8]:
    """The values as they lie in memory: 0 and -0 differ, a NaN is equal to itself."""
    return np.ascontiguousarray(constant.array()).reshape(-1).view(np.uint8)
