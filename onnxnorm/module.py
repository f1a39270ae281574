"""The lossless boundary around onnx-graphsurgeon.

onnx-graphsurgeon is the graph that passes change: nodes and values with links in both directions.
Its own importer and exporter drop metadata, doc strings, quantization annotations, inputs that
have initializers, function overloads and more, so a `Module` does both itself: every graph
element keeps the protobuf message it came from, and `export` writes that message back unless an
edit replaced the element. A scope that no edit touched is written back as it was read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxnorm import wellformed
from onnxnorm.errors import ModelError
from onnxnorm.ops import bodies
from onnxnorm.storage import Array, Stored

SITE_KEY: Final = "onnxnorm.site"  # the metadata key that names, on a new node, the site it is from

# Operators that draw numbers, other ones in every run.
RANDOM: Final = frozenset(
    {
        "Bernoulli",
        "Multinomial",
        "RandomNormal",
        "RandomNormalLike",
        "RandomUniform",
        "RandomUniformLike",
    }
)


class Value(gs.Variable):
    """A value known only at run time: a graph input or a node's output.

    Unlike graphsurgeon's tensors, values compare by identity and can be dictionary keys.

    Attributes:
        scope: The graph, body or function that defines it.
        default: The initializer of an input that callers may override.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(self, name: str, scope: Scope | None = None) -> None:
        super().__init__(name)
        self.scope = scope
        self.default: onnx.TensorProto | None = None


class _Lazy(LazyValues):
    """Values that are read from the model file when they are asked for."""

    def __init__(self, tensor: onnx.TensorProto, stored: Stored) -> None:
        self.tensor = tensor
        self.stored = stored
        self.shape = tuple(tensor.dims)
        self.dtype = tensor.data_type
        self.nbytes = 0

    def load(self) -> Array:
        return self.stored.array(self.tensor)


class _LazySparse(_Lazy):
    """A sparse initializer, made dense when its values are asked for."""

    def __init__(self, sparse: onnx.SparseTensorProto, stored: Stored) -> None:
        super().__init__(sparse.values, stored)
        self.sparse = sparse
        self.shape = tuple(sparse.dims)

    def load(self) -> Array:
        return dense(self.sparse)


def dense(sparse: onnx.SparseTensorProto) -> Array:
    """The dense array of a sparse tensor, in COO form with flat or per-axis indices.

    Raises:
        ModelError: Its indices do not fit its values or its shape.
    """
    try:
        values = numpy_helper.to_array(sparse.values)
        indices = numpy_helper.to_array(sparse.indices)
        out: Array = np.zeros(tuple(sparse.dims), dtype=values.dtype)
        if indices.ndim == 1:
            out.reshape(-1)[indices] = values
        else:
            out[tuple(indices.T)] = values
    except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        raise ModelError(
            f"sparse tensor '{sparse.values.name}' cannot be read: {error}",
            "Export the model again; its indices do not match its values and shape.",
        ) from error
    return out


