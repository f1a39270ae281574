"""What an affine map needs where it flows: constants that change, numbers, additions that stay.

`onnxnorm.flow_back` takes a map against the edges into what makes a value, `onnxnorm.flow_forth`
along them into what reads it. Both go through the same table of moves, and both end in this.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxnorm.affine import Affine, Vector, varies
from onnxnorm.change import Change, Inputs, stage
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.module import Node, Value
from onnxnorm.moves import Halt, padding
from onnxnorm.port import REAL, is_real, rounded
from onnxnorm.rewrite import Rewriter
from onnxnorm.transfer import Transfer


@dataclass(frozen=True, eq=False)
class Retune:
    """A node whose attributes change, as the epsilon of a norm does when its input is scaled."""

    node: Node
    attrs: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Addition:
    """An Add that is put behind a value, for a shift that no constant takes.

    Attributes:
        value: What is shifted.
        shift: By how much.
        dtype: The type of both.
    """

    value: Value
    shift: Vector
    dtype: np.dtype[Any]

    def change(self, node: Node) -> Change:
        """It as the constant of that Add, for the checks on constants."""
        return Change(node, -1, None, self.dtype, np.ones(()), self.shift, bias=True)


@dataclass
class Flow:
    """Where a map went.

    Attributes:
        ends: The operators whose constants took it, in the order in which they were found.
        between: The nodes it went through, whose results change.
        changes: What becomes of constants.
        retunes: What becomes of attributes.
        additions: What has to be added at run time.
        results: The values behind which everything is as it was; only where it flows forth.
    """

    ends: dict[Node, None] = field(default_factory=dict)
    between: dict[Node, None] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    retunes: list[Retune] = field(default_factory=list)
    additions: list[Addition] = field(default_factory=list)
    results: dict[AnyValue, None] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node that computes something else than before."""
        return tuple(dict.fromkeys((*self.ends, *self.between)))

    def end(self, node: Node, *changes: Change) -> None:
        """A node takes the map into its constants."""
        self.ends[node] = None
        self.changes += changes

    def change(
        self,
        node: Node,
        index: int,
        transfer: Transfer,
        scale: Vector | float = 1.0,
        shift: Vector | float | None = None,
        *,
        bias: bool = True,
        dtype: np.dtype[Any] | None = None,
    ) -> None:
        """A constant input of a node becomes scale * c + shift.

        Raises:
            Halt: It is not a constant of real numbers, or its place is empty and a type is missing.
        """
        given = len(node.inputs) > index and bool(node.inputs[index].name)
        constant = transfer.facts.constant(node.inputs[index]) if given else None
        if given and constant is None:
            raise Halt(f"takes '{node.inputs[index].name}', which is computed")
        factor = np.asarray(scale, np.float64)
        added = None if shift is None else np.asarray(shift, np.float64)
        if added is not None and not added.any():
            added = None
        if constant is not None:
            found = constant.dtype
            if not is_real(found):
                raise Halt(f"takes '{constant.name}' of type {found}")
        else:
            assert dtype is not None or added is None, "an empty place gets a type"
            found = dtype if dtype is not None else np.dtype(np.float32)
        if added is None and (constant is None or not (factor != 1.0).any()):
            return
        self.changes.append(Change(node, index, constant, found, factor, added, bias))


def fits(value: AnyValue, affine: Affine, transfer: Transfer) -> bool:
    """Whether a value is known to have entries of its own wherever the map varies."""
    return all(
        transfer.sizes.dim(value, axis) == part.shape[axis]
        for part in (affine.scale, affine.shift)
        for axis in varies(part)
    )


def dtype_of(value: AnyValue, facts: Facts) -> np.dtype[Any] | None:
    """The element type of a value where it is a real one that is known."""
    known = facts.type(value)
    if known is None or known.element not in REAL:
        return None
    return onnx.helper.tensor_dtype_to_np_dtype(known.element)


def pad(flow: Flow, node: Node, to: Affine, transfer: Transfer) -> None:
    """Map the number that a Pad fills in.

    Raises:
        Halt: It would be another number for each channel.
    """
    value = padding(transfer, node)
    if value is None:
        return
    number = value if isinstance(value, float) else float(value.float64().reshape(-1)[0])
    mapped = Affine.of(to.scale * number, to.shift)
    if number == 0.0 and not to.shifts:
        return
    if mapped.scale.size > 1 or mapped.shift.size > 1:
        raise Halt("pads every channel with one number", shift=number == 0.0)
    if isinstance(value, float):
        dtype = dtype_of(node.inputs[0], transfer.facts)
        if node.scope.opsets[""] < 11 or dtype is None:
            raise Halt("pads with a number that is an attribute", shift=number == 0.0)
        flow.change(node, 2, transfer, shift=mapped.scale + mapped.shift, dtype=dtype)
    else:
        flow.change(node, 2, transfer, to.scale, to.shift)


def concatenated(node: Node, t: Transfer) -> tuple[int, list[int]]:
    """The axis of a Concat, from the right, and where each of its inputs starts; then the end.

    Raises:
        Halt: It is not known.
    """
    axes = t.from_right(node.outputs[0], [int(node.attrs["axis"])])
    if axes is None:
        raise Halt("joins values along an axis that is not known")
    starts = [0]
    for value in node.inputs:
        size = t.sizes.dim(value, axes[0])
        if not isinstance(size, int):
            raise Halt("joins values of unknown sizes")
        starts.append(starts[-1] + size)
    return axes[0], starts


def stage_flow(flow: Flow, rw: Rewriter) -> None:
    """Stage all that a flow along the edges changes. What is held behind a node gets its name."""
    facts = rw.facts
    inputs = stage(flow.changes, rw, {})
    held = {facts.producer(a.value): a for a in flow.additions}
    retuned = {r.node for r in flow.retunes}
    rewire(rw, {key: v for key, v in inputs.items() if key[0] not in retuned | set(held)})
    for node, addition in held.items():
        assert node is not None, "a linear operator makes what is held"
        given = [
            v if v is not None else Value("", node.scope) for v in changed_inputs(node, inputs)
        ]
        (bare,) = rw.copy(node, given, "unshifted")
        name = f"{addition.value.name}_bias"
        array = rounded(addition.shift, addition.dtype)
        rw.replace("Add", [bare, rw.constant("bias", array, at=node, name=name)], at=node)
    for retune in flow.retunes:
        node = retune.node
        attrs = {**node.attrs, **retune.attrs}
        rw.replace(node.op, changed_inputs(node, inputs), attrs=attrs, at=node)


def changed_inputs(node: Node, inputs: Inputs) -> list[AnyValue | None]:
    """The inputs of a node with those that change."""
    own = {index: v for (at, index), v in inputs.items() if at is node}
    count = max(len(node.inputs), *(index + 1 for index in own), 0)
    given: list[AnyValue | None] = [*node.inputs, *(None,) * (count - len(node.inputs))]
    return [own.get(index, v) for index, v in enumerate(given)]


def rewire(rw: Rewriter, inputs: Inputs) -> None:
    """Let nodes read other inputs."""
    for (node, index), value in inputs.items():
        rw.rewire(node, index, value)
