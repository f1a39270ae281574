"""What a canonical norm computes, in float64 numpy, and the proof that a recognised one does.

    confirm:  | nodes(x) - canonical(x) | <= tolerance      on random x

The x have distinct prime sizes where dims are not known, several scales, and one a mean that is
thirty times its deviation. The nodes are evaluated in float64, so what is left between them and
the canonical form is how the graph rounds its constants: the tolerance follows from that. Where
E[x^2] - E[x]^2 is computed with a rounded 1/n, the error grows with the square of the mean.
"""

from __future__ import annotations

import ast
import itertools
import math
import operator
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from onnxnorm import float64
from onnxnorm.errors import VerificationError
from onnxnorm.facts import AnyValue, Facts, call_of
from onnxnorm.layout import Dim
from onnxnorm.module import Node
from onnxnorm.norms import Norm
from onnxnorm.sizes import factors, find_sizes

Array = NDArray[np.float64]

_PRIMES: Final = (3, 5, 7, 11, 13, 17, 19, 23)
_LARGEST: Final = 1 << 21  # elements of a test input; a larger norm is tested on fewer inputs
_UNIT: Final[dict[int, float]] = {  # half a unit in the last place of the constants of a graph
    onnx.TensorProto.DOUBLE: 2.0**-24,  # exporters write float32 decimals into float64 models
    onnx.TensorProto.FLOAT: 2.0**-24,
    onnx.TensorProto.FLOAT16: 2.0**-11,
    onnx.TensorProto.BFLOAT16: 2.0**-8,
}


def canonical(norm: Norm, x: Array) -> Array:
    """The norm of x, as its kind defines it.

    Raises:
        NotImplementedError: The kind is not one of those that are raised from primitives, or its
            factors are not constant.
    """
    axes = norm.axes or ()
    axes = tuple(a % x.ndim for a in axes)
    if norm.kind in ("softmax", "log_softmax"):
        shifted = x - x.max(axis=axes, keepdims=True)
        total = np.exp(shifted).sum(axis=axes, keepdims=True)
        soft = np.exp(shifted) / total if norm.kind == "softmax" else shifted - np.log(total)
        return np.asarray(soft)
    if norm.kind in ("layer_norm", "instance_norm", "group_norm"):
        y = _standardized(norm, x, axes)
    elif norm.kind in ("rms_norm", "filter_response_norm"):
        y = x / np.sqrt((x * x).mean(axis=axes, keepdims=True) + (norm.epsilon or 0.0))
    elif norm.kind == "l2_norm":
        y = x / _length(norm, (x * x).sum(axis=axes, keepdims=True))
    else:
        raise NotImplementedError(norm.kind)
    for factor, apply in ((norm.gamma, np.multiply), (norm.beta, np.add)):
        if factor is not None:
            if not isinstance(factor, np.ndarray):
                raise NotImplementedError("its factors are computed at run time")
            y = apply(y, factor)
    return np.asarray(y)


def _standardized(norm: Norm, x: Array, axes: tuple[int, ...]) -> Array:
    shape = x.shape
    if norm.groups:
        x = np.moveaxis(x, norm.channel, 1)
        moved = x.shape
        x = x.reshape(shape[0], norm.groups, -1)
        axes = (2,)
    mean = x.mean(axis=axes, keepdims=True)
    variance = np.square(x - mean).mean(axis=axes, keepdims=True)
    y = (x - mean) / np.sqrt(variance + (norm.epsilon or 0.0))
    return np.moveaxis(y.reshape(moved), 1, norm.channel) if norm.groups else np.asarray(y)


def _length(norm: Norm, squares: Array) -> Array:
    """|x| with epsilon as the norm's rule has it."""
    epsilon = norm.epsilon or 0.0
    rules: dict[str, Callable[[Array], Any]] = {
        "inside": lambda s: np.sqrt(s + epsilon),
        "outside": lambda s: np.sqrt(s) + epsilon,
        "maximum": lambda s: np.maximum(np.sqrt(s), epsilon),
        "clamped": lambda s: np.sqrt(np.maximum(s, epsilon)),
    }
    return np.asarray(rules[norm.rule](squares))


def confirm(norm: Norm, facts: Facts, *, seed: int = 0) -> str | None:
    """Run a norm's nodes against its canonical form; None when they agree.

    Args:
        norm: A recognised norm that several nodes compute.
        facts: The facts under which it was found.
        seed: Of the random inputs.

    Returns:
        Why it could not be tried, where it could not.

    Raises:
        VerificationError: They disagree: a defect of the recogniser. The nodes and the input are
            left in a folder that the message names.
    """
    if norm.kind == "filter_response_norm" and norm.node.op == "Max":
        return "the threshold behind it has no canonical form"
    untried = _tried(norm, _Run(norm, facts, alike=False), seed)
    if untried is not None:
        # Names that shape inference gives twice to one dim: there distinct sizes do not fit.
        untried = _tried(norm, _Run(norm, facts, alike=True), seed)
    return untried


