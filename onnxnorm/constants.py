"""What a graph computes of constants alone: which values, and what they are.

    values(v) = f(values of the inputs), in float64;  stored once, rounded to the type of v

A value is constant where all that it is made of is: initializers, Constant nodes, what moves those,
sizes of axes that follow from the graph, and arithmetic on any of these. The arithmetic is done in
float64 and rounded once, so the result is the nearest that its type has to what the graph means;
integers are computed as they are. Where a float decides an integer (Floor, a comparison, a Cast to
an integer) the same is computed once more with a rounding after every node, and both must agree.

Nothing is computed that is not the same in every run, that changes what a quantizer wrote, or that
this table of operators does not know; `why_not` says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm import float64
from onnxnorm.facts import AnyValue, Facts, call_of
from onnxnorm.module import RANDOM, Node, Value
from onnxnorm.order import in_order
from onnxnorm.sizes import Entries, derived_sizes, find_sizes
from onnxnorm.storage import Array

Values = NDArray[Any]

LIMIT: Final = 256 << 20  # bytes that an operator may make of less
_SHAPE: Final = 1 << 10  # bytes that shapes, pads and the like stay below
_QUANTIZED: Final = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
# What turns real numbers into decisions, so that a rounding can change the outcome.
_DECIDES: Final = frozenset(
    {
        "ArgMax", "ArgMin", "Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "Hardmax",
        "IsInf", "IsNaN", "Less", "LessOrEqual", "Mod", "NonZero", "Not", "Range", "Round", "Sign",
        "TopK",
    }
)  # fmt: skip
_RECURRENT: Final = frozenset({"GRU", "LSTM", "RNN"})


@dataclass(frozen=True, eq=False)
class Computed:
    """A value that the graph computes of constants.

    Attributes:
        value: The value.
        shape: Its dims.
        dtype: Its element type.
        nodes: The nodes that compute it and nothing else that is read.
        freed: Bytes of the initializers that only these nodes read.
    """

    value: Value
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nodes: tuple[Node, ...]
    freed: int

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * self.dtype.itemsize


class Unknown(Exception):
    """Why a value cannot be computed here: a clause that names the node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


def find_constants(facts: Facts) -> Constants:
    """What a graph computes of constants, looked for once while the facts hold."""
    found: Constants | None = facts.kept.get("constants")
    if found is None:
        found = facts.kept["constants"] = Constants(facts)
    return found


