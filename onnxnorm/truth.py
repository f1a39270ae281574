"""The original model in float64: what every run is measured against.

    truth = model(x) with each float weight, input and intermediate in float64

The model is walked node by node. A weight is widened when a node reads it and dropped after, an
intermediate is dropped after its last reader, so memory follows the activations and not the
model. An operator is looked up in the model's own functions, in `onnxnorm.float64`, in
onnx.reference, in the function body of its schema, and last in onnxruntime, where that one node
runs in float32 and `Evaluator.precision` says so. Integers keep their types; a Cast to a
floating-point type is a Cast to float64.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError
from types import TracebackType
from typing import Any, Final, TypeAlias

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference import ops as standard_ops
from onnx.reference.ops import aionnxml as ml_ops

from onnxnorm import staging, storage
from onnxnorm.errors import ModelError, OnnxNormError, RuntimeRejection
from onnxnorm.float64 import (
    OPERATORS,
    Array,
    Call,
    NotImplementedHere,
    Value,
    is_float_dtype,
    is_float_type,
    widen,
)
from onnxnorm.module import RANDOM
from onnxnorm.order import in_order
from onnxnorm.session import Session, open_session

FunctionKey: TypeAlias = tuple[str, str, str]

# These only move values, so a float32 table is gathered from before it is widened.
_MOVES: Final = frozenset(
    {"Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Slice"}
)


class OutOfTime(Exception):
    """The deadline passed before the model was evaluated."""


class Unevaluable(OnnxNormError):
    """No implementation could evaluate a node; the message names the node."""


@dataclass
class _Scope:
    """Values by name, and where names that are not here are looked up.

    The path is that of `module.Scope`.
    """

    opsets: Mapping[str, int]
    parent: _Scope | None = None
    path: str = ""
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)

    def lookup(self, name: str) -> Value:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        raise ModelError(
            f"value '{name}' is read and nothing produces it", "Export the model again."
        )


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model that is read only when a node uses it."""

    tensor: onnx.TensorProto


@dataclass(frozen=True)
class _Plan:
    """The nodes of a graph or function, and what may be dropped after each."""

    owner: onnx.GraphProto | onnx.FunctionProto  # held, so that its id() stays its own
    nodes: tuple[onnx.NodeProto, ...]
    drops: tuple[tuple[str, ...], ...]


def subgraphs(node: onnx.NodeProto) -> Iterable[onnx.GraphProto]:
    """Return the graphs among the attributes of a node."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            yield from attribute.graphs


def names_read(node: onnx.NodeProto) -> set[str]:
    """Return the names a node reads, those of its subgraphs' outer scope included."""
    found = {name for name in node.input if name}
    for graph in subgraphs(node):
        for inner in graph.node:
            found |= names_read(inner)
        found |= {output.name for output in graph.output}
    return found


def _told_its_type(node: onnx.NodeProto, inputs: Sequence[Value]) -> onnx.NodeProto:
    """A QuantizeLinear that says which narrow float it makes: widened, its zero point does not."""
    zero = inputs[2] if len(inputs) > 2 else None
    if not isinstance(zero, np.ndarray) or not is_float_dtype(zero.dtype):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    kept = [a for a in node.attribute if a.name != "output_dtype"]
    del copy.attribute[:]
    told = onnx.helper.np_dtype_to_tensor_dtype(zero.dtype)
    copy.attribute.extend([*kept, onnx.helper.make_attribute("output_dtype", told)])
    return copy


def _in_order(nodes: Sequence[onnx.NodeProto]) -> tuple[onnx.NodeProto, ...]:
    """The nodes, each behind those that it reads: as they are if possible."""
    made = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    needs = [sorted(made[name] for name in names_read(node) if name in made) for node in nodes]
    try:
        order = tuple(in_order(range(len(nodes)), needs.__getitem__))
    except CycleError:  # of names that a body has for values of its own
        return tuple(nodes)
    return tuple(nodes[index] for index in order)