def _tried(norm: Norm, run: _Run, seed: int) -> str | None:
    epsilon = norm.epsilon or 1e-5
    scales: tuple[tuple[float, float], ...] = (
        (1.0, 0.0),
        (math.sqrt(epsilon), 0.0),
        (30.0, 3.0),
        (1.0, 30.0),
    )
    if norm.kind in ("softmax", "log_softmax"):
        scales = ((1.0, 0.0), (10.0, 3.0))
    try:
        shape = run.shape()
    except _NotTried as reason:
        return str(reason)
    if math.prod(shape) > _LARGEST:
        scales = scales[1:3]
    drawn = _uniform(shape, seed)
    for deviation, mean in scales:
        precision = 16 * run.unit * (1 + mean * mean)
        if precision > 1:
            continue  # constants of a narrow type say nothing about such a mean
        x = drawn * deviation + mean * deviation
        try:
            with np.errstate(all="ignore"):
                given, wanted = run.result(x), canonical(norm, x)
        except (_NotTried, NotImplementedError) as reason:
            return str(reason)
        largest = float(np.abs(wanted).max(initial=0.0))
        tolerance = precision * max(largest, 1e-30)
        differs = given.shape != wanted.shape
        if differs or not np.abs(given - wanted).max(initial=0.0) <= tolerance:
            folder = _reproducer(norm, x)
            raise VerificationError(
                f"the nodes that compute '{norm.output.name}' do not agree with the"
                f" {norm.kind} they were taken for",
                f"This is a defect of onnxnorm; please report it with the files in {folder}.",
            )
    return None


def _uniform(shape: tuple[int, ...], seed: int) -> Array:
    """Independent numbers of mean 0 and deviation 1, uniform over [-sqrt(3), sqrt(3)).

    Of the standard library's generator: nothing else here needs numpy.random, which with the hashes
    that it brings takes 6 MB.
    """
    drawn = random.Random(seed).randbytes(4 * math.prod(shape))
    words = np.frombuffer(drawn, np.uint32).reshape(shape)
    return np.asarray(words * (math.sqrt(12) * 2.0**-32) - math.sqrt(3))


class _NotTried(Exception):
    """Why a norm cannot be evaluated here."""


