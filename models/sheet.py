"""A Network whose operators are written as the opset wants them, and its constants as one chooses.

One sheet is one scope: the main graph, a body of If or Loop, or a model-local function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from models.network import Network, Shape, uniform

CONSTANTS: Final = ("initializer", "node", "attribute", "identity", "identity_node")
SCOPES: Final = ("main", "if", "loop", "function")
_DOMAIN: Final = "models.spellings"

# First opset in which the axes of a reduction are an input.
_AXES_AS_INPUT: Final = {"ReduceSum": 13}
_AXES_AS_INPUT_OTHERS: Final = 18


class Sheet(Network):
    """A scope under construction; values that nobody names are named after their operator.

    Args:
        name: Of the scope; also the seed of its parameters.
        opset: Of the default domain.
        dtype: TensorProto type of inputs, and of constants that say no other.
        constants: How a constant is stored, one of `CONSTANTS`.
    """

    def __init__(
        self,
        name: str,
        opset: int = 17,
        dtype: int = TensorProto.FLOAT,
        constants: str = "initializer",
    ) -> None:
        super().__init__(name, opset, dtype)
        self.constants = constants
        self._counts: dict[str, int] = {}

    def fresh(self, stem: str) -> str:
        """Return a value name that nobody has."""
        self._counts[stem] = self._counts.get(stem, 0) + 1
        count = self._counts[stem]
        return stem if count == 1 else f"{stem}_{count}"

    def do(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Append a node and return its output, named after the operator."""
        return self.op(op_type, *inputs, out=self.fresh(op_type.lower()), **attributes)

    # ** constants **

    def const(self, values: Any, dtype: int | None = None, stem: str = "c") -> str:
        """Store a constant in the sheet's way.

        Args:
            values: Anything that NumPy reads; rounded once from float64.
            dtype: Another type than the sheet's.
            stem: Of its name.
        """
        name = self.fresh(stem)
        kind = dtype or self.dtype
        tensor = self.tensor(name, values, kind)
        floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
        if self.constants == "initializer" or (self.opset < 9 and kind not in floats):
            self.initializers.append(tensor)
            return name
        if self.constants == "identity":
            tensor.name = f"{name}.stored"
            self.initializers.append(tensor)
            return self.op("Identity", tensor.name, out=name)
        stored = f"{name}.stored" if self.constants == "identity_node" else name
        attributes: dict[str, Any] = {"value": tensor}
        if self.constants == "attribute" and self.opset >= 12 and len(tensor.dims) < 2:
            number = np.asarray(values).tolist()
            plural = "s" if tensor.dims else ""
            if kind == TensorProto.FLOAT:
                number = [float(v) for v in number] if plural else float(number)
                attributes = {f"value_float{plural}": number}
            elif kind == TensorProto.INT64:
                number = [int(v) for v in number] if plural else int(number)
                attributes = {f"value_int{plural}": number}
        self.op("Constant", out=stored, **attributes)
        return name if stored == name else self.op("Identity", stored, out=name)

    def ints(self, values: Sequence[int] | int, stem: str = "i") -> str:
        """Store int64 numbers: axes, shapes."""
        return self.const(values, TensorProto.INT64, stem)

    def draw(self, stem: str, shape: Sequence[int], low: float, high: float) -> NDArray[np.float64]:
        """Return uniform draws in [low, high); the same for the same sheet and stem."""
        return uniform(f"{self.name}/{stem}", shape, low, high)

    # ** operators whose form depends on the opset **

    def reduce(
        self,
        op_type: str,
        x: str,
        axes: Sequence[int] | None,
        keepdims: int | None = 1,
        explicit: bool = False,
    ) -> str:
        """Append a reduction; axes None is over all, keepdims None leaves the attribute out.

        `explicit` writes down noop_with_empty_axes=0, which is what its absence means.
        """
        given: dict[str, Any] = {} if keepdims is None else {"keepdims": keepdims}
        inputs = [x]
        if axes is not None and self.opset >= _AXES_AS_INPUT.get(op_type, _AXES_AS_INPUT_OTHERS):
            inputs.append(self.ints(list(axes), "axes"))
            if explicit:
                given["noop_with_empty_axes"] = 0
        elif axes is not None:
            given["axes"] = list(axes)
        return self.do(op_type, *inputs, **given)

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        """Append Unsqueeze."""
        if self.opset >= 13:
            return self.do("Unsqueeze", x, self.ints(list(axes), "axes"))
        return self.do("Unsqueeze", x, axes=list(axes))

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Append Reshape to a constant shape; 0 copies an extent, -1 is the rest."""
        return self.do("Reshape", x, self.ints(list(shape), "shape"))

    def clip(self, x: str, low: float, dtype: int | None = None) -> str:
        """Append Clip from below."""
        if self.opset >= 11:
            return self.do("Clip", x, self.const(low, dtype, "low"))
        return self.do("Clip", x, min=low)

    def cast(self, x: str, dtype: int) -> str:
        """Append Cast."""
        return self.do("Cast", x, to=dtype)

    def split(self, x: str, axis: int, sizes: Sequence[int]) -> list[str]:
        """Append Split into parts of these sizes."""
        outputs = [self.fresh("split") for _ in sizes]
        if self.opset >= 13:
            self.op("Split", x, self.ints(list(sizes), "sizes"), out=outputs, axis=axis)
        else:
            self.op("Split", x, out=outputs, axis=axis, split=list(sizes))
        return outputs

    def noop(self, x: str, how: str, rank: int, dtype: int) -> str:
        """Append an operator that does nothing in inference, or none.

        Args:
            x: The value.
            how: `none`, `identity`, `dropout`, `reshape`, `transpose` or `cast`.
            rank: Of x.
            dtype: Of x.
        """
        if how == "identity":
            return self.do("Identity", x)
        if how == "dropout":
            return self.do("Dropout", x)
        if how == "reshape":
            return self.reshape(x, [0] * (rank - 1) + [-1])
        if how == "transpose":
            return self.do("Transpose", x, perm=list(range(rank)))
        if how == "cast":
            return self.cast(x, dtype)
        return x


def place(
    outer: Sheet,
    scope: str,
    x: str,
    shape: Shape | None,
    write: Callable[[Sheet, str], str],
) -> str:
    """Write something in a scope of its own and return the value that leaves it.

    Args:
        outer: The main graph.
        scope: One of `SCOPES`.
        x: What it reads, a value of the main graph.
        shape: Of x and of the result; None where unknown.
        write: Appends nodes to the sheet of that scope, from the name x has there.
    """
    if scope == "main":
        return write(outer, x)
    inner = Sheet(outer.name, outer.opset, outer.dtype, outer.constants)
    if scope == "function":
        result = write(inner, "u")
        for tensor in inner.initializers:  # a function has none
            inner.nodes.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
        imports = [helper.make_opsetid("", outer.opset)]
        outer.functions.append(
            helper.make_function(_DOMAIN, "Block", ["u"], [result], inner.nodes, imports)
        )
        outer.op("Block", x, out="called")
        outer.nodes[-1].domain = _DOMAIN
        return "called"
    if scope == "if":
        inner.output(write(inner, x), shape)
        other = Sheet("else", outer.opset, outer.dtype)
        other.output(other.op("Identity", x, out="else.same"), shape)
        yes = outer.const(True, TensorProto.BOOL, "yes")
        return outer.op(
            "If", yes, out="chosen", then_branch=inner.graph(), else_branch=other.graph()
        )
    inner.input("trip", [], TensorProto.INT64)
    inner.input("going", [], TensorProto.BOOL)
    inner.input("state", shape)
    result = write(inner, "state")
    inner.output(inner.op("Identity", "going", out="still"), [], TensorProto.BOOL)
    inner.output(result, shape)
    count = outer.const(2, TensorProto.INT64, "trips")
    yes = outer.const(True, TensorProto.BOOL, "yes")
    return outer.op("Loop", count, yes, x, out="looped", body=inner.graph())


def size(shape: Sequence[int], axes: Sequence[int]) -> int:
    """Return the number of elements along the axes."""
    return math.prod(shape[a] for a in axes)
