"""The invariants that every pass must keep, checked after every pass that changed something.

1. Every value has one producer; names are unique in a scope and visible where they are used.
2. Every input is a graph input, a weight, a value of an outer scope, or is produced earlier.
3. Links between nodes and values agree in both directions, by identity.
4. Inputs and outputs of every scope are those of the file: names, order, identity.
5. Every new operator exists in its domain at the imported version, with this many inputs; the
   model has the function of one of ours.
6. Nothing that shape inference knew of a surviving value is contradicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import onnx

from onnxnorm.errors import VerificationError
from onnxnorm.facts import AnyValue, Facts, Type
from onnxnorm.module import Module, Node, Scope, Weight, reads
from onnxnorm.ops import bodies
from onnxnorm.storage import Stored, payload_size, tensors

# Operators that onnxruntime has in ONNX's own domain, from version 1 on, beside the standard.
RUNTIME_OPERATORS: Final = frozenset({"LayerNormalization", "SimplifiedLayerNormalization"})


class Verifier:
    """Knows a module as it was, and checks it as it is.

    Args:
        module: The module, before any pass.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._interface = {scope: _interface(scope) for scope in module.scopes}
        self._sorted = {scope for scope in module.scopes if _first_unsorted(scope) is None}
        self._types: dict[tuple[str, str], Type] | None = None
        # What the file itself says against the schema is copied and no pass's fault.
        self._given = {(node.op, name) for node in module.nodes() for name in node.attrs}

    def remember_types(self, facts: Facts) -> None:
        """Take the types to compare with; asked for before the first commit."""
        if self._types is None:
            self._types = facts.types

    def check(self, rule: str, facts: Facts | None = None) -> None:
        """Check every invariant.

        Args:
            rule: The pass that has just changed the module.
            facts: What is true of the module now; None has it found here.

        Raises:
            VerificationError: The pass `rule` broke one.
        """
        defined = {scope: _definitions(rule, scope) for scope in self._module.scopes}
        readers: dict[AnyValue, set[Node]] = {}
        for node in self._module.nodes():
            for value in node.inputs:
                readers.setdefault(value, set()).add(node)
        for scope in self._module.scopes:
            self._structure(rule, scope, defined, readers)
            if scope.touched:
                for node in scope.nodes:
                    if node.site:
                        self._schema(rule, node)
        if self._types is not None:
            self._contradictions(rule, facts or Facts(self._module))

    def _structure(
        self,
        rule: str,
        scope: Scope,
        defined: dict[Scope, dict[str, AnyValue]],
        readers: dict[AnyValue, set[Node]],
    ) -> None:
        if _interface(scope) != self._interface[scope]:
            raise _broken(rule, scope, "the inputs or outputs are not those of the file")
        for value in defined[scope].values():
            if set(value.outputs) != readers.get(value, set()):
                raise _broken(rule, scope, f"'{value.name}' does not know its readers")
        for node in scope.nodes:
            for value in node.inputs:
                if value.name:
                    _check_visible(rule, value, scope, defined)
        for value in scope.outputs:
            _check_visible(rule, value, scope, defined)
        late = _first_unsorted(scope)
        if late is not None and scope in self._sorted:
            raise _broken(rule, scope, f"'{late.name}' is read before it is computed")

    def _schema(self, rule: str, node: Node) -> None:
        domain = node.domain or ""
        version = node.scope.opsets.get(domain)
        if version is None:
            raise _broken(rule, node.scope, f"{node.op} is of a domain that is not imported")
        if domain == bodies.DOMAIN:
            function = self._module.carried(node.op)
            if function is None:
                raise _broken(rule, node.scope, f"the model has no function {domain}.{node.op}")
            if len(node.inputs) != len(function.input) or not all(v.name for v in node.inputs):
                raise _broken(rule, node.scope, f"{node.op} needs all of {list(function.input)}")
            if missing := set(function.attribute) - set(node.attrs):
                raise _broken(rule, node.scope, f"{node.op} needs the attributes {sorted(missing)}")
            return
        if not onnx.defs.has(node.op, version, domain):
            if domain == "" and node.op not in RUNTIME_OPERATORS:
                raise _broken(rule, node.scope, f"{node.op} does not exist in opset {version}")
            return
        schema = onnx.defs.get_schema(node.op, version, domain)
        if not schema.min_input <= len(node.inputs) <= schema.max_input:
            raise _broken(rule, node.scope, f"{node.op} takes no {len(node.inputs)} inputs")
        for formal, value in zip(schema.inputs, node.inputs, strict=False):
            if not value.name and formal.option == onnx.defs.OpSchema.FormalParameterOption.Single:
                raise _broken(rule, node.scope, f"{node.op} needs its input '{formal.name}'")
        for name in node.attrs:
            if name not in schema.attributes and (node.op, name) not in self._given:
                raise _broken(rule, node.scope, f"{node.op} has no attribute '{name}'")
        for name, attribute in schema.attributes.items():
            if attribute.required and name not in node.attrs:
                raise _broken(rule, node.scope, f"{node.op} needs the attribute '{name}'")

    def _contradictions(self, rule: str, facts: Facts) -> None:
        before = self._types or {}
        for key, now in facts.types.items():
            then = before.get(key)
            if then is None:
                continue
            if then.element and now.element and then.element != now.element:
                raise VerificationError(
                    f"{rule} changed the element type of '{key[1]}'", _REPORT.format(rule)
                )
            if then.shape is None or now.shape is None:
                continue
            known = [
                (a, b)
                for a, b in zip(then.shape, now.shape, strict=False)
                if isinstance(a, int) and isinstance(b, int)
            ]
            if len(then.shape) != len(now.shape) or any(a != b for a, b in known):
                raise VerificationError(
                    f"{rule} changed the shape of '{key[1]}' from {then.shape} to {now.shape}",
                    _REPORT.format(rule),
                )