class Weight(gs.Constant):
    """An initializer that nobody can override; its values stay on disk until asked for.

    Attributes:
        proto: Its message. The values of a large one are elsewhere: ask the module's store.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self, proto: onnx.TensorProto | onnx.SparseTensorProto, scope: Scope, stored: Stored
    ) -> None:
        if isinstance(proto, onnx.SparseTensorProto):
            super().__init__(proto.values.name, _LazySparse(proto, stored))
        else:
            super().__init__(proto.name, _Lazy(proto, stored))
        self.scope = scope
        self.proto = proto


class Node(gs.Node):
    """An operator call.

    Attributes:
        scope: The graph, body or function it stands in.
        proto: The message it came from, or the one a new node was modelled on; its name,
            doc string, metadata and attributes are kept.
        site: The site that made it; "" for a node of the input model.
        bodies: The scopes of its graph attributes, as (attribute, index, scope).
        parametric: Whether an attribute is a parameter of the function, and differs from call to
            call.
    """

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __init__(
        self,
        proto: onnx.NodeProto,
        scope: Scope,
        inputs: Sequence[Value | Weight],
        outputs: Sequence[Value],
        site: str = "",
    ) -> None:
        super().__init__(
            op=proto.op_type,
            name=proto.name,
            attrs={a.name: _attribute(a) for a in proto.attribute},
            inputs=list(inputs),
            outputs=list(outputs),
            domain="" if proto.domain in wellformed.STANDARD_DOMAINS else proto.domain,
        )
        self.proto = proto
        self.scope = scope
        self.site = site
        self.bodies: list[tuple[str, int, Scope]] = []
        self.parametric = any(a.ref_attr_name for a in proto.attribute)

    def parameter(self, *names: str) -> str | None:
        """The first of these attributes that is a parameter of the function; None if none is."""
        refers = gs.Node.AttributeRef
        return next((name for name in names if isinstance(self.attrs.get(name), refers)), None)

    def text(self, name: str, default: str = "") -> str:
        """A text attribute, which is stored as bytes; the default where it is a parameter."""
        found = self.attrs.get(name, default)
        return found.decode(errors="replace") if isinstance(found, bytes) else default

    @property
    def made_by(self) -> str:
        """The site that made this node, in this run or before; "" for one the exporter made."""
        told = (e.value for e in self.proto.metadata_props if e.key == SITE_KEY)
        return self.site or next(told, "")

    @property
    def label(self) -> str:
        """What to call this node in a message: its name, else its first output."""
        return str(self.name or next((v.name for v in self.outputs if v.name), self.op))

    def proto_now(self) -> onnx.NodeProto:
        """The message of this node as it is wired now, to be read only."""
        same = self.proto.input == [v.name for v in self.inputs] and self.proto.output == [
            v.name for v in self.outputs
        ]
        if same and not self.site and not any(body.touched for _, _, body in self.bodies):
            return self.proto
        proto = onnx.NodeProto()
        proto.CopyFrom(self.proto)
        for names, values in ((proto.input, self.inputs), (proto.output, self.outputs)):
            now = [v.name for v in values]
            if now != list(names):
                del names[:]
                names.extend(now)
        for attribute in proto.attribute:
            for name, index, body in self.bodies:
                if name == attribute.name and body.touched:
                    target = attribute.g if index < 0 else attribute.graphs[index]
                    target.CopyFrom(body.export())
        if self.site:
            for entry in [e for e in proto.metadata_props if e.key == SITE_KEY]:
                proto.metadata_props.remove(entry)
            entry = proto.metadata_props.add()
            entry.key, entry.value = SITE_KEY, self.site
        return proto


class Scope:
    """One list of nodes: the main graph, the body of a control-flow node, or a function.

    Attributes:
        path: "" for the main graph; the way to a body, as "<node>/<attribute>/"; the name of a
            function, as "<domain>.<name>/".
        graph: The graphsurgeon graph.
        opsets: Domain to version, as imported here.
        owner: The node whose body this is; None for the main graph and for functions.
        parent: The scope around a body; None for the main graph and for functions.
        touched: Whether an edit has changed this scope or one inside it.
        mentioned: Names of values that are needed although no node here need read them: those
            that quantization annotations refer to and, in the main graph, training information.
    """

    def __init__(
        self,
        module: Module,
        path: str,
        proto: onnx.GraphProto | onnx.FunctionProto,
        owner: Node | None,
        opsets: Mapping[str, int],
    ) -> None:
        self.module = module
        self.path = path
        self.proto = proto
        self.owner = owner
        self.parent: Scope | None = None if owner is None else owner.scope
        self.opsets = opsets
        self.graph = gs.Graph(name=proto.name)
        self.values: dict[str, Value | Weight] = {}
        self.weights: dict[Weight, None] = {}
        self.touched = False
        self.mentioned = _annotated(proto) if isinstance(proto, onnx.GraphProto) else set()
        if owner is None and not self.is_function:
            self.mentioned |= _trained(module.proto)
        self._read()
        self._defined = set(self.values)

    @property
    def is_function(self) -> bool:
        """Whether this is a model-local function, where initializers cannot be."""
        return isinstance(self.proto, onnx.FunctionProto)

    @property
    def outermost(self) -> Scope:
        """The main graph or the function that this scope is, or is in."""
        return self if self.parent is None else self.parent.outermost

    @property
    def is_ours(self) -> bool:
        """Whether this is the body of an operator of ours."""
        return (
            isinstance(self.proto, onnx.FunctionProto)
            and self.proto.domain == bodies.DOMAIN
            and self.proto.name in bodies.OPERATORS
        )

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in order."""
        nodes: list[Node] = self.graph.nodes
        return nodes

    @property
    def outputs(self) -> list[Value | Weight]:
        """The output values, in order."""
        outputs: list[Value | Weight] = self.graph.outputs
        return outputs

    @property
    def inputs(self) -> list[Value | Weight]:
        """The input values, in order."""
        inputs: list[Value | Weight] = self.graph.inputs
        return inputs

    def touch(self) -> None:
        """Note that an edit has changed this scope."""
        scope: Scope | None = self
        while scope is not None:
            scope.touched = True
            scope = scope.parent

    # ** import **

    def _read(self) -> None:
        proto = self.proto
        if isinstance(proto, onnx.FunctionProto):
            for name in proto.input:
                self.graph.inputs.append(self._define(Value(name, self), "function input"))
        else:
            self._read_inputs(proto)
        drafts: list[tuple[onnx.NodeProto, list[Value]]] = []
        for node in proto.node:
            if isinstance(node.name, bytes):
                raise _no_text(node.name, "node")
            outputs = []
            for name in node.output:
                value = Value(name, self)
                outputs.append(self._define(value, "node output") if name else value)
            drafts.append((node, outputs))
        # Inputs are linked after every output exists: files need not be sorted to be readable.
        for node, outputs in drafts:
            inputs = [self._resolve(name, node) for name in node.input]
            made = Node(node, self, inputs, outputs)
            for attribute in node.attribute:
                bodies = [(-1, attribute.g)] if attribute.HasField("g") else []
                bodies += list(enumerate(attribute.graphs))
                for index, body in bodies:
                    self._read_body(made, attribute.name, index, body)
            self.graph.nodes.append(made)
        names = [o if isinstance(o, str | bytes) else o.name for o in proto.output]
        self.graph.outputs.extend(self._resolve(name, None) for name in names)

    def _read_inputs(self, proto: onnx.GraphProto) -> None:
        stored = self.module.stored
        overridable = {i.name for i in proto.input} if self.module.proto.ir_version >= 4 else set()
        defaults: dict[str, onnx.TensorProto] = {}
        for tensor in proto.initializer:
            if tensor.name in overridable:
                if tensor.name in defaults:
                    raise _duplicate(tensor.name, "initializer")
                defaults[tensor.name] = tensor
            else:
                self.weights[self._define(Weight(tensor, self, stored), "initializer")] = None
        for sparse in proto.sparse_initializer:
            if sparse.values.name not in overridable:
                weight = Weight(sparse, self, stored)
                self.weights[self._define(weight, "sparse initializer")] = None
        seen = set()
        for info in proto.input:
            if info.name in seen:
                raise _duplicate(info.name, "graph input")
            seen.add(info.name)
            known = self.values.get(info.name)
            if known is None:
                value = Value(info.name, self)
                value.default = defaults.get(info.name)
                known = self._define(value, "graph input")
            # Before IR version 4 every initializer is listed as an input and none can be
            # overridden; the value is then the weight itself.
            self.graph.inputs.append(known)

    def _read_body(self, node: Node, attribute: str, index: int, body: onnx.GraphProto) -> None:
        suffix = "" if index < 0 else str(index)
        first = next((v.name for v in node.outputs if v.name), node.name)
        path = self.module.fresh_path(f"{self.path}{first}/{attribute}{suffix}")
        scope = Scope(self.module, path, body, node, self.opsets)
        node.bodies.append((attribute, index, scope))
        if index < 0:
            node.attrs[attribute] = scope.graph
        self.module.scopes.append(scope)

    def _define(self, value: Any, kind: str) -> Any:
        if value.name in self.values:
            raise _duplicate(value.name, kind)
        if isinstance(value.name, bytes):
            raise _no_text(value.name, kind)
        self.values[value.name] = value
        self.module.names.add(value.name)
        return value

    def _resolve(self, name: str, node: onnx.NodeProto | None) -> Value | Weight:
        if not name and node is not None:
            return Value("", self)
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.parent
        where = (
            f"node '{node.name or node.op_type}' ({node.op_type}) reads"
            if node is not None
            else f"output of {self.path or 'the graph'} is"
        )
        raise ModelError(
            f"{where} '{name}', which nothing produces",
            "Export the model again; the graph is incomplete.",
        )

    # ** export **

    def export(self) -> Any:
        """This scope as the message it came from, with all edits."""
        proto: Any = type(self.proto)()
        proto.CopyFrom(self.proto)
        self.edit(proto)
        return proto

    def edit(self, proto: Any) -> None:
        """Make all edits in a copy of the message that this scope came from."""
        if not self.touched:
            return
        del proto.node[:]
        proto.node.extend(node.proto_now() for node in self.nodes)
        alive = {v.name for node in self.nodes for v in node.outputs}
        alive |= {v.name for v in self.inputs} | {w.name for w in self.weights}
        gone = self._defined - alive
        if gone:
            # What is said of a name that never was a value here is no business of ours.
            _drop(proto.value_info, gone, lambda i: i.name)
        if isinstance(self.proto, onnx.FunctionProto):
            return
        if gone:
            _drop(proto.input, gone, lambda i: i.name)
            _drop(proto.initializer, gone, lambda t: t.name)
            _drop(proto.sparse_initializer, gone, lambda t: t.values.name)
            _drop(proto.quantization_annotation, gone, lambda q: q.tensor_name)
        fresh = [
            w.proto
            for w in self.weights
            if w.name not in self._defined and isinstance(w.proto, onnx.TensorProto)
        ]
        proto.initializer.extend(fresh)
        if self.module.proto.ir_version < 4:
            proto.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in fresh
            )


