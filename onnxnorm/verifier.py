"""The invariants that every pass must keep, checked after every pass that changed something.

1. Every value has one producer; names are unique in a scope and visible where they are used.
2. Every input is a graph input, a weight, a value of an outer scope, or is produced earlier.
3. Links between nodes and values agree in both directions, by identity.
4. Inputs and outputs of every scope are those of the file: names, order, identity.
5. Every new operator exists in its domain at the imported version, with this many inputs.
6. Nothing that shape inference knew of a surviving value is contradicted.
"""

from __future__ import annotations

import onnx

from onnxnorm.errors import VerificationError
from onnxnorm.facts import AnyValue, Facts, Type
from onnxnorm.module import Module, Node, Scope, Weight


class Verifier:
    """Knows a module as it was, and checks it as it is.

    Args:
        module: The module, before any pass.
    """

    def __init__(self, module: Module) -> None:
        self._module = module
        self._interface = {
            scope.path: ([v.name for v in _callable_inputs(scope)], [v.name for v in scope.outputs])
            for scope in module.scopes
        }
        self._sorted = {scope.path: _first_unsorted(scope) is None for scope in module.scopes}
        self._types: dict[tuple[str, str], Type] | None = None

    def remember_types(self, facts: Facts) -> None:
        """Take the types to compare with; asked for before the first commit."""
        if self._types is None:
            self._types = facts.types

    def check(self, rule: str) -> None:
        """Check every invariant.

        Raises:
            VerificationError: The pass `rule` broke one.
        """
        for scope in self._module.scopes:
            self._structure(rule, scope)
            if scope.touched:
                for node in scope.nodes:
                    if node.site:
                        self._schema(rule, node)
        if self._types is not None:
            self._contradictions(rule, Facts(self._module))

    def _structure(self, rule: str, scope: Scope) -> None:
        names: set[str] = set()
        for value in [*scope.weights, *(v for v in scope.inputs if not isinstance(v, Weight))]:
            if value.name in names:
                raise _broken(rule, scope, f"the name '{value.name}' is used twice")
            names.add(value.name)
        for node in scope.nodes:
            for value in node.outputs:
                if not value.name:
                    continue
                if value.name in names:
                    raise _broken(rule, scope, f"'{value.name}' has two producers")
                names.add(value.name)
                if len(value.inputs) != 1 or value.inputs[0] is not node:
                    raise _broken(rule, scope, f"'{value.name}' does not know its producer")
            for value in node.inputs:
                if not any(reader is node for reader in value.outputs):
                    raise _broken(rule, scope, f"'{value.name}' does not know its reader")
        now = ([v.name for v in _callable_inputs(scope)], [v.name for v in scope.outputs])
        if now != self._interface[scope.path]:
            raise _broken(rule, scope, "the inputs or outputs are not those of the file")
        alive = set(scope.nodes)
        for node in scope.nodes:
            for value in node.inputs:
                if value.name and value.scope is scope:
                    producer = value.inputs[0] if value.inputs else None
                    if producer is None and value.name not in names:
                        raise _broken(rule, scope, f"nothing produces '{value.name}'")
                    if producer is not None and producer not in alive:
                        raise _broken(rule, scope, f"the producer of '{value.name}' is gone")
        late = _first_unsorted(scope)
        if late is not None and self._sorted[scope.path]:
            raise _broken(rule, scope, f"'{late.name}' is read before it is computed")

    def _schema(self, rule: str, node: Node) -> None:
        domain = node.domain or ""
        version = node.scope.opsets.get(domain)
        if version is None:
            raise _broken(rule, node.scope, f"{node.op} is of a domain that is not imported")
        if not onnx.defs.has(node.op, version, domain):
            if domain == "":
                raise _broken(rule, node.scope, f"{node.op} does not exist in opset {version}")
            return
        schema = onnx.defs.get_schema(node.op, version, domain)
        if not schema.min_input <= len(node.inputs) <= schema.max_input:
            raise _broken(rule, node.scope, f"{node.op} takes no {len(node.inputs)} inputs")
        for name in node.attrs:
            if name not in schema.attributes:
                raise _broken(rule, node.scope, f"{node.op} has no attribute '{name}'")

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


def _first_unsorted(scope: Scope) -> AnyValue | None:
    """The first value that is read, here or in a body, before its node has run."""
    done: set[Node] = set()
    for node in scope.nodes:
        frontier = [node]
        while frontier:
            at = frontier.pop()
            late: AnyValue
            for late in at.inputs:
                producer = late.inputs[0] if late.inputs else None
                if producer is not None and producer.scope is scope and producer not in done:
                    return late
            for _, _, body in at.bodies:
                frontier += body.nodes
        done.add(node)
    return None