class Evaluator:
    """Evaluates one model in float64, as often as there are inputs.

    Attributes:
        precision: "float64", or what was not: "float64 except 3 nodes in float32: a.B (3)".
        entered: The bodies of control-flow nodes outside functions that were evaluated so far:
            the node's first output, and the attribute.
        rows: Of each floating-point table that a Gather has read rows of: which it has read.
    """

    def __init__(
        self,
        stored: storage.Stored,
        memory_bytes: float = math.inf,
        watch: Mapping[tuple[str, str], Callable[[Value], None]] | None = None,
    ) -> None:
        """Prepare to evaluate `stored`.

        Args:
            stored: The model.
            memory_bytes: How much of values to hold at a time.
            watch: What to call with a value, each time that it is there, by the path of its scope
                (as `module.Scope.path`) and its name; weights excepted.
        """
        self._watch = watch or {}
        self._memory = memory_bytes
        self._stored = stored
        self._graph = stored.proto.graph
        self._opsets = _opsets(stored.proto.opset_import)
        self._functions: dict[FunctionKey, onnx.FunctionProto] = {
            (f.domain, f.name, f.overload): f for f in stored.proto.functions
        }
        self._plans: dict[int, _Plan] = {}
        self._reference: dict[int, Any] = {}
        self._bodies: dict[tuple[str, ...], onnx.FunctionProto] = {}
        self._sessions: dict[tuple[str, ...], tuple[staging.Staged, Session]] = {}
        self._narrow: dict[int, str] = {}
        self._held: list[Any] = []
        self._deadline = math.inf
        self._main: _Scope | None = None
        self.entered: set[tuple[str, str]] = set()
        self.rows: dict[str, Array] = {}

    def __enter__(self) -> Evaluator:  # noqa: PYI034  (Self needs Python 3.11)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the sessions of nodes that ran in onnxruntime."""
        for staged, session in self._sessions.values():
            session.close()
            staged.close()
        self._sessions.clear()

    @property
    def precision(self) -> str:
        """Which precision the values have that were computed so far."""
        if not self._narrow:
            return "float64"
        counts = Counter(self._narrow.values())
        total = sum(counts.values())
        listed = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items()))
        nodes = "node" if total == 1 else "nodes"
        return f"float64 except {total} {nodes} in float32: {listed}"

    def run(
        self,
        feeds: Mapping[str, Value],
        keep: Sequence[str] = (),
        deadline: float = math.inf,
    ) -> dict[str, Value]:
        """model(feeds) in float64.

        Args:
            feeds: A value of the input's own type for each graph input.
            keep: Names of further values of the main graph to return.
            deadline: `time.monotonic()` after which to give up.

        Returns:
            Every graph output and kept value by name; floating-point arrays are float64.

        Raises:
            OutOfTime: The deadline passed.
            MemoryError: The values that are alive take more than the evaluator may hold.
            Unevaluable: A node cannot be evaluated, here or by onnxruntime.
        """
        self._deadline = deadline
        scope = self._main = _Scope(self._opsets)
        wanted = [output.name for output in self._graph.output]
        for value in self._graph.input:
            if value.name in feeds:
                scope.values[value.name] = widen(feeds[value.name])
        with np.errstate(all="ignore"):
            self._evaluate(self._graph, scope, frozenset(wanted) | set(keep))
            return {name: widen(self._read(scope.lookup(name))) for name in [*wanted, *keep]}

    def weight(self, name: str) -> Array:
        """Return an initializer of the main graph as it is stored."""
        return self._stored.array(next(t for t in self._graph.initializer if t.name == name))

    def apply(self, node: onnx.NodeProto, inputs: Sequence[Value]) -> Sequence[Value]:
        """Return the outputs of one node of the main graph for other inputs."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        return self._operator(node, domain, list(inputs), _Scope(self._opsets))

    def _evaluate(
        self,
        owner: onnx.GraphProto | onnx.FunctionProto,
        scope: _Scope,
        wanted: frozenset[str] | set[str],
    ) -> None:
        if isinstance(owner, onnx.GraphProto):
            for tensor in owner.initializer:
                scope.values.setdefault(tensor.name, _Weight(tensor))
            for sparse in owner.sparse_initializer:
                scope.values.setdefault(sparse.values.name, self._dense(sparse))
        plan = self._plan(owner)
        self._show(scope, tuple(scope.values))
        for node, drops in zip(plan.nodes, plan.drops, strict=True):
            if time.monotonic() > self._deadline:
                raise OutOfTime
            for name, value in zip(node.output, self._node(node, scope), strict=False):
                if name:
                    scope.values[name] = value
            self._show(scope, node.output)
            for name in drops:
                if name not in wanted:
                    scope.values.pop(name, None)
            if self._memory < math.inf and _bytes(scope) > self._memory:
                raise MemoryError(f"more than {self._memory / 2**30:.1f} GiB after {_label(node)}")

    def _show(self, scope: _Scope, names: Iterable[str]) -> None:
        """Hand the values that somebody watches to who does."""
        if not self._watch:
            return
        for name in names:
            seen = self._watch.get((scope.path, name))
            value = scope.values.get(name)
            if seen is not None and not isinstance(value, _Weight):
                seen(value)

    def _plan(self, owner: onnx.GraphProto | onnx.FunctionProto) -> _Plan:
        found = self._plans.get(id(owner))
        if found is None:
            nodes = _in_order(owner.node)
            last: dict[str, int] = {}
            for index, node in enumerate(nodes):
                last.update(dict.fromkeys([*names_read(node), *node.output], index))
            drops: list[list[str]] = [[] for _ in nodes]
            for name, index in last.items():
                drops[index].append(name)
            found = _Plan(owner, nodes, tuple(map(tuple, drops)))
            self._plans[id(owner)] = found
        return found

    def _read(self, value: Value) -> Value:
        return self._stored.array(value.tensor) if isinstance(value, _Weight) else value

    def _dense(self, sparse: onnx.SparseTensorProto) -> Array:
        values = self._stored.array(sparse.values)
        indices = self._stored.array(sparse.indices)
        dense = np.zeros(tuple(sparse.dims), dtype=values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        return dense

    # --- one node ------------------------------------------------------------------------------

    def _node(self, node: onnx.NodeProto, scope: _Scope) -> Sequence[Value]:
        domain = "" if node.domain == "ai.onnx" else node.domain
        if scope.attributes or any(a.ref_attr_name for a in node.attribute):
            node = self._resolve(node, scope)
        inputs = [self._read(scope.lookup(name)) if name else None for name in node.input]
        function = self._functions.get((node.domain, node.op_type, node.overload))
        try:
            if function is not None:
                return self._function(function, node, inputs)
            if domain == "" and node.op_type in _CONTROL:
                return _CONTROL[node.op_type](self, node, inputs, scope)
            moves = domain == "" and node.op_type in _MOVES
            if moves and node.op_type == "Gather" and scope is self._main:
                self._read_rows(node, scope.lookup(node.input[0]), inputs[1])
            if node.op_type == "QuantizeLinear":
                node = _told_its_type(node, inputs)
            inputs = [v if moves and i == 0 else widen(v) for i, v in enumerate(inputs)]
            return self._operator(node, domain, inputs, scope)
        except (OutOfTime, OnnxNormError, MemoryError):
            raise
        except Exception as error:
            raise Unevaluable(
                f"{_label(node)} cannot be evaluated: {type(error).__name__}: {error}",
                "Check the shapes and types of the inputs given to the model.",
            ) from error

    def _read_rows(self, node: onnx.NodeProto, table: Value, indices: Any) -> None:
        along = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if not isinstance(table, _Weight) or along != 0 or not table.tensor.dims:
            return
        if is_float_type(table.tensor.data_type):
            found = self.rows.setdefault(node.input[0], np.zeros(table.tensor.dims[0], np.bool_))
            found[indices] = True

    def _resolve(self, node: onnx.NodeProto, scope: _Scope) -> onnx.NodeProto:
        """Replace references to the attributes of the function that is being called."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if not _substitute(copy, scope.attributes):
            return node
        self._held.append(copy)  # plans and reference operators are found by id()
        return copy

    def _operator(
        self, node: onnx.NodeProto, domain: str, inputs: list[Value], scope: _Scope
    ) -> Sequence[Value]:
        version = scope.opsets.get(domain, 1)
        if (domain, node.op_type) == ("", "Constant"):
            return [self._constant(node)]
        own = OPERATORS.get((domain, node.op_type))
        if own is not None:
            call = Call(
                node.op_type,
                domain,
                version,
                tuple(inputs),
                {a.name: self._attribute(a) for a in node.attribute},
                tuple(bool(name) for name in node.output),
            )
            try:
                return own(call)
            except NotImplementedHere:
                pass
        if domain in {"", "ai.onnx.ml"}:
            reference = self._reference_operator(node, domain, version, scope)
            if reference is not None:
                try:
                    return self._checked(node, _by_reference(reference, inputs))
                except Exception:  # it has gaps; what comes next may have none
                    self._reference[id(node)] = None
        body = self._schema_body(node, domain, version, inputs)
        if body is not None:
            return self._function(body, node, inputs)
        return self._by_runtime(node, inputs, scope)

    def _attribute(self, attribute: onnx.AttributeProto) -> Any:
        if attribute.type == onnx.AttributeProto.TENSOR:
            return self._stored.array(attribute.t)
        if attribute.type == onnx.AttributeProto.SPARSE_TENSOR:
            return self._dense(attribute.sparse_tensor)
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        if isinstance(value, list):
            return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]
        return value

    def _constant(self, node: onnx.NodeProto) -> Value:
        attribute = next((a for a in node.attribute if a.name in _CONSTANT_FORMS), None)
        if attribute is None:
            raise ValueError("a Constant without a value")
        value = self._attribute(attribute)
        dtype = _CONSTANT_FORMS[attribute.name]
        if dtype is np.float32:
            return np.asarray(value, dtype=np.float32).astype(np.float64)
        return value if dtype is None else np.asarray(value, dtype=dtype)

    def _reference_operator(
        self, node: onnx.NodeProto, domain: str, version: int, scope: _Scope
    ) -> Any:
        """Return onnx.reference's operator for a node, None where it has none."""
        if id(node) not in self._reference:
            parameters = {
                "log": _silent,
                "opsets": dict(scope.opsets),
                "verbose": 0,
                "new_ops": None,
                "evaluator_cls": ReferenceEvaluator,
                "existing_functions": {},
            }
            loader = ml_ops.load_op if domain == "ai.onnx.ml" else standard_ops.load_op
            complete = node
            if any(a.type == onnx.AttributeProto.TENSOR for a in node.attribute):
                complete = onnx.NodeProto()
                complete.CopyFrom(node)
                for attribute in complete.attribute:
                    if attribute.type == onnx.AttributeProto.TENSOR:
                        array = self._stored.array(attribute.t)
                        attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
            try:
                operator = loader(domain, node.op_type, version)(complete, parameters)
            except Exception:  # it reports what it lacks in many types
                operator = None
            self._reference[id(node)] = operator
            self._held.append(node)
        return self._reference[id(node)]

    def _checked(self, node: onnx.NodeProto, outputs: Sequence[Value]) -> Sequence[Value]:
        """Record a reference operator that rounded to float32 although its inputs were wide."""
        narrow = [
            isinstance(v, np.ndarray) and is_float_dtype(v.dtype) and v.dtype != np.float64
            for v in outputs
        ]
        if any(narrow):
            self._record(node)
        return [widen(v) for v in outputs]

    def _record(self, node: onnx.NodeProto) -> None:
        self._narrow.setdefault(id(node), _label(node, named=False))
        self._held.append(node)

    def _schema_body(
        self, node: onnx.NodeProto, domain: str, version: int, inputs: Sequence[Value]
    ) -> onnx.FunctionProto | None:
        """Return the function that the operator's schema defines it by, if it does."""
        try:
            schema: Any = onnx.defs.get_schema(node.op_type, version, domain)
        except onnx.defs.SchemaError:
            return None
        key: tuple[str, ...] = (domain, node.op_type, str(version))
        if schema.has_function:
            if key not in self._bodies:
                self._bodies[key] = schema.function_body
            return self._bodies[key]
        if not schema.has_context_dependent_function:
            return None
        types = [_type_of(value).SerializeToString() for value in inputs]
        key = (*key, node.SerializeToString().hex(), repr(types))
        if key not in self._bodies:
            data = schema.get_context_dependent_function(node.SerializeToString(), types)
            self._bodies[key] = onnx.FunctionProto.FromString(data)
        return self._bodies[key]

    def _function(
        self, function: onnx.FunctionProto, node: onnx.NodeProto, inputs: Sequence[Value]
    ) -> Sequence[Value]:
        attributes = {a.name: a for a in function.attribute_proto}
        attributes |= {a.name: a for a in node.attribute}
        overload = f":{function.overload}" if function.overload else ""
        path = f"{function.domain}.{function.name}{overload}/"
        scope = _Scope({**self._opsets, **_opsets(function.opset_import)}, None, path, attributes)
        for position, name in enumerate(function.input):
            scope.values[name] = inputs[position] if position < len(inputs) else None
        self._evaluate(function, scope, set(function.output))
        wanted = function.output[: max(len(node.output), 1)]
        return [
            widen(self._read(scope.lookup(name))) if used else None
            for name, used in zip(wanted, node.output, strict=False)
        ]

    def _by_runtime(
        self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope
    ) -> Sequence[Value]:
        """Run one node in onnxruntime, its float inputs rounded to float32."""
        given: dict[str, Value] = {}
        for position, value in enumerate(inputs):
            if isinstance(value, np.ndarray) and value.dtype == np.float64:
                value = value.astype(np.float32)
            if value is not None:
                given[f"x{position}"] = value
        types = [f"{v.dtype}{v.ndim}" if isinstance(v, np.ndarray) else "" for v in given.values()]
        key = (str(id(node)), *given, *types)
        try:
            if key not in self._sessions:
                self._sessions[key] = self._one_node(node, given, scope)
                self._held.append(node)
            outputs = self._sessions[key][1].run(given)
        except RuntimeRejection as error:  # which names a file of ours
            why = error.what.partition("onnxruntime ")[2] or error.what
            raise Unevaluable(
                f"{_label(node)} cannot be evaluated by itself: onnxruntime {why}",
                "Check the shapes and types of the inputs given to the model.",
            ) from error
        self._record(node)
        return [widen(outputs[f"y{i}"]) if name else None for i, name in enumerate(node.output)]

    def _one_node(
        self, node: onnx.NodeProto, given: Mapping[str, Value], scope: _Scope
    ) -> tuple[staging.Staged, Session]:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        del copy.output[:]
        count = 1 + max((int(name[1:]) for name in given), default=-1)
        copy.input.extend(f"x{i}" if f"x{i}" in given else "" for i in range(count))
        copy.output.extend(f"y{i}" if name else "" for i, name in enumerate(node.output))
        graph = onnx.GraphProto(name="one_node", node=[copy])
        for name, value in given.items():
            graph.input.append(_value_info(name, value))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in copy.output if name)
        model = onnx.ModelProto(
            ir_version=self._stored.proto.ir_version,
            graph=graph,
            functions=self._stored.proto.functions,
            opset_import=[
                onnx.helper.make_opsetid(domain, version)
                for domain, version in scope.opsets.items()
            ],
        )
        staged = staging.Staged(self._stored.with_proto(model), None)
        try:
            return staged, open_session(staged.model, optimize=False)
        except BaseException:
            staged.close()
            raise

    # --- control flow --------------------------------------------------------------------------

    def _body(
        self, node: onnx.NodeProto, attribute: str, scope: _Scope, inputs: Sequence[Value]
    ) -> list[Value]:
        graph = _graph_attribute(node, attribute)
        outer = scope
        while outer.parent is not None:
            outer = outer.parent
        if outer is self._main:
            self.entered.add((next((n for n in node.output if n), ""), attribute))
        first = next((name for name in node.output if name), node.name)
        path = f"{scope.path}{first}/{attribute}/"
        inner = _Scope(scope.opsets, scope, path, scope.attributes)
        inner.values.update(
            {value.name: given for value, given in zip(graph.input, inputs, strict=False)}
        )
        names = [output.name for output in graph.output]
        self._evaluate(graph, inner, set(names))
        return [widen(self._read(inner.lookup(name))) for name in names]

    def _if(self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope) -> Sequence[Value]:
        chosen = "then_branch" if bool(np.asarray(inputs[0]).reshape(-1)[0]) else "else_branch"
        return self._body(node, chosen, scope, ())

    def _loop(
        self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope
    ) -> Sequence[Value]:
        body = _graph_attribute(node, "body")
        limit = math.inf if inputs[0] is None else int(np.asarray(inputs[0]).reshape(-1)[0])
        running = len(inputs) < 2 or inputs[1] is None or bool(np.asarray(inputs[1]).reshape(-1)[0])
        carried = [widen(value) for value in inputs[2:]]
        stacks: list[list[Value]] = [[] for _ in body.output[1 + len(carried) :]]
        step = 0
        while running and step < limit:
            given = [np.array(step, dtype=np.int64), np.array(True), *carried]
            results = self._body(node, "body", scope, given)
            running = bool(np.asarray(results[0]).reshape(-1)[0])
            for stack, value in zip(stacks, results[1 + len(carried) :], strict=True):
                stack.append(value)
            carried = results[1 : 1 + len(carried)]
            step += 1
        declared = body.output[1 + len(carried) :]
        return [*carried, *(_stack(s, d, 0) for s, d in zip(stacks, declared, strict=True))]

    def _scan(
        self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope
    ) -> Sequence[Value]:
        attributes = {a.name: self._attribute(a) for a in node.attribute if a.name != "body"}
        if scope.opsets.get("", 1) < 9:
            raise NotImplementedError("Scan before opset 9")
        body = _graph_attribute(node, "body")
        count = int(attributes["num_scan_inputs"])
        states = [widen(value) for value in inputs[: len(inputs) - count]]
        scanned = [widen(value) for value in inputs[len(inputs) - count :]]
        outputs = len(body.output) - len(states)
        axes = attributes.get("scan_input_axes") or [0] * count
        backward = attributes.get("scan_input_directions") or [0] * count
        out_axes = attributes.get("scan_output_axes") or [0] * outputs
        out_backward = attributes.get("scan_output_directions") or [0] * outputs
        stacks: list[list[Value]] = [[] for _ in range(outputs)]
        steps = scanned[0].shape[axes[0]]
        for step in range(steps):
            slices = [
                np.take(value, steps - 1 - step if back else step, axis=axis)
                for value, axis, back in zip(scanned, axes, backward, strict=True)
            ]
            results = self._body(node, "body", scope, [*states, *slices])
            states = results[: len(states)]
            for stack, value in zip(stacks, results[len(states) :], strict=True):
                stack.append(value)
        declared = body.output[len(states) :]
        stacked = [
            _stack(stack[::-1] if back else stack, value, axis)
            for stack, value, axis, back in zip(
                stacks, declared, out_axes, out_backward, strict=True
            )
        ]
        return [*states, *stacked]

    def _sequence_map(
        self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope
    ) -> Sequence[Value]:
        body = _graph_attribute(node, "body")
        results: list[list[Value]] = [[] for _ in body.output]
        for index in range(len(inputs[0])):
            given = [v[index] if isinstance(v, list) else v for v in inputs]
            made = self._body(node, "body", scope, given)
            for items, value in zip(results, made, strict=True):
                items.append(value)
        return results

    def _random(
        self, node: onnx.NodeProto, inputs: Sequence[Value], scope: _Scope
    ) -> Sequence[Value]:
        """Draw by numpy: another stream than the runtime's, so parity replaces these nodes."""
        attributes = {a.name: self._attribute(a) for a in node.attribute}
        rng = np.random.default_rng(abs(int(attributes.get("seed", 0))))
        return [draw(node.op_type, attributes, [widen(v) for v in inputs], rng)]