class Constants:
    """The constant subgraphs of a module.

    Args:
        facts: What is true of the graph.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._computed: set[AnyValue] = set()
        # Sizes, shapes that are moved into place, and casts to the type of another value.
        self._static: dict[AnyValue, Array] = {}
        self._refused: dict[Node, str] = {}
        self._kept: dict[AnyValue, onnx.TensorProto] = {}  # what was computed once
        self._agreed: set[Node] = set()  # decisions that no rounding changes
        self._nodes = list(in_order(facts.module.nodes(), _needed_by))
        self._measures = any(n.op in ("Shape", "Size") and not n.domain for n in self._nodes)
        for node in self._nodes:
            self._visit(node)

    # ** which **

    def _visit(self, node: Node) -> None:
        outputs = [v for v in node.outputs if v.name]
        if not outputs:
            return
        if node.op == "CastLike" and self._reads_for_its_type(node):
            moved = self.facts.constant(outputs[0])
            if moved is not None:
                self._static[outputs[0]] = np.asarray(moved.array())
            return
        if all(self.facts.constant(v) is not None for v in outputs):
            if (arranged := self._arranged(outputs[0])) is not None:
                self._static[outputs[0]] = arranged
            return
        if (entries := self._entries(node)) is not None:
            self._static[outputs[0]] = entries
            return
        given = [v for v in node.inputs if v.name]
        if not given or not all(map(self.known, given)):
            return
        reason = why_not(node, self.facts)
        if reason is None:
            self._computed.update(outputs)
        elif any(self.facts.constant(v) is not None for v in given):
            self._refused[node] = reason

    def _arranged(self, value: AnyValue) -> NDArray[np.int64] | None:
        """A shape, pads or indices that nodes put together by moving constants.

        Moved weights stay as they are: all passes read through the moves, and to store them anew
        would gain nothing.
        """
        constant = self.facts.constant(value)
        if constant is None or constant.dtype != np.int64 or constant.nbytes > _SHAPE:
            return None
        made = self.facts.producer(constant.source)
        if made is None or made.op == "Constant" or self.facts.pinned(value) is not None:
            return None
        return np.asarray(constant.array())

    def _reads_for_its_type(self, node: Node) -> bool:
        """Whether a CastLike stands as a reader of a value that it needs the type of alone."""
        return not node.domain and len(node.inputs) == 2 and not self.known(node.inputs[1])

    def _entries(self, node: Node) -> NDArray[np.int64] | None:
        """What a node on sizes of axes gives, where that follows from the graph.

        In the main graph only: a body runs with shapes that may differ from turn to turn.
        """
        if not self._measures or node.scope is not self.facts.module.main or node.domain:
            return None
        out = node.outputs[0]
        known = self.facts.type(out)
        if known is None or known.element != onnx.TensorProto.INT64:
            return None
        if not any(v.name and self.facts.constant(v) is None for v in node.inputs):
            return None
        # What the file states is asked first: that is known already, and mostly it is not enough.
        if _numbers(find_sizes(self.facts).entries(out)) is None:
            return None
        return _numbers(derived_sizes(self.facts).entries(out))

    def known(self, value: AnyValue) -> bool:
        """Whether a value is constant: stored, moved, a size, or computed of such."""
        if value in self._static or value in self._computed:
            return True
        return self.facts.constant(value) is not None

    def refused(self) -> Iterator[tuple[Node, str]]:
        """Nodes all of whose inputs are constant, and why they are not computed."""
        yield from self._refused.items()

    def results(self) -> Iterator[Value]:
        """What is computed of constants and read by something that is not, in graph order."""
        for node in self._nodes:
            for value in node.outputs:
                if value not in self._static and value not in self._computed:
                    continue
                readers = [use.node for use in self.facts.uses(value)]
                inner = all(all(map(self.known, _named(n.outputs))) for n in readers)
                if self.facts.pinned(value) is not None or (readers and not inner):
                    yield value

    # ** what **

    def computed(self, value: Value) -> Computed:
        """A result with its type and shape; `array` gives it from now on as it is now.

        So what follows of another result is made of that before it is rounded, also once the graph
        has the rounded one in its place.

        Raises:
            Unknown: It cannot be computed here.
        """
        array = self.array(value)
        if value not in self._static:
            self._kept[value] = self.facts.module.stored.keep(value.name, array)
        nodes, freed = self._own(value)
        return Computed(value, array.shape, array.dtype, nodes, freed)

    def array(self, value: AnyValue) -> Array:
        """A value in its own type.

        Raises:
            Unknown: It cannot be computed here.
        """
        if value in self._static:
            return self._static[value]
        if value in self._kept:
            return self.facts.module.stored.array(self._kept[value])
        wide = self._values(value, rounded=False)
        node = self.facts.producer(value)
        assert node is not None, "a node computes it"
        return _narrowed(wide, self._dtype(value, wide, node), node)

    def origin(self, value: AnyValue) -> tuple[Node, ...]:
        """All nodes that lead to a value, from the tensors whose sizes it is made of.

        What is cut out of a graph to be run by itself needs them: its other inputs may be anything.
        """
        found: dict[Node, None] = {}
        pending = [value]
        sizes = find_sizes(self.facts)
        while pending:
            at = pending.pop()
            node = self.facts.producer(at)
            if node is None or node in found or self.facts.constant(at) is not None:
                continue
            found[node] = None
            if node.op not in ("Shape", "Size") or node.domain:
                pending += [
                    v for v in _named(node.inputs) if self.known(v) or sizes.entries(v) is not None
                ]
        return tuple(found)

    def _values(self, value: AnyValue, *, rounded: bool) -> Values:
        """A value with floats in float64, each node's result rounded to its type if asked."""
        known: dict[AnyValue, Values] = {}
        left: dict[AnyValue, int] = {}
        pending = [value]
        while pending:
            at = pending[-1]
            if at in known:
                pending.pop()
                continue
            if at not in self._computed:
                known[at] = self._leaf(at)
                continue
            node = self.facts.producer(at)
            assert node is not None, "a node computes it"
            missing = [v for v in _named(node.inputs) if v not in known]
            if missing:
                pending += missing
                continue
            results = self._run(node, [known[v] if v.name else None for v in node.inputs])
            for out, result in zip(node.outputs, results, strict=False):
                if out.name and result is not None:
                    known[out] = self._settled(out, np.asarray(result), node, rounded)
            if at not in known:
                raise Unknown(f"{node.op} gives no tensor of numbers", node)
            # Memory follows the largest, not their sum.
            for given in dict.fromkeys(_named(node.inputs)):
                left[given] = left.get(given, len({u.node for u in self.facts.uses(given)})) - 1
                if left[given] <= 0 and given is not value:
                    known.pop(given, None)
        return known[value]

    def _leaf(self, value: AnyValue) -> Values:
        if value in self._static:
            return self._static[value]
        constant = self.facts.constant(value)
        assert constant is not None, "it is constant"
        widened: Values = float64.widen(constant.array())
        return widened

    def _run(self, node: Node, given: Sequence[Values | None]) -> Sequence[Any]:
        before = max((a.size for a in given if a is not None), default=0)
        if (size := 8 * most_elements(node, given)) > max(LIMIT, 16 * before):
            raise Unknown(f"{node.op} makes {size >> 20} MB of it", node)
        try:
            if self._is_decided(node, given):
                self._decided(node)
            return _outcome(node, given)
        except Unknown:
            raise
        except Exception as error:  # numpy raises what it likes on what does not fit
            raise Unknown(f"{node.op} cannot be computed here: {error}", node) from error

    def _is_decided(self, node: Node, given: Sequence[Values | None]) -> bool:
        """Whether a node makes a decision on floats that were computed."""
        first = given[0] if given else None
        if first is None or first.dtype.kind != "f":
            return False
        if not any(v in self._computed for v in _named(node.inputs)):
            return False
        if node.op in ("Cast", "CastLike"):
            known = self.facts.type(node.outputs[0])
            return known is None or not float64.is_float_type(known.element)
        return node.op in _DECIDES

    def _decided(self, node: Node) -> None:
        """Raise where a rounding on the way would change what a node decides."""
        if node in self._agreed:
            return
        outcomes = []
        for rounded in (False, True):
            given = [self._values(v, rounded=rounded) if v.name else None for v in node.inputs]
            outcomes.append(_outcome(node, given)[0])
        if not np.array_equal(*outcomes):
            raise Unknown(f"{node.op} decides on a float, and rounding changes the outcome", node)
        self._agreed.add(node)

    def _settled(self, value: AnyValue, array: Values, node: Node, rounded: bool) -> Values:
        """A result as the next node reads it."""
        if array.dtype.kind not in "fiub":
            raise Unknown(f"{node.op} gives no tensor of numbers", node)
        dtype = self._dtype(value, array, node)
        if array.dtype.kind != "f":
            return array.astype(dtype, copy=False)
        narrow = _narrowed(array, dtype, node)
        return np.asarray(float64.widen(narrow)) if rounded else array

    def _dtype(self, value: AnyValue, array: Values, node: Node) -> np.dtype[Any]:
        known = self.facts.type(value)
        if known is None or not known.element:
            raise Unknown(f"the type of '{value.name}' is not known", node)
        dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(known.element)
        if float64.is_float_dtype(dtype) != (array.dtype.kind == "f"):
            raise Unknown(f"{node.op} gives {array.dtype}, and '{value.name}' is {dtype}", node)
        return dtype

    def _own(self, value: Value) -> tuple[tuple[Node, ...], int]:
        """The nodes that only this value needs, and the bytes of what only they read."""
        root = self.facts.producer(value)
        assert root is not None, "a node computes it"
        if any(v is not value and self._is_read(v) for v in root.outputs):
            return (root,), 0
        own: dict[Node, None] = {root: None}
        order = [root]
        freed = 0
        seen: set[AnyValue] = set()
        while order:
            for given in _named(order.pop(0).inputs):
                if given in seen or self.facts.pinned(given) is not None:
                    continue
                if not all(u.node in own for u in self.facts.uses(given)):
                    continue
                seen.add(given)
                made = self.facts.producer(given)
                constant = self.facts.constant(given)
                if made is None:
                    freed += constant.nbytes if constant is not None else 0
                elif made not in own and not any(
                    self._is_read(v) and not all(u.node in own for u in self.facts.uses(v))
                    for v in made.outputs
                ):
                    own[made] = None
                    order.append(made)
        return tuple(own), freed

    def _is_read(self, value: AnyValue) -> bool:
        return bool(value.name) and (bool(value.outputs) or self.facts.pinned(value) is not None)