class _Run:
    """Evaluates the nodes of a norm in float64.

    Args:
        norm: The norm.
        facts: The facts under which it was found.
        alike: Give all dims that are not known one size.
    """

    def __init__(self, norm: Norm, facts: Facts, *, alike: bool) -> None:
        self._norm = norm
        self._facts = facts
        self._sizes: dict[str, int] = {}
        self._primes: Iterator[int] = itertools.repeat(_PRIMES[0]) if alike else iter(_PRIMES)
        self._base = norm.input
        known = facts.type(norm.input)
        self.unit = _UNIT.get(known.element if known is not None else 0, 2.0**-24)
        for node in norm.nodes:
            for value in node.inputs:
                constant = facts.constant(value) if value.name else None
                if constant is not None and constant.dtype.kind not in "iub":
                    element = onnx.helper.np_dtype_to_tensor_dtype(constant.dtype)
                    self.unit = max(self.unit, _UNIT.get(element, 0.0))

    def shape(self) -> tuple[int, ...]:
        """Sizes for the input: what is known of them, and distinct primes."""
        dims = self._norm.dims
        if dims is None:
            return self._assumed()
        fixed = self._fixed(len(dims))
        self._fit(dims)
        total = math.prod(d for d in dims if isinstance(d, int))
        shape = []
        for axis, dim in enumerate(dims):
            if isinstance(dim, int):
                # Where nothing fixes a large dim, a small one shows as much.
                small = total > _LARGEST >> 4 and axis not in fixed and dim > _PRIMES[0]
                shape.append(next(self._primes, 2) if small else dim)
            else:
                shape.append(self._size(dim))
        if math.prod(shape) > _LARGEST << 3:
            raise _NotTried(f"its input of shape {shape} is too large to try")
        return tuple(shape)

    def _fit(self, shape: tuple[Dim, ...]) -> None:
        """Give dims that are not known the sizes that the factors have there."""
        for factor in (self._norm.gamma, self._norm.beta):
            if isinstance(factor, np.ndarray):
                for place, size in enumerate(factor.shape[::-1][: len(shape)]):
                    axis = len(shape) - 1 - place
                    dim = shape[axis]
                    if size > 1 and not isinstance(dim, int):
                        self._sizes[dim] = size

    def _fixed(self, rank: int) -> set[int]:
        """The axes whose sizes the nodes depend on."""
        norm = self._norm
        if any(n.op in ("Expand", "Reshape") for n in norm.nodes) or norm.groups:
            return set(range(rank))
        fixed = {a % rank for a in norm.axes or ()}
        for factor in (norm.gamma, norm.beta):
            if isinstance(factor, np.ndarray):
                fixed |= {rank - factor.ndim + a for a, n in enumerate(factor.shape) if n > 1}
        return fixed

    def _assumed(self) -> tuple[int, ...]:
        """A shape for an input of unknown rank: one that its axes and factors fit."""
        axes = self._norm.axes or (-1,)
        rank = max(3, *(a + 1 if a >= 0 else -a for a in axes))
        shape = [next(self._primes, 2) for _ in range(rank)]
        for factor in (self._norm.gamma, self._norm.beta):
            if isinstance(factor, np.ndarray):
                for place, size in enumerate(factor.shape[::-1]):
                    if size > 1 and place < rank:
                        shape[rank - 1 - place] = size
        return tuple(shape)

    def _size(self, dim: str) -> int:
        number, names = factors([dim])
        if dim not in self._sizes and names != [dim]:
            return number * math.prod(map(self._size, names))
        if dim not in self._sizes and not dim.isidentifier():
            try:
                return _evaluated(ast.parse(dim, mode="eval").body, self._size)
            except (SyntaxError, ValueError):
                pass  # a name like any other
        if dim not in self._sizes:
            self._sizes[dim] = next(self._primes, 2)
        return self._sizes[dim]

    def result(self, x: Array) -> Array:
        """What the nodes make of x."""
        values: dict[AnyValue, Any] = {self._base: x}
        pending: list[AnyValue] = [self._norm.output]
        while pending:
            value = pending[-1]
            if value in values:
                pending.pop()
                continue
            constant = self._facts.constant(value) if value.name else None
            if not value.name or constant is not None:
                values[value] = None if constant is None else float64.widen(constant.array())
                continue
            node = self._facts.producer(value)
            if node is not None and node.op == "Shape" and self._is_outside(node.inputs[0]):
                values[value] = self._shape_of(node)
                continue
            if node is None:
                raise _NotTried(f"it depends on '{value.name}', which is not known here")
            missing = [v for v in node.inputs if v not in values]
            if missing:
                pending += missing
                continue
            values.update(zip(node.outputs, self._computed(node, values), strict=False))
        return np.asarray(values[self._norm.output], dtype=np.float64)

    def _is_outside(self, value: AnyValue) -> bool:
        """Whether a value does not depend on the input, as far as the nodes of the norm go."""
        return value is not self._base and self._facts.producer(value) not in self._norm.nodes

    def _shape_of(self, node: Node) -> Any:
        value = node.inputs[0]
        dims = find_sizes(self._facts).of(value)
        if dims is None or node.parameter("start", "end"):
            raise _NotTried(f"the shape of '{value.name}' is not known")
        dims = dims[node.attrs.get("start", 0) : node.attrs.get("end")]
        return np.asarray([d if isinstance(d, int) else self._size(d) for d in dims])

    def _computed(self, node: Node, values: Mapping[AnyValue, Any]) -> Sequence[Any]:
        implementation = float64.OPERATORS.get((node.domain or "", node.op))
        if implementation is None:
            raise _NotTried(f"{node.op} cannot be evaluated here")
        call = call_of(node, [values[v] for v in node.inputs])
        try:
            return implementation(call)
        except Exception as error:  # numpy raises what it likes on sizes that do not fit
            raise _NotTried(
                f"{node.op} '{node.label}' cannot be evaluated here: {error}"
            ) from error


_OPERATIONS: Final[dict[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def _evaluated(tree: ast.expr, size: Callable[[str], int]) -> int:
    """The value of a dim that an exporter wrote as an expression of others, as `16*batch`."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, int):
        return tree.value
    if isinstance(tree, ast.Name):
        return size(tree.id)
    if isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATIONS:
        left, right = (_evaluated(side, size) for side in (tree.left, tree.right))
        return _OPERATIONS[type(tree.op)](left, right)
    raise ValueError(ast.unparse(tree))


def _reproducer(norm: Norm, x: Array) -> Path:
    """The nodes as a model, and the input, in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="onnxnorm-reproducer-"))
    graph = onnx.helper.make_graph([n.proto_now() for n in norm.nodes], norm.kind, [], [])
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in norm.node.scope.opsets.items()]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), folder / "nodes.onnx")
    np.save(folder / "input.npy", x)
    return folder