_CONTROL: Final[dict[str, Callable[..., Sequence[Value]]]] = {
    "If": Evaluator._if,
    "Loop": Evaluator._loop,
    "Scan": Evaluator._scan,
    "SequenceMap": Evaluator._sequence_map,
    **dict.fromkeys(RANDOM, Evaluator._random),
}

_CONSTANT_FORMS: Final[dict[str, Any]] = {
    "value": None,
    "sparse_value": None,
    "value_int": np.int64,
    "value_ints": np.int64,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_string": object,
    "value_strings": object,
}


def draw(
    op_type: str,
    attributes: Mapping[str, Any],
    inputs: Sequence[Value],
    rng: np.random.Generator,
    shape: Sequence[int] | None = None,
) -> Array:
    """Return one draw of a random operator, in float64 or its integer type.

    Args:
        op_type: One of `module.RANDOM`.
        attributes: The node's attributes.
        inputs: The node's inputs; may be empty where `shape` is given and no value is needed.
        rng: The source of randomness.
        shape: The output's shape, where it is known already.
    """
    if shape is None:
        shape = attributes["shape"] if op_type in {"RandomNormal", "RandomUniform"} else ()
        if op_type.endswith("Like") or op_type == "Bernoulli":
            shape = inputs[0].shape
    shape = tuple(int(d) for d in shape)
    to = int(attributes.get("dtype", onnx.TensorProto.FLOAT))
    if op_type.startswith("RandomNormal"):
        mean, scale = attributes.get("mean", 0.0), attributes.get("scale", 1.0)
        out: Array = mean + scale * rng.standard_normal(shape)
    elif op_type.startswith("RandomUniform"):
        out = rng.uniform(attributes.get("low", 0.0), attributes.get("high", 1.0), shape)
    elif op_type == "Bernoulli":
        out = (rng.random(shape) < inputs[0]).astype(np.float64)
        if "dtype" not in attributes:
            return out
    else:
        logits = inputs[0]
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        edges = np.cumsum(weights / weights.sum(axis=-1, keepdims=True), axis=-1)
        points = rng.random((logits.shape[0], int(attributes.get("sample_size", 1))))
        out = (points[:, :, None] > edges[:, None, :]).sum(axis=-1)
        to = int(attributes.get("dtype", onnx.TensorProto.INT32))
    if is_float_type(to):
        return np.asarray(out, dtype=np.float64)
    return np.asarray(out, dtype=onnx.helper.tensor_dtype_to_np_dtype(to))