def why_not(node: Node, facts: Facts) -> str | None:
    """Why a node on constants must run with the model; None where it can be computed before."""
    if node.domain != "":
        if any(s.is_function and s.path == node.op for s in facts.module.scopes):
            return f"{node.op} is a function of the model"
        return f"{node.op} is an operator of the domain {node.domain}"
    if node.bodies:
        return f"{node.op} runs graphs of its own, which are left to the model"
    if node.op in RANDOM:
        return f"{node.op} draws other numbers in every run"
    if node.op in _QUANTIZED:
        return "it keeps a weight in the form that a quantizer wrote"
    if node.op in _RECURRENT:
        return f"{node.op} is a network of its own"
    if node.parametric:
        return "an attribute is a parameter of the function"
    if node.op == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None
        constant = facts.constant(training) if training is not None else None
        if training is not None and (constant is None or bool(constant.array().any())):
            return "Dropout in training mode draws other numbers in every run"
        if len(_named(node.outputs)) > 1:
            return "the mask of a Dropout is read"
    if ("", node.op) not in float64.OPERATORS and node.op not in _BY_REFERENCE:
        return f"{node.op} is not computed here"
    return None


# Deterministic, without arithmetic on floats of their own, and exact on float64 arrays.
_BY_REFERENCE: Final = frozenset(
    {
        "Compress", "DepthToSpace", "GatherND", "NonZero", "Pad", "ReverseSequence",
        "ScatterElements", "ScatterND", "SpaceToDepth", "Split", "Tile", "Unique",
    }
)  # fmt: skip