def _annotated(graph: onnx.GraphProto) -> set[str]:
    """The scales and zero points that quantization annotations name."""
    return {e.value for q in graph.quantization_annotation for e in q.quant_parameter_tensor_names}


def _trained(model: onnx.ModelProto) -> set[str]:
    """The names that training knows: its graphs run as one with the main graph."""
    names: set[str] = set()
    for info in model.training_info:
        for binding in (*info.initialization_binding, *info.update_binding):
            names |= {binding.key, binding.value}
        graphs = [info.initialization, info.algorithm]
        while graphs:
            graph = graphs.pop()
            names.update(output.name for output in graph.output)
            for node in graph.node:
                names.update(node.input)
                for attribute in node.attribute:
                    graphs += [attribute.g, *attribute.graphs]
    return names


def _drop(messages: Any, names: set[str], name: Callable[[Any], str]) -> None:
    """Remove the messages that have one of these names from a repeated field."""
    kept = [m for m in messages if name(m) not in names]
    if len(kept) < len(messages):
        del messages[:]
        messages.extend(kept)


class Module:
    """A model whose graph can be changed without losing what is not changed.

    Attributes:
        stored: The model as read, with access to its weights.
        main: The main graph.
        scopes: Every scope: the main graph, bodies at any depth, functions.
        names: Every value and node name that is taken, in any scope.

    Raises:
        ModelError: The graph is not one: a value with two producers, an input that nothing
            produces, a cycle, an operator of a domain that is not imported; or a tensor, an
            attribute or an opset version cannot be.
    """

    def __init__(self, stored: Stored) -> None:
        wellformed.check(stored)
        self.stored = stored.branch()
        self.proto = stored.proto
        self._given = stored
        self._paths: set[str] = set()
        self._carried: dict[str, onnx.FunctionProto] = {}
        self.names: set[str] = set()
        opsets = wellformed.versions(self.proto.opset_import)
        self.scopes: list[Scope] = []
        self.main = Scope(self, "", self.proto.graph, None, opsets)
        self.scopes.insert(0, self.main)
        for function in self.proto.functions:
            overload = f":{function.overload}" if function.overload else ""
            path = self.fresh_path(f"{function.domain}.{function.name}{overload}")
            imported = wellformed.versions(function.opset_import)
            self.scopes.append(Scope(self, path, function, None, imported))
        for scope in self.scopes:
            self.names.update(node.name for node in scope.nodes if node.name)
            _check_order(scope)
            for node in scope.nodes:
                if node.domain not in scope.opsets:
                    raise ModelError(
                        f"node '{node.label}' calls {node.op} of the domain"
                        f" '{node.domain or 'ai.onnx'}', which the model does not import",
                        "Export the model again; its opset imports are incomplete.",
                    )
        self._imports = opsets  # those of the main graph, and of every body in it
        self._called = self._calls()

    def nodes(self) -> Iterator[Node]:
        """Every node of every scope, the main graph first."""
        for scope in self.scopes:
            yield from scope.nodes

    @property
    def touched(self) -> bool:
        """Whether any edit has been made."""
        return any(scope.touched for scope in self.scopes)

    @property
    def bytes_read(self) -> int:
        """Bytes of the model as it was read, with all its weights."""
        return self._given.total_bytes

    def fresh_name(self, wanted: str) -> str:
        """`wanted`, or the first of `wanted_1`, `wanted_2` ... that nobody uses."""
        name, number = wanted, 0
        while name in self.names:
            number += 1
            name = f"{wanted}_{number}"
        self.names.add(name)
        return name

    def fresh_path(self, wanted: str) -> str:
        """The path of a new scope: `wanted` and a slash, numbered where two nodes look alike."""
        path, number = f"{wanted}/", 0
        while path in self._paths:
            number += 1
            path = f"{wanted}_{number}/"
        self._paths.add(path)
        return path

    def carried(self, name: str) -> onnx.FunctionProto | None:
        """The function of the operator `name` of our domain that the model has or will have."""
        known = {f.name: f for f in self.proto.functions if f.domain == bodies.DOMAIN}
        return known.get(name, self._carried.get(name))

    def carry(self, name: str) -> None:
        """Let the model have the function of an operator of our domain, while a node calls it.

        The model must not have another one of that name, nor another version of our domain, and be
        of an IR version with functions.
        """
        if self.carried(name) is None:
            self._carried[name] = bodies.function(name, self._imports[""])
        self._imports[bodies.DOMAIN] = bodies.VERSION

    def use(self, domain: str) -> None:
        """Let nodes of the main graph and its bodies call operators of another domain, version 1.

        It is imported on export if a node does.
        """
        self._imports.setdefault(domain, 1)

    def _calls(self) -> set[str]:
        """The operators of our domain that are called anywhere."""
        return {node.op for node in self.nodes() if node.domain == bodies.DOMAIN}

    def export(self) -> Stored:
        """The model with all edits; the input itself where there are none."""
        return self.stored.with_proto(self._edited()) if self.touched else self._given

    def small(self) -> onnx.ModelProto:
        """A copy of the model with all edits for analyses, as `Stored.small` makes it."""
        if not self.touched:
            return self.stored.small()
        copy = self._edited()
        self.stored.bring_inside(copy)
        return copy

    def _edited(self) -> onnx.ModelProto:
        """The model's message with all edits."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        self.main.edit(proto.graph)
        del proto.functions[:]
        called = self._calls()
        gone = self._called - called
        proto.functions.extend(
            scope.export()
            for scope in self.scopes
            if isinstance(scope.proto, onnx.FunctionProto)
            and not (scope.proto.domain == bodies.DOMAIN and scope.proto.name in gone)
        )
        fresh = [self._carried[name] for name in sorted(called & set(self._carried))]
        proto.functions.extend(fresh)
        if fresh and all(i.domain != bodies.DOMAIN for i in proto.opset_import):
            proto.opset_import.append(onnx.helper.make_opsetid(bodies.DOMAIN, bodies.VERSION))
        known = {"", bodies.DOMAIN, *(i.domain for i in proto.opset_import)}
        graphs = [scope for scope in self.scopes if not scope.is_function]
        called = {n.domain or "" for scope in graphs for n in scope.nodes}
        for domain in sorted(called - known - set(wellformed.STANDARD_DOMAINS)):
            imported = onnx.helper.make_opsetid(domain, self._imports[domain])
            proto.opset_import.append(imported)
        return proto


def _attribute(proto: onnx.AttributeProto) -> Any:
    """An attribute's Python value; graphs are put in by the scope that reads them."""
    if proto.ref_attr_name:
        return gs.Node.AttributeRef(proto.ref_attr_name, proto.type)
    if proto.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        return None
    if proto.type == onnx.AttributeProto.UNDEFINED:
        raise ModelError(
            f"attribute '{proto.name}' has no type that is known here",
            "Export the model again, or update onnx: the type may be newer than the installed one.",
        )
    value = onnx.helper.get_attribute_value(proto)
    return list(value) if hasattr(value, "append") else value