def _bytes(scope: _Scope | None) -> int:
    """Return the bytes of the arrays that a scope and those around it hold."""
    total = 0
    while scope is not None:
        total += sum(v.nbytes for v in scope.values.values() if isinstance(v, np.ndarray))
        scope = scope.parent
    return total


def _by_reference(operator: Any, inputs: Sequence[Value]) -> Sequence[Value]:
    outputs: Sequence[Value] = operator.run(*inputs)
    return outputs


def _silent(*_: object) -> None:
    """Take onnx.reference's log lines."""


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if i.domain == "ai.onnx" else i.domain: i.version for i in imports}


def _label(node: onnx.NodeProto, *, named: bool = True) -> str:
    kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return f"{kind} '{node.name or ', '.join(node.output)}'" if named else kind


def _substitute(node: onnx.NodeProto, attributes: Mapping[str, onnx.AttributeProto]) -> bool:
    """Put the values of referenced attributes in; an unset one is left out. True on a change."""
    kept: list[onnx.AttributeProto] = []
    changed = False
    for attribute in node.attribute:
        if attribute.ref_attr_name:
            changed = True
            if attribute.ref_attr_name in attributes:
                value = onnx.AttributeProto()
                value.CopyFrom(attributes[attribute.ref_attr_name])
                value.name = attribute.name
                kept.append(value)
            continue
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                changed |= _substitute(inner, attributes)
        kept.append(attribute)
    if changed:
        kept = [_copied(attribute) for attribute in kept]
        del node.attribute[:]
        node.attribute.extend(kept)
    return changed