_REPORT = "This is a defect of {0}; please report it. Leave the pass out to go on."


def _broken(rule: str, scope: Scope, what: str) -> VerificationError:
    where = f" in {scope.path}" if scope.path else ""
    return VerificationError(f"{rule} broke the graph{where}: {what}", _REPORT.format(rule))


def _callable_inputs(scope: Scope) -> list[AnyValue]:
    """The inputs that a caller gives: before IR version 4 weights are listed among them."""
    return [v for v in scope.inputs if not isinstance(v, Weight)]


def _interface(scope: Scope) -> tuple[list[AnyValue], list[AnyValue], list[str]]:
    inputs, outputs = _callable_inputs(scope), list(scope.outputs)
    return inputs, outputs, [v.name for v in (*inputs, *outputs)]


def _definitions(rule: str, scope: Scope) -> dict[str, AnyValue]:
    """The values of a scope by name: weights, inputs, and what its nodes compute."""
    found: dict[str, AnyValue] = {}
    for value in [*scope.weights, *_callable_inputs(scope)]:
        if value.name in found:
            raise _broken(rule, scope, f"the name '{value.name}' is used twice")
        found[value.name] = value
    for node in scope.nodes:
        for value in node.outputs:
            if len(value.inputs) != 1 or value.inputs[0] is not node:
                raise _broken(rule, scope, f"'{value.name}' does not know its producer")
            if value.name in found:
                raise _broken(rule, scope, f"'{value.name}' has two producers")
            if value.name:
                found[value.name] = value
    return found


def _check_visible(
    rule: str, value: AnyValue, scope: Scope, defined: dict[Scope, dict[str, AnyValue]]
) -> None:
    """A name must mean, where it is used, the value that is linked there."""
    around: Scope | None = scope
    while around is not None:
        meant = defined[around].get(value.name)
        if meant is value:
            return
        if meant is not None:
            raise _broken(rule, scope, f"'{value.name}' is hidden by another value of this name")
        around = around.parent
    raise _broken(rule, scope, f"nothing produces '{value.name}'")


def _first_unsorted(scope: Scope) -> AnyValue | None:
    """The first value that is read, here or in a body, before its node has run."""
    done: set[Node] = set()
    for node in scope.nodes:
        for value in reads(node):
            producer = value.inputs[0] if value.inputs else None
            if producer is not None and producer.scope is scope and producer not in done:
                return value
        done.add(node)
    return None


def checker_complaint(stored: Stored) -> str | None:
    """What onnx.checker, with shape inference, has against a model; None if nothing.

    The payloads stay where they are: a weight of the main graph, be it an initializer or a
    Constant node, is shown to the checker as an input of its type.
    Source: onnx.checker.check_model(full_check=True).
    """
    copy = stored.small()
    _set_aside(copy)
    inputs = {i.name for i in copy.graph.input}
    light = []
    for tensor in copy.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            light.append(tensor)
        elif tensor.name not in inputs:
            info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            copy.graph.input.append(info)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(light)
    nodes = [(node, _large_constant(node)) for node in copy.graph.node]
    for node, value in nodes:
        if value is not None:
            info = onnx.helper.make_tensor_value_info(node.output[0], value.data_type, value.dims)
            copy.graph.input.append(info)
    del copy.graph.node[:]
    copy.graph.node.extend(node for node, value in nodes if value is None)
    for tensor in tensors(copy):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            size = payload_size(tensor)
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = bytes(size)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except Exception as error:
        return " ".join(str(error).split())
    return None


def _set_aside(model: onnx.ModelProto) -> None:
    """Move onnxruntime's operators out of ONNX's domain, where the checker does not know them."""
    scopes: list[tuple[Any, list[onnx.NodeProto]]] = [(model, list(_nodes(model.graph)))]
    scopes += [(f, list(_nodes(f))) for f in model.functions]
    for scope, nodes in scopes:
        opset = next((o.version for o in scope.opset_import if o.domain in ("", "ai.onnx")), 1)
        unknown = {op for op in RUNTIME_OPERATORS if not onnx.defs.has(op, opset, "")}
        moved = [n for n in nodes if n.op_type in unknown and n.domain in ("", "ai.onnx")]
        for node in moved:
            node.domain = "com.microsoft"
        if moved and all(o.domain != "com.microsoft" for o in scope.opset_import):
            scope.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
            if scope is not model and all(o.domain != "com.microsoft" for o in model.opset_import):
                model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(body)


def _large_constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node whose payload is elsewhere."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    if len(node.output) != 1 or len(node.attribute) != 1 or not node.attribute[0].HasField("t"):
        return None
    tensor = node.attribute[0].t
    return tensor if tensor.data_location == onnx.TensorProto.EXTERNAL else None