def _outcome(node: Node, given: Sequence[Values | None]) -> Sequence[Any]:
    """The outputs of a node on arrays, floats in float64."""
    operator = float64.OPERATORS.get(("", node.op))
    with np.errstate(all="ignore"):
        if operator is None:
            return _reference(node, given)
        return operator(call_of(node, given))


def _reference(node: Node, given: Sequence[Values | None]) -> Sequence[Any]:
    from onnx.reference import ReferenceEvaluator  # slow to import, and rarely needed

    proto = node.proto_now()
    feeds = {v.name: a for v, a in zip(node.inputs, given, strict=True) if a is not None}
    results = ReferenceEvaluator(proto, opsets=dict(node.scope.opsets)).run(None, feeds)
    by_name = dict(zip([n for n in proto.output if n], results, strict=False))
    return [by_name.get(v.name) for v in node.outputs]


def _narrowed(wide: Values, dtype: np.dtype[Any], node: Node) -> Array:
    """Values rounded once to a type.

    Raises:
        Unknown: One that is finite is beyond the type's range.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        narrow: Array = wide.astype(dtype)
    if wide.dtype.kind == "f" and dtype != wide.dtype:
        finite = np.isfinite(narrow.astype(np.float32) if dtype.itemsize < 4 else narrow)
        if not bool((finite | ~np.isfinite(wide)).all()):
            raise Unknown(f"what {node.op} gives is beyond the range of {dtype}", node)
    return narrow


def most_elements(node: Node, given: Sequence[Values | None]) -> int:
    """Elements of the result of an operator, at most."""
    arrays = [a for a in given if a is not None]
    largest = max((int(a.size) for a in arrays), default=0)
    try:
        grows = _GROWS.get(node.op)
        if grows is not None:
            return int(grows(node, arrays))
        return max(largest, math.prod(np.broadcast_shapes(*(a.shape for a in arrays))))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return largest


def _by_equation(node: Node, arrays: Sequence[Values]) -> int:
    equation = node.attrs["equation"].decode().replace(" ", "")
    terms, _, result = equation.partition("->")
    sizes: dict[str, int] = {}
    for term, array in zip(terms.split(","), arrays, strict=True):
        sizes.update(zip(term, array.shape, strict=True))
    return math.prod(sizes[letter] for letter in result or sizes)


def _product(a: Values, b: Values) -> int:
    batch = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
    return batch * (a.shape[-2] if a.ndim > 1 else 1) * (b.shape[-1] if b.ndim > 1 else 1)


_GROWS: Final[dict[str, Callable[[Node, Sequence[Values]], float]]] = {
    "ConstantOfShape": lambda _, a: math.prod(map(int, a[0].reshape(-1))),
    "Einsum": _by_equation,
    "Expand": lambda _, a: math.prod(np.broadcast_shapes(a[0].shape, tuple(map(int, a[1])))),
    "Gather": lambda n, a: a[0].size // a[0].shape[n.attrs.get("axis", 0)] * a[1].size,
    "GatherElements": lambda _, a: a[1].size,
    "GatherND": lambda _, a: a[0].size * math.prod(a[1].shape[:-1]),
    "Gemm": lambda _, a: max(a[0].shape) * max(a[1].shape),
    "MatMul": lambda _, a: _product(a[0], a[1]),
    "OneHot": lambda _, a: a[0].size * int(a[1].reshape(-1)[0]),
    "Pad": lambda _, a: math.prod(n + int(abs(a[1]).sum()) for n in a[0].shape),
    "Range": lambda _, a: math.ceil(float(a[1] - a[0]) / float(a[2])),
    "Tile": lambda _, a: a[0].size * math.prod(map(int, a[1])),
}


def _numbers(entries: Entries | None) -> NDArray[np.int64] | None:
    if entries is None or not all(isinstance(n, int) for n in entries.reshape(-1)):
        return None
    return np.asarray(entries.tolist(), dtype=np.int64).reshape(entries.shape)


def _named(values: Sequence[AnyValue]) -> list[AnyValue]:
    return [v for v in values if v.name]


def _needed_by(node: Node) -> list[Node]:
    """The nodes that make what a node reads, in its scope or around it."""
    return [p for v in node.inputs for p in v.inputs]