def _copied(attribute: onnx.AttributeProto) -> onnx.AttributeProto:
    copy = onnx.AttributeProto()
    copy.CopyFrom(attribute)
    return copy


def _graph_attribute(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    for attribute in node.attribute:
        if attribute.name == name:
            return attribute.g
    raise ValueError(f"no attribute {name}")


def _stack(values: list[Value], declared: onnx.ValueInfoProto, axis: int) -> Array:
    if values:
        return np.stack(values, axis=axis)
    tensor = declared.type.tensor_type
    dims = [d.dim_value for d in tensor.shape.dim]
    dims.insert(axis % (len(dims) + 1), 0)
    if is_float_type(tensor.elem_type):
        return np.zeros(dims)
    return np.zeros(dims, dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type or 7))


def _element_type(value: Array) -> int:
    if value.dtype.kind in "OSU":
        return int(onnx.TensorProto.STRING)
    return int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype))


def _type_of(value: Value) -> onnx.TypeProto:
    """Return the type of a value; wide floats as float32, which every schema accepts."""
    if isinstance(value, list):
        element = _type_of(value[0]) if value else onnx.TypeProto()
        return onnx.helper.make_sequence_type_proto(element)
    if value is None:
        return onnx.TypeProto()
    wide = value.dtype == np.float64
    number = int(onnx.TensorProto.FLOAT) if wide else _element_type(value)
    return onnx.helper.make_tensor_type_proto(number, value.shape)