def _duplicate(name: str, kind: str) -> ModelError:
    return ModelError(
        f"the name '{name}' of a {kind} is defined twice",
        "Export the model again; a value has exactly one producer.",
    )


def _no_text(name: str | bytes, kind: str) -> ModelError:
    return ModelError(f"the name {name!r} of a {kind} is not UTF-8 text", "Export the model again.")


def _check_order(scope: Scope) -> None:
    """Raise on a cycle: nodes that wait for each other, directly or through their bodies."""
    waiting: dict[Node, int] = {}
    readers: dict[Node, list[Node]] = {}
    for node in scope.nodes:
        sources = {p for v in reads(node) for p in v.inputs if p.scope is scope}
        if node in sources:
            raise _cycle(scope, node)
        waiting[node] = len(sources)
        for source in sources:
            readers.setdefault(source, []).append(node)
    ready = [node for node, count in waiting.items() if count == 0]
    done = 0
    while ready:
        done += 1
        for reader in readers.get(ready.pop(), ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if done < len(waiting):
        raise _cycle(scope, next(node for node, count in waiting.items() if count > 0))


def _cycle(scope: Scope, node: Node) -> ModelError:
    return ModelError(
        f"the graph{' ' + scope.path if scope.path else ''} has a cycle through node"
        f" '{node.label}' ({node.op})",
        "Export the model again; an ONNX graph has no cycles outside Loop and Scan.",
    )


def reads(node: Node) -> Iterator[Value | Weight]:
    """What a node needs to run: its inputs, and all that its bodies take from outside."""
    yield from node.inputs
    for _, _, body in node.bodies:
        for inner in body.nodes:
            yield from reads(inner)
        yield from body.outputs
