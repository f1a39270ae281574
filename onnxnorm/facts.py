"""What is true of a graph: users, producers, constants, shapes.

Facts are computed when asked for and hold until the graph changes; the pipeline makes new ones
after every round of commits.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnxnorm import float64
from onnxnorm.module import RANDOM, Module, Node, Scope, Value, Weight, dense, reads
from onnxnorm.ops import bodies
from onnxnorm.order import in_order
from onnxnorm.storage import Array, Stored, payload_size

AnyValue: TypeAlias = Value | Weight
_CONSTANT_LISTS: Final[dict[str, Any]] = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_string": np.object_,
    "value_strings": np.object_,
}
# Operators that move, repeat or relabel what they are given, without arithmetic, so that the
# result does not depend on who computes it. Exporters write biases and statistics with them.
_MOVES: Final = frozenset(
    {
        "Cast",
        "CastLike",
        "Concat",
        "ConstantOfShape",
        "Expand",
        "Flatten",
        "Gather",
        "Reshape",
        "Shape",
        "Slice",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
_FORWARDS: Final = _MOVES | {"Identity"}
_RUNTIME_GELUS: Final = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})
_RUNTIME_SAME: Final = _RUNTIME_GELUS | {
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
}
_RUNTIME_FUSED: Final = {"FusedConv": "Conv", "FusedGemm": "Gemm", "FusedMatMul": "MatMul"}
_RUNTIME_QUANTIZED: Final = frozenset({"DequantizeLinear", "MatMulNBits", "QuantizeLinear"})
_RANKS: Final = "onnxnorm.ranks"  # the domain of a function that only a copy for inference has
# What of the facts holds whatever types shape inference gives.
_TYPELESS: Final = (
    "_uses", "_outputs", "positions", "_ordered", "_by_operator", "_shown", "_untyped",
)  # fmt: skip
_GROUPED: Final = 12  # nodes between taking a tensor into groups and back
_MOVED_LIMIT: Final = 256 << 20  # bytes; a larger result is not worth holding
_SMALL: Final = 4 << 10  # bytes; what is not larger is read once for all
_HELD_LIMIT: Final = 64 << 10  # bytes; a larger result is computed again rather than held


@dataclass(frozen=True)
class Use:
    """One place where a value is read: input `index` of `node`."""

    node: Node
    index: int


@dataclass(frozen=True)
class Type:
    """What shape inference knows: an element type, and dims that are int, symbol or unknown."""

    element: int
    shape: tuple[int | str | None, ...] | None

    @cached_property
    def is_static(self) -> bool:
        """Whether all dims are numbers."""
        return self.shape is not None and all(isinstance(dim, int) for dim in self.shape)


class _Computed:
    """A large result of a node on constants: it goes with the last array on it."""

    def __init__(self, array: Array, compute: Callable[[], Array | None]) -> None:
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self._compute = compute
        self._held = weakref.ref(array)

    def array(self) -> Array:
        array = self._held()
        if array is None:
            array = self._compute()
            assert array is not None, "it could be computed before"
            self._held = weakref.ref(array)
        return array


class Constant:
    """A value known before the model runs; its array is read when asked for.

    Attributes:
        name: The value's name.
        shape: Its dims.
        source: The initializer or node output at the end of the chain of Identity nodes.
    """

    def __init__(self, name: str, source: AnyValue, content: Any, stored: Stored) -> None:
        self.name = name
        self.source = source
        self._content = content  # TensorProto, ndarray, or _Computed
        self._stored = stored
        is_proto = isinstance(content, onnx.TensorProto)
        self.shape: tuple[int, ...] = tuple(content.dims) if is_proto else tuple(content.shape)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """The element type, as numpy or ml_dtypes has it."""
        dtype: np.dtype[Any]
        if isinstance(self._content, onnx.TensorProto):
            dtype = onnx.helper.tensor_dtype_to_np_dtype(self._content.data_type)
        else:
            dtype = self._content.dtype
        return dtype

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        if not isinstance(self._content, onnx.TensorProto):
            return int(self._content.nbytes)
        if self._content.data_type == onnx.TensorProto.STRING:
            return sum(map(len, self._content.string_data))
        return payload_size(self._content)

    def array(self) -> Array:
        """The values; read-only, memory-mapped where the tensor is large."""
        return self._small if self.nbytes <= _SMALL else self._read()

    def float64(self) -> NDArray[np.float64]:
        """The values in double precision, each one exactly; read-only."""
        return self._small_float64 if self.nbytes <= _SMALL else self._read_float64()

    @cached_property
    def integers(self) -> NDArray[np.object_]:
        """The values of a tensor of integers, as Python has them."""
        return np.asarray(self.array()).astype(np.int64).astype(object)

    # Every analysis asks for scalars, axes and shapes again, so those are read once.

    @cached_property
    def _small(self) -> Array:
        array = self._read()
        array.setflags(write=False)  # all callers share it
        return array

    @cached_property
    def _small_float64(self) -> NDArray[np.float64]:
        array = self._read_float64()
        array.setflags(write=False)
        return array

    def _read(self) -> Array:
        if isinstance(self._content, onnx.TensorProto):
            return self._stored.array(self._content)
        array: Array = (
            self._content.array() if isinstance(self._content, _Computed) else self._content
        )
        return array

    def _read_float64(self) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
            return np.asarray(self.array(), dtype=np.float64)

    def renamed(self, name: str) -> Constant:
        """The same constant under the name of an Identity of it."""
        return Constant(name, self.source, self._content, self._stored)


class Facts:
    """Analyses of a module as it is now.

    Args:
        module: The module; it must not change while these facts are in use.
        stated: Whether to believe the shapes that the file itself states of inner values. A
            tool that made an input dynamic may have left those of the fixed size behind.
        before: Facts of the module before it changed: what they know of stored tensors still holds.
    """

    def __init__(self, module: Module, *, stated: bool = True, before: Facts | None = None) -> None:
        self.module = module
        # A Weight and a Constant node never change: an edit puts others in their places.
        self._stored: dict[Weight | Node, Constant] = {} if before is None else before._stored
        self._stated = stated
        self.kept: dict[str, Any] = {}  # what analyses beyond this class found, by their name

    @property
    def unstated(self) -> Facts:
        """The same facts, but that the shapes which the file states of inner values are not used.

        All that depends on no type is shared; these facts themselves where a file states nothing.
        """
        return self._unstated or self

    @cached_property
    def _unstated(self) -> Facts | None:
        if not _states(self._shown.graph):
            return None  # and not these facts, which a cycle would keep alive
        other = Facts(self.module, stated=False, before=self)
        for name in _TYPELESS:
            other.__dict__[name] = getattr(self, name)
        return other

    # ** users and producers **

    def uses(self, value: AnyValue) -> list[Use]:
        """Every place that reads a value, in its scope and in the bodies inside it."""
        known = self._uses.get(value)
        if known is None:
            readers = dict.fromkeys(value.outputs)
            known = [Use(n, i) for n in readers for i, v in enumerate(n.inputs) if v is value]
            self._uses[value] = known
        return known

    @cached_property
    def _uses(self) -> dict[AnyValue, list[Use]]:
        return {}

    def producer(self, value: AnyValue) -> Node | None:
        """The node that computes a value; None for inputs and initializers."""
        node: Node | None = value.inputs[0] if value.inputs else None
        return node

    @cached_property
    def _outputs(self) -> dict[AnyValue, Scope]:
        return {v: scope for scope in self.module.scopes for v in scope.outputs}

    def output_of(self, value: AnyValue) -> Scope | None:
        """The scope whose output a value is, if any: such a value must keep its name."""
        return self._outputs.get(value)

    def pinned(self, value: AnyValue) -> str | None:
        """What a value is that makes it keep its name whoever reads it; None where nothing does.

        An output of a scope, or what quantization annotations or the training information name.
        """
        scope = self.output_of(value)
        if scope is not None:
            return f"an output of {scope.path}" if scope.path else "a graph output"
        if value.scope is not None and value.name in value.scope.mentioned:
            return "named by quantization annotations or training information"
        return None

    def unread(self, value: AnyValue) -> str:
        """Why no node reads a value, as a clause; "" where one does."""
        if self.uses(value):
            return ""
        pinned = self.pinned(value)
        return "nothing reads it" if pinned is None else f"'{value.name}' is {pinned}"

    @cached_property
    def positions(self) -> dict[Node, int]:
        """The place of each node in its scope; what reads a value comes behind what makes it."""
        return {n: at for scope in self.module.scopes for at, n in enumerate(scope.nodes)}

    def alone(self, value: AnyValue) -> bool:
        """Whether a value has one reader, and nothing else needs it."""
        return len(self.uses(value)) == 1 and self.pinned(value) is None

    def in_order(self, scope: Scope) -> Sequence[Node]:
        """The nodes of a scope, each after those that it or a body of it reads from."""
        known = self._ordered.get(scope.path)
        if known is None:
            needs = partial(_needed_by, scope)
            known = self._ordered[scope.path] = list(in_order(scope.nodes, needs))
        return known

    @cached_property
    def _ordered(self) -> dict[str, Sequence[Node]]:
        return {}

    # ** constants **

    def readers(self, constant: Constant) -> int:
        """How many places read the tensor behind a constant, by itself or through Identity."""
        total = self._readers.get(constant.source)
        if total is not None:
            return total
        total, frontier = 0, [constant.source]
        while frontier:
            value = frontier.pop()
            total += self.pinned(value) is not None
            for use in self.uses(value):
                if use.node.op == "Identity" and use.node.domain == "":
                    frontier += use.node.outputs
                else:
                    total += 1
        self._readers[constant.source] = total
        return total

    @cached_property
    def _readers(self) -> dict[AnyValue, int]:
        return {}

    def constant(self, value: AnyValue) -> Constant | None:
        """A value as a constant, in every spelling; None for one that is not.

        An initializer, a Constant node with any of its attributes, what the operators of
        `_MOVES` make of constants, and an Identity of any of these. An initializer that is also
        a graph input (IR version 4 and later) is not constant: the caller may replace it.
        Neither is a Constant whose value is a function's parameter.
        """
        known = self._constants
        if value in known:
            return known[value]
        node = self.producer(value)
        if node is None or node.op not in _FORWARDS:  # it depends on no other value
            known[value] = self._find_constant(value)
            return known[value]
        pending = [value]  # not by recursion: a chain can be as long as the graph
        while pending:
            at = pending[-1]
            missing = next((v for v in self._needed(at) if v not in known), None)
            if missing is not None:
                pending.append(missing)
                continue
            pending.pop()
            if at not in known:
                known[at] = self._find_constant(at)
        return known[value]

    @cached_property
    def _constants(self) -> dict[AnyValue, Constant | None]:
        return {}

    def fixed(self, value: AnyValue) -> bool:
        """Whether a value of the main graph is the same in every run: computed of constants alone.

        A part that is run by itself computes it too; other numbers in its place would be no proof.
        """
        return not value.name or self.constant(value) is not None or value in self._fixed

    @cached_property
    def _fixed(self) -> set[AnyValue]:
        found: set[AnyValue] = set()
        for node in self.in_order(self.module.main):
            named = [v for v in node.inputs if v.name]
            if not named or node.bodies or node.op in RANDOM:
                continue
            if all(v in found or self.constant(v) is not None for v in named):
                found.update(node.outputs)
        return found

    def _needed(self, value: AnyValue) -> Iterator[AnyValue]:
        """What must be known before a value: inputs, up to the first that is not constant."""
        node = self.producer(value)
        if node is None or node.domain != "" or node.op not in _FORWARDS:
            return
        for given in node.inputs[:1] if node.op == "CastLike" else node.inputs:
            if given.name:
                yield given
                if self._constants.get(given) is None:
                    return

    def _find_constant(self, value: AnyValue) -> Constant | None:
        """A value as a constant, when all that it needs is known."""
        stored = self.module.stored
        if isinstance(value, Weight):
            if value in self._stored:
                return self._stored[value]
            sparse = isinstance(value.proto, onnx.SparseTensorProto)
            content: Any = value.values if sparse else value.proto
            if not sparse and value.proto.HasField("segment"):
                return None  # a part of a tensor, which no runtime reads
            self._stored[value] = Constant(value.name, value, content, stored)
            return self._stored[value]
        node = self.producer(value)
        if node is None or node.domain != "":
            return None
        if node.op == "Identity" and len(node.inputs) == 1:
            of = self._constants.get(node.inputs[0])
            return None if of is None else of.renamed(value.name)
        if node in self._stored:
            return self._stored[node]
        content = self._constant_node(node) if node.op == "Constant" else self._moved(node)
        if content is None:
            return None
        found = Constant(value.name, value, content, stored)
        if node.op == "Constant":
            self._stored[node] = found
        return found

    def _moved(self, node: Node) -> Array | _Computed | None:
        """The result of an operator that only moves or repeats constants, computed now."""
        if node.op not in _MOVES or not node.inputs or len(node.outputs) != 1:
            return None
        if node.parametric:
            return None
        inputs = list(node.inputs)
        if node.op == "Shape":
            # The shape of a constant is known without its values.
            of = self.constant(inputs[0])
            start, end = node.attrs.get("start", 0), node.attrs.get("end")
            return None if of is None else np.asarray(of.shape[start:end], dtype=np.int64)
        like = None
        if node.op == "CastLike" and len(inputs) == 2:
            # Only the type of the second input counts, and that may be known of any value.
            like = self.type(inputs.pop())
            if like is None or not like.element:
                return None
        given: list[Constant | None] = []
        for value in inputs:
            constant = self.constant(value) if value.name else None
            if value.name and constant is None:
                return None
            if constant is not None and constant.nbytes > _MOVED_LIMIT:
                return None
            given.append(constant)
        to = None if like is None else like.element

        def compute() -> Array | None:
            return _run(node, [None if c is None else c.array() for c in given], to)

        try:
            with warnings.catch_warnings():
                # A cast that overflows gives what the processor likes.
                warnings.simplefilter("error", RuntimeWarning)
                if _size(node, [c.array() for c in given if c is not None]) > _MOVED_LIMIT:
                    return None
                array = compute()
        except Exception:  # what the reference cannot do stays in the graph
            return None
        if array is None or array.nbytes <= _HELD_LIMIT:
            return array
        return _Computed(array, compute)

    def _constant_node(self, node: Node) -> Any:
        for attribute in node.proto.attribute:
            if attribute.ref_attr_name:
                return None
            if attribute.name == "value":
                return None if attribute.t.HasField("segment") else attribute.t
            if attribute.name == "sparse_value":
                return dense(attribute.sparse_tensor)
            if attribute.name in _CONSTANT_LISTS:
                dtype = _CONSTANT_LISTS[attribute.name]
                content = onnx.helper.get_attribute_value(attribute)
                if attribute.name == "value_string":
                    content = content.decode(errors="surrogateescape")
                elif attribute.name == "value_strings":
                    content = [text.decode(errors="surrogateescape") for text in content]
                return np.asarray(content, dtype=dtype)
        return None

    def why_not_constant(self, value: AnyValue) -> str:
        """The end of the sentence "'w' is not constant: ..."."""
        node = self.producer(value)
        while node is not None and node.op == "Identity" and node.domain == "" and node.inputs:
            value = node.inputs[0]
            node = self.producer(value)
        if node is not None:
            if node.parametric:
                return f"node '{node.label}' ({node.op}) takes it from a parameter of the function"
            return f"node '{node.label}' ({node.op}) computes it"
        if isinstance(value, Weight):
            return "its tensor is only a segment of one"
        if value.default is not None:
            return "it is an initializer that callers may override, being a graph input too"
        scope = value.scope
        if scope is not None and scope.is_function:
            return "it is a parameter of the function"
        if scope is not None and scope.owner is not None:
            return f"it is an input of the body {scope.path}"
        return "it is a graph input"

    # ** types **

    def type(self, value: AnyValue) -> Type | None:
        """What shape inference says of a value; None where it says nothing.

        Shapes are inferred on a copy without weights. A value of a function has what all calls of
        the function have in common.
        """
        if isinstance(value, Weight):
            proto = value.proto
            element = (
                proto.data_type if isinstance(proto, onnx.TensorProto) else proto.values.data_type
            )
            return Type(element, tuple(proto.dims))
        return self.types.get((value.scope.path if value.scope else "", value.name))

    @cached_property
    def types(self) -> dict[tuple[str, str], Type]:
        """Inferred types by (scope path, value name), for the main graph and all bodies."""
        model = self._shown
        if not self._stated:
            model = onnx.ModelProto()
            model.CopyFrom(self._shown)
            _unstate(model.graph)
        # Inference that fails leaves the types that the file itself states; the C++ side raises
        # several unrelated types.
        with suppress(Exception):
            model = onnx.shape_inference.infer_shapes(model)
        found: dict[tuple[str, str], Type] = {}
        self._collect(model.graph, self.module.main, found)
        functions = {(f.domain, f.name, f.overload): f for f in model.functions}
        for scope in self._called():
            function = functions[_name(scope)]
            graph = onnx.GraphProto(name=function.name, node=function.node)
            for index, value in enumerate(scope.inputs):
                known = self._common(scope, index, found)
                if known is not None and known.element:
                    graph.input.append(
                        onnx.helper.make_tensor_value_info(value.name, known.element, known.shape)
                    )
            imports = [onnx.helper.make_opsetid(d, v) for d, v in scope.opsets.items()]
            _show_constants(graph, scope, self._untyped)
            called = onnx.helper.make_model(graph, opset_imports=imports)
            called.functions.extend(f for f in model.functions if f.domain != _RANKS)
            with suppress(Exception):
                called = onnx.shape_inference.infer_shapes(called)
            self._collect(called.graph, scope, found)
        return found

    @cached_property
    def _shown(self) -> onnx.ModelProto:
        """The model without its weights, as shape inference understands it best."""
        model = self.module.small()
        _show_constants(model.graph, self.module.main, self._untyped)
        _restore_shapes(model.graph)
        _show_runtime_operators(model.graph, self.module.main.opsets.get("", 1))
        _show_own_operators(model.graph)
        _show_ranks(model)
        return model

    @cached_property
    def _untyped(self) -> Facts:
        """What holds before any type is known: what is constant may depend on types."""
        untyped = Facts(self.module, before=self)
        untyped.__dict__["types"] = {}
        if not any(node.op == "CastLike" for node in self.module.nodes()):
            # Nothing else asks for a type: what is constant then is so with types as well.
            untyped.__dict__["_constants"] = self._constants
        return untyped

    def _called(self) -> Iterator[Scope]:
        """The functions of the model, each after all that call it."""
        waiting = [s for s in self.module.scopes if isinstance(s.proto, onnx.FunctionProto)]
        while waiting:
            ready = [
                scope
                for scope in waiting
                if not any(call.scope.outermost in waiting for call in self._calls(scope))
            ]
            if not ready:
                return  # functions that call each other: what the runtime does not load
            for scope in ready:
                waiting.remove(scope)
                yield scope

    def _calls(self, scope: Scope) -> list[Node]:
        return self._by_operator.get(_name(scope), [])

    def _common(
        self, scope: Scope, index: int, found: Mapping[tuple[str, str], Type]
    ) -> Type | None:
        """What the types of one input have in common over all calls of a function."""
        common: Type | None = None
        for call in self._calls(scope):
            value = call.inputs[index] if index < len(call.inputs) else None
            if value is None or not value.name:
                return None
            if isinstance(value, Weight):
                known = self.type(value)
            else:
                known = found.get((value.scope.path if value.scope else "", value.name))
            if known is None or (common is not None and known.element != common.element):
                return None
            common = known if common is None else Type(known.element, _meet(known, common))
        return common

    @cached_property
    def _by_operator(self) -> dict[tuple[str, str, str], list[Node]]:
        known: dict[tuple[str, str, str], list[Node]] = {}
        for node in self.module.nodes():
            if node.domain:
                known.setdefault((node.domain, node.op, node.proto.overload), []).append(node)
        return known

    def _collect(
        self, graph: onnx.GraphProto, scope: Scope, found: dict[tuple[str, str], Type]
    ) -> None:
        read: dict[bytes, Type] = {}  # most values have a type that others have too
        for info in [*graph.value_info, *graph.output, *graph.input]:
            if info.type.HasField("tensor_type"):
                message = info.type.SerializeToString()
                if message not in read:
                    read[message] = _type(info.type.tensor_type)
                found[scope.path, info.name] = read[message]
        for inner, body in _bodies(graph, scope):
            self._collect(inner, body, found)


def _needed_by(scope: Scope, node: Node) -> list[Node]:
    """The nodes of a scope that a node of it waits for."""
    return [p for value in reads(node) for p in value.inputs if p.scope is scope]


def _bodies(graph: onnx.GraphProto, scope: Scope) -> Iterator[tuple[onnx.GraphProto, Scope]]:
    """The bodies in a graph, with the scopes that they are."""
    nodes = [node for node in scope.nodes if node.bodies]
    if not nodes:
        return
    protos = [p for p in graph.node if any(a.HasField("g") or a.graphs for a in p.attribute)]
    for node, proto in zip(nodes, protos, strict=True):
        for name, index, body in node.bodies:
            for attribute in proto.attribute:
                if attribute.name == name:
                    yield attribute.g if index < 0 else attribute.graphs[index], body


def _states(graph: onnx.GraphProto, outer: frozenset[str] | None = None) -> bool:
    """Whether a graph states a shape that inference would use, of other values than its inputs.

    Args:
        graph: The graph.
        outer: Outputs with a shape of the graphs around it; None for the main graph.
    """
    shaped = {o.name for o in graph.output if o.type.tensor_type.HasField("shape")}
    if graph.value_info or (shaped and outer is not None):
        return True
    known = shaped | (outer or frozenset())
    for node in graph.node:
        if not known.isdisjoint(node.input):
            return True
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                if _states(inner, frozenset(known)):
                    return True
    return False


def _unstate(graph: onnx.GraphProto) -> None:
    """Take the shapes out of a graph that are stated of other values than its inputs."""
    del graph.value_info[:]
    for output in graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    for node in graph.node:
        for attribute in node.attribute:
            for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                _unstate(body)


def _show_constants(graph: onnx.GraphProto, scope: Scope, untyped: Facts) -> None:
    """Give shape inference the constants that it does not find itself: axes, pads, shapes."""
    for inner, body in _bodies(graph, scope):
        _show_constants(inner, body, untyped)
    stored = {t.name for t in graph.initializer}
    for node, proto in zip(scope.nodes, graph.node, strict=True):
        for index, value in enumerate(node.inputs[1:], 1):
            made = untyped.producer(value)
            if made is not None and made.op == "Constant" and made.scope is scope:
                continue
            if not value.name or value.name in stored:
                continue
            constant = untyped.constant(value)
            if constant is None or constant.dtype != np.int64 or len(constant.shape) > 1:
                continue
            if constant.nbytes <= _HELD_LIMIT:
                name = f"{value.name}/{node.label}/{index}"
                graph.initializer.append(numpy_helper.from_array(constant.array(), name))
                proto.input[index] = name


def _name(scope: Scope) -> tuple[str, str, str]:
    """Domain, name and overload of a function."""
    assert isinstance(scope.proto, onnx.FunctionProto), "it is a function"
    return scope.proto.domain, scope.proto.name, scope.proto.overload


def _meet(one: Type, other: Type) -> tuple[int | str | None, ...] | None:
    """The dims that two shapes share; None where even the rank differs."""
    if one.shape is None or other.shape is None or len(one.shape) != len(other.shape):
        return None
    return tuple(a if a == b else None for a, b in zip(one.shape, other.shape, strict=True))


def _restore_shapes(graph: onnx.GraphProto) -> None:
    """Tell shape inference what a Reshape to the shape of something gives.

        Reshape(f(Reshape(x, groups)), Shape(x))   ->   Identity(x)      in the copy for inference

    Before opset 14 inference gives up the rank there, and with it all that follows.
    """
    if not any(node.op_type == "Shape" for node in graph.node):
        return
    made = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        shape = (
            made.get(node.input[1]) if node.op_type == "Reshape" and len(node.input) > 1 else None
        )
        if shape is None or shape.op_type != "Shape" or shape.attribute:
            continue
        before = made.get(node.input[0])
        for _ in range(_GROUPED):
            if before is None or not before.input:
                break
            if before.op_type == "Reshape" and before.input[0] == shape.input[0]:
                node.op_type = "Identity"
                del node.input[:]
                node.input.append(shape.input[0])
                del node.attribute[:]
                break
            before = made.get(before.input[0])


def _show_ranks(model: onnx.ModelProto) -> None:
    """Let shape inference keep the rank behind a Reshape whose shape is computed.

    From opset 14 on it does. An older Reshape is called through a function that imports opset 14.
    """
    imports = {o.domain or "": o for o in model.opset_import}
    if "" not in imports or not 5 <= imports[""].version < 14 or model.ir_version < 4:
        return
    known = {t.name for t in model.graph.initializer}
    known |= {n.output[0] for n in model.graph.node if n.op_type == "Constant" and n.output}
    called = False
    for node in model.graph.node:
        if node.op_type == "Reshape" and len(node.input) == 2 and node.input[1] not in known:
            node.domain, called = _RANKS, True
    if called:
        body = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
        opset = onnx.helper.make_opsetid("", 14)
        model.functions.append(
            onnx.helper.make_function(_RANKS, "Reshape", ["x", "shape"], ["y"], [body], [opset])
        )
        model.opset_import.append(onnx.helper.make_opsetid(_RANKS, 1))
        model.ir_version = max(model.ir_version, 8)


def _show_runtime_operators(graph: onnx.GraphProto, opset: int) -> None:
    """Tell shape inference of onnxruntime's own operators, as its optimizer leaves them in a file.

    Norms and GELUs have the shape of their first input; what was fused with an activation, or has
    a quantized weight, has that of the operator itself.
    """
    older = {"LayerNormalization"} if opset < 17 else set()
    names = _RUNTIME_SAME | _RUNTIME_FUSED.keys() | _RUNTIME_QUANTIZED | older
    if not any(node.op_type in names for node in graph.node):
        return
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        runtime = node.domain == "com.microsoft"
        if node.op_type not in names or not (runtime or node.domain in ("", "ai.onnx")):
            nodes.append(node)
        elif node.op_type in _RUNTIME_FUSED:
            nodes.append(_unfused(node) if runtime else node)
        elif node.op_type in _RUNTIME_QUANTIZED:
            nodes += _quantized(node) if runtime else [node]
        elif node.op_type in _RUNTIME_GELUS and not runtime:
            nodes.append(node)
        else:
            places = (0, 3) if node.op_type.startswith("Skip") else (0,)
            nodes += [
                onnx.helper.make_node("Identity", node.input[:1], [node.output[place]])
                for place in places
                if place < len(node.output) and node.output[place]
            ]
    del graph.node[:]
    graph.node.extend(nodes)


def _quantized(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The standard operators whose result that of a quantized one has the shape of."""
    if node.op_type != "MatMulNBits":
        plain = onnx.NodeProto()
        plain.CopyFrom(node)
        plain.domain = ""
        return [plain]
    sizes = {a.name: a.i for a in node.attribute}
    shape, weight = f"{node.output[0]}/sizes", f"{node.output[0]}/weight"
    return [
        onnx.helper.make_node("Constant", [], [shape], value_ints=[sizes["K"], sizes["N"]]),
        onnx.helper.make_node("ConstantOfShape", [shape], [weight]),
        onnx.helper.make_node("MatMul", [node.input[0], weight], node.output[:1]),
    ]