def _value_info(name: str, value: Value) -> onnx.ValueInfoProto:
    if isinstance(value, list):
        element = value[0] if value else np.zeros((), np.float32)
        inner = onnx.helper.make_tensor_type_proto(_element_type(element), None)
        return onnx.helper.make_value_info(name, onnx.helper.make_sequence_type_proto(inner))
    shape = [None] * value.ndim
    return onnx.helper.make_tensor_value_info(name, _element_type(value), shape)


# --- cost --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one float64 evaluation will take, from shapes alone.

    Attributes:
        multiply_adds: Multiply-adds of matrix products and convolutions.
        elements: Elements written by all nodes.
        peak_bytes: Largest set of float64 values alive at once, weights in use included.
        unknown: Nodes whose output shape is not known; they count as nothing.
    """

    multiply_adds: int
    elements: int
    peak_bytes: int
    unknown: int

    def seconds(self) -> float:
        """Return the expected time on this machine."""
        return self.multiply_adds / _products_per_second() + self.elements * _ELEMENT_SECONDS


_ELEMENT_SECONDS: Final = 6e-9  # one pass over memory and one transcendental, per element
_RATE: list[float] = []


def _products_per_second() -> float:
    """Measure the multiply-adds of a float64 product per second, once per process.

    The best of several: whatever else runs on the machine can only slow one down.
    """
    if not _RATE:
        a = np.ones((384, 384))
        best = math.inf
        for _ in range(8):
            start = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - start)
        _RATE.append(a.size * a.shape[0] / max(best, 1e-6))
    return _RATE[0]


def infer_shapes(
    stored: storage.Stored, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, tuple[int | None, ...] | None]]:
    """Return element type and shape (None where unknown) of every value of the main graph.

    Args:
        stored: The model; its weights are not read.
        shapes: A concrete shape for each graph input that has one.
    """
    copy = stored.small()
    for value in copy.graph.input:
        if value.name in shapes and value.type.HasField("tensor_type"):
            dims = value.type.tensor_type.shape
            del dims.dim[:]
            for size in shapes[value.name]:
                dims.dim.add(dim_value=int(size))
    for value in copy.graph.output:  # declared symbols would stand in the way of what is inferred
        if value.type.HasField("tensor_type"):
            for dim in value.type.tensor_type.shape.dim:
                dim.ClearField("value")
    del copy.graph.value_info[:]
    try:
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    except Exception:  # inference is advice; it may fail on any odd model
        copy = stored.small()
    found: dict[str, tuple[int, tuple[int | None, ...] | None]] = {}
    graph = copy.graph
    for value in [*graph.value_info, *graph.input, *graph.output]:
        if value.type.HasField("tensor_type"):
            tensor = value.type.tensor_type
            dims_known = tensor.HasField("shape")
            found[value.name] = (
                tensor.elem_type,
                tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
                if dims_known
                else None,
            )
    for weight in graph.initializer:
        found[weight.name] = (weight.data_type, tuple(weight.dims))
    return found


def estimate(stored: storage.Stored, shapes: Mapping[str, Sequence[int]]) -> Cost:
    """Estimate the cost of one evaluation with inputs of the given shapes."""
    known = infer_shapes(stored, shapes)

    def size(name: str) -> int | None:
        shape = known.get(name, (0, None))[1]
        if shape is None or any(d is None for d in shape):
            return None
        return math.prod(d for d in shape if d is not None)

    graph = stored.proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        last.update(dict.fromkeys(names_read(node), index))
    for value in graph.output:
        last[value.name] = len(graph.node)
    products = elements = peak = unknown = 0
    alive: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        written = 0
        for name in node.output:
            amount = size(name) if name else 0
            unknown += amount is None
            alive[name] = amount or 0
            written += amount or 0
        read = sum(size(name) or 0 for name in node.input if name in weights)
        if node.op_type == "Gather":
            read = 0  # rows are gathered before they are widened
        products += _products(node, known, written)
        elements += written + read
        peak = max(peak, 8 * (sum(alive.values()) + read + written))
        for name in [n for n in alive if last.get(n, -1) <= index]:
            del alive[name]
    return Cost(products, elements, peak, unknown)


def _products(
    node: onnx.NodeProto,
    known: Mapping[str, tuple[int, tuple[int | None, ...] | None]],
    written: int,
) -> int:
    """Return the multiply-adds of one node; a depth that is not known counts as one."""

    def dims(index: int) -> list[int]:
        if index >= len(node.input):
            return []
        return [d or 1 for d in known.get(node.input[index], (0, None))[1] or ()]

    if node.op_type in {"Conv", "FusedConv", "ConvInteger"}:
        return written * math.prod(dims(1)[1:])
    if node.op_type == "QLinearConv":
        return written * math.prod(dims(3)[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(dims(0)) * math.prod(dims(1)[1:])
    if node.op_type in {"MatMul", "MatMulInteger", "FusedMatMul", "DynamicQuantizeMatMul"}:
        return written * (dims(0)[-1:] or [1])[0]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        a = dims(0)
        return written * (a[0 if transposed else -1] if a else 1)
    if node.op_type in {"LSTM", "GRU", "RNN"}:
        steps = math.prod(dims(0)[:2])
        return steps * (math.prod(dims(1)) + math.prod(dims(2)))
    if node.op_type == "MatMulNBits":
        values = {a.name: a.i for a in node.attribute}
        return written * values.get("K", 1)
    return 0