def _unfused(node: onnx.NodeProto) -> onnx.NodeProto:
    """The standard operator whose result a fused one has the shape of; itself where none has."""
    plain = onnx.NodeProto()
    plain.CopyFrom(node)
    plain.domain, plain.op_type = "", _RUNTIME_FUSED[node.op_type]
    del plain.attribute[:]
    for attribute in node.attribute:
        if attribute.name.startswith("trans") and node.op_type == "FusedMatMul":
            if attribute.i:
                return node
        elif attribute.name != "alpha" and not attribute.name.startswith("activation"):
            plain.attribute.append(attribute)
    if node.op_type == "FusedConv":
        del plain.input[3:]
    return plain


def _show_own_operators(graph: onnx.GraphProto) -> None:
    """Tell shape inference that results of our operators have the shape of X, or of X + mask.

    Their bodies reshape to a computed shape, through which inference sees no more than a rank.
    """
    for node in graph.node:
        if node.domain == bodies.DOMAIN and node.op_type in bodies.OPERATORS:
            inputs = [node.input[0], *(node.input[2:3] if "Masked" in node.op_type else ())]
            shaped = onnx.helper.make_node("Sum", inputs, list(node.output[:1]))
            node.CopyFrom(shaped)


def _type(proto: onnx.TypeProto.Tensor) -> Type:
    if not proto.HasField("shape"):
        return Type(proto.elem_type, None)
    dims: list[int | str | None] = []
    for dim in proto.shape.dim:
        if dim.HasField("dim_value"):
            dims.append(dim.dim_value)
        else:
            dims.append(dim.dim_param or None)
    return Type(proto.elem_type, tuple(dims))


def call_of(node: Node, inputs: Sequence[Any]) -> float64.Call:
    """A node on given inputs, as the table of operators in float64 takes it."""
    attrs = {k: _attribute(v) for k, v in node.attrs.items()}
    domain = node.domain or ""
    present = tuple(bool(v.name) for v in node.outputs)
    return float64.Call(
        node.op, domain, node.scope.opsets.get(domain, 1), tuple(inputs), attrs, present
    )


def _attribute(value: Any) -> Any:
    """An attribute as the table has it: text, and a tensor whose values are here as an array."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto) and math.prod(value.dims) == 1:
        return numpy_helper.to_array(value)
    return value


def _run(node: Node, given: Sequence[Array | None], to: int | None) -> Array | None:
    """The one output of an operator that only moves; `to` is the type of a CastLike."""
    if node.op in ("Cast", "CastLike"):
        (data,) = given
        result = None if data is None else _cast(node, data, to)
    else:
        (result,) = float64.OPERATORS["", node.op](call_of(node, given))
    if node.op == "ConstantOfShape" and result is not None:
        value = _attribute(node.attrs.get("value"))
        result = result.astype(np.float32 if value is None else value.dtype)
    if result is None or result.nbytes > _MOVED_LIMIT:
        return None
    return np.asarray(result, order="C")


def _cast(node: Node, data: Array, to: int | None) -> Array | None:
    """A tensor in the type that a node, or `to`, gives it."""
    target = onnx.helper.tensor_dtype_to_np_dtype(int(node.attrs["to"]) if to is None else to)
    if data.dtype.kind in "iufb" and target.kind in "iufb":
        return data.astype(target)
    from onnx.reference import ReferenceEvaluator  # slow to import, and rarely needed

    proto = node.proto_now()
    if to is not None:
        proto = onnx.helper.make_node("Cast", [proto.input[0]], list(proto.output), to=to)
    evaluator = ReferenceEvaluator(proto, opsets=dict(node.scope.opsets))
    (result,) = evaluator.run(None, {proto.input[0]: data})
    return result if isinstance(result, np.ndarray) else None


def _size(node: Node, given: list[Array]) -> int:
    """Bytes of the result of an operator that can make much of little; 0 for any other."""
    data = given[0]
    if node.op == "ConstantOfShape":
        return math.prod(map(int, data)) * 8
    if node.op == "Tile":
        return int(data.nbytes) * math.prod(map(int, given[1]))
    if node.op == "Expand":
        shape = np.broadcast_shapes(data.shape, tuple(map(int, given[1])))
        return math.prod(shape) * int(data.itemsize)
    if node.op == "Gather":
        length = data.shape[node.attrs.get("axis", 0)]
        return data.nbytes // max(int(length), 1) * given[1].size
    return 0
