"""Another opset for a model, node by node, so that nothing is lost on the way.

    opset N: every node whose operator has one definition in both opsets, or was only given further
    types and attributes, stays as it is; what an older opset only spells otherwise is respelled;
    every other one goes through onnx.version_converter in a model of its own

`onnx.version_converter` on a whole model drops model-local functions and the metadata of nodes, and
needs the weights in memory. Here it sees one node, and the constants it reads where they are small.
Names of values stay; what the converter adds gets names of its own. Bodies of control flow and
model-local functions are converted as the main graph is. What comes out has to satisfy onnx.checker
node by node wherever the node did before, so that no attribute and no type is left that the other
opset does not know.

Source: the operator schemas of ONNX, whose `since_version` says when a definition changed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import helper

from onnxnorm import older
from onnxnorm.errors import UsageError
from onnxnorm.facts import AnyValue, Facts
from onnxnorm.lowering import Version, newest_opset
from onnxnorm.module import SITE_KEY, Module, Node, Scope, Value, Weight
from onnxnorm.ops import bodies
from onnxnorm.storage import Array, Stored
from onnxnorm.wellformed import STANDARD_DOMAINS

OLDEST: Final = 7  # what the converter knows of before that is little, and onnxruntime less
_SMALL: Final = 1 << 16  # bytes of a constant that a converter may want to read
# Since these, control flow has only been given further types.
_SETTLED: Final = {"If": 11, "Loop": 11, "Scan": 9, "SequenceMap": 17}


@dataclass(frozen=True)
class Converted:
    """A model of another opset.

    Attributes:
        stored: The model.
        before: Its opset as given.
        changed: Labels of the nodes that were written anew.
    """

    stored: Stored
    before: int
    changed: tuple[str, ...]

    @property
    def note(self) -> str:
        """What was done, as a sentence."""
        now = next(o.version for o in self.stored.proto.opset_import if _standard(o.domain))
        number = len(self.changed)
        nodes = f"{number} node{'' if number == 1 else 's'}"
        return f"The opset was changed from {self.before} to {now}; {nodes} had to be written anew."


def convert(stored: Stored, opset: int, target: str, runtime: Version) -> Converted:
    """A model in another opset.

    Args:
        stored: The model.
        opset: The version of ONNX's own domain that is wanted.
        target: What the model is for; for onnxruntime it has to load the opset.
        runtime: The onnxruntime that it is for.

    Raises:
        UsageError: There is no such opset, the runtime does not load it, or a node cannot be
            converted; the message names it.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise UsageError(
            f"--opset {opset} is not one that can be converted to",
            f"Use {OLDEST} to {newest}, which the installed onnx knows.",
        )
    if target != "onnx" and opset > newest_opset(runtime):
        raise UsageError(
            f"--opset {opset} is newer than onnxruntime {'.'.join(map(str, runtime))} loads",
            f"Use {newest_opset(runtime)} or less, or give a newer --runtime-version.",
        )
    module = Module(stored)
    before = module.main.opsets.get("")
    if before is None:
        raise UsageError(
            "--opset was given for a model that imports no operators of ai.onnx",
            "Leave it out: there is nothing to convert.",
        )
    facts = Facts(module)
    work = _Work(module, facts, opset)
    # All is decided before anything is changed: facts are those of the model as given.
    plans = [
        (scope, [(node, work.plan(node)) for node in scope.nodes])
        for scope in module.scopes
        if not scope.is_ours
    ]
    for scope, decided in plans:
        work.apply(scope, decided)
    proto = onnx.ModelProto()
    proto.CopyFrom(module.export().proto)
    _import(proto, opset)
    for function in proto.functions:
        if function.domain == bodies.DOMAIN and function.name in bodies.OPERATORS:
            function.CopyFrom(bodies.function(function.name, opset))
        else:
            _import(function, opset)
    _raise_ir_version(proto)
    return Converted(module.stored.with_proto(proto), before, tuple(work.changed))


@functools.cache
def _same_form(op: str, old: int, new: int) -> bool:
    """Whether an operator was only given further types from one opset to a newer one.

    Its inputs, outputs and attributes are then the same, with the same defaults, in every version
    between, but for attributes that change nothing when absent.
    """
    steps = [onnx.defs.get_schema(op, v, "") for v in range(old, new + 1)]
    return not any(s.deprecated for s in steps) and all(
        _signature(a) == _signature(b) for a, b in itertools.pairwise(steps)
    )


def _signature(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    def said(values: Sequence[onnx.defs.OpSchema.FormalParameter]) -> list[object]:
        return [(v.name, v.option, v.is_homogeneous, v.min_arity) for v in values]

    attributes = {
        name: (a.type, a.required, a.default_value.SerializeToString())
        for name, a in schema.attributes.items()
        if name not in older.added(schema.name)
    }
    counts = (schema.min_input, schema.max_input, schema.min_output, schema.max_output)
    return said(schema.inputs), said(schema.outputs), sorted(attributes.items()), counts


def _first(op: str) -> int:
    """The oldest opset that has an operator."""
    known = onnx.defs.onnx_opset_version()
    return next(v for v in range(1, known + 1) if onnx.defs.has(op, v, ""))


def _complaint(model: onnx.ModelProto) -> str | None:
    """What onnx.checker has against a model of one node."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # the C++ side raises several unrelated types
        return " ".join(str(error).split())
    return None


def _standard(domain: str) -> bool:
    return domain in STANDARD_DOMAINS


def _import(owner: onnx.ModelProto | onnx.FunctionProto, opset: int) -> None:
    for each in owner.opset_import:
        if _standard(each.domain):
            each.version = opset


def _raise_ir_version(proto: onnx.ModelProto) -> None:
    """Let the IR version be one that has the opset; before version 4 weights are inputs too."""
    known = [o for o in proto.opset_import if _standard(o.domain)]
    needed = helper.find_min_ir_version_for(known, ignore_unknown=True)
    if proto.ir_version >= needed:
        return
    if proto.ir_version < 4:
        weights = {t.name for t in proto.graph.initializer}
        kept = [i for i in proto.graph.input if i.name not in weights]
        del proto.graph.input[:]
        proto.graph.input.extend(kept)
    proto.ir_version = needed


@dataclass
class _Plan:
    """What takes the place of one node."""

    nodes: list[onnx.NodeProto]
    constants: list[onnx.TensorProto]


class _Work:
    """The conversion of one module."""

    def __init__(self, module: Module, facts: Facts, opset: int) -> None:
        self.module = module
        self.facts = facts
        self.opset = opset
        self.changed: list[str] = []

    def plan(self, node: Node) -> _Plan | None:
        """What a node becomes; None where it stays."""
        old = node.scope.opsets[""] if not node.domain else 0
        if node.domain or old == self.opset or not onnx.defs.has(node.op, old, ""):
            return None  # what is no operator of ONNX is one of onnxruntime's own
        before = onnx.defs.get_schema(node.op, old, "")
        if not onnx.defs.has(node.op, self.opset, ""):
            raise _cannot(node, self.opset, f"there is no {node.op} before {_first(node.op)}")
        after = onnx.defs.get_schema(node.op, self.opset, "")
        if before.since_version == after.since_version:
            return None
        if node.bodies:
            if min(old, self.opset) < _SETTLED.get(node.op, self.opset + 1):
                raise _cannot(node, self.opset, "its bodies are of another form there")
            if self.opset < old:
                self._has_types(node, [node.proto_now()])
            return None
        same = _same_form(node.op, *sorted((old, self.opset)))
        if self.opset > old:
            return None if same else self._converted(node, old)
        if same or node.op in older.COMPLETE:
            known = older.Known(self._arrays(node), self._shapes(node))
            now = node.proto_now()
            spelled = older.respelled(now, old, self.opset, known)
            if isinstance(spelled, older.Unsaid):
                raise _cannot(node, self.opset, spelled.reason)
            if self._has_types(node, spelled):
                stays = spelled[0] is now
                return None if stays else self._checked(node, old, list(spelled), [])
        return self._converted(node, old)

    def _has_types(self, node: Node, spelled: Sequence[onnx.NodeProto]) -> bool:
        """Whether the other opset has its operators for the types of a node; False if unknown.

        Args:
            node: The node as it is.
            spelled: What it is to be, of the same values.

        Raises:
            UsageError: It has not.
        """
        types = {v.name: self.facts.type(v) for v in (*node.inputs, *node.outputs) if v.name}
        for each in spelled:
            schema = onnx.defs.get_schema(each.op_type, self.opset, "")
            allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
            bound: dict[str, str] = {}
            for formal, names in ((schema.inputs, each.input), (schema.outputs, each.output)):
                for place, name in enumerate(names):
                    if name not in types:
                        continue  # absent, or between the nodes
                    known = types[name]
                    if known is None or not known.element or not formal:
                        return False
                    parameter = formal[min(place, len(formal) - 1)]
                    element = onnx.TensorProto.DataType.Name(known.element).lower()
                    found, wanted = f"tensor({element})", parameter.type_str
                    one = bound.setdefault(wanted, found) if parameter.is_homogeneous else found
                    if found not in allowed.get(wanted, {wanted}) or found != one:
                        raise _cannot(node, self.opset, f"it is not defined for {element} there")
        return True

    def _converted(self, node: Node, old: int) -> _Plan:
        from onnx import version_converter  # slow to import, and rarely needed

        if node.parametric:
            reason = "an attribute of it is a parameter of the model-local function"
            raise _cannot(node, self.opset, reason)
        before = self._alone(node, [node.proto_now()], [], old)
        try:
            made = version_converter.convert_version(before, self.opset)
        except Exception as error:  # the C++ side raises several unrelated types
            raise _cannot(node, self.opset, _reason(error)) from error
        nodes = list(made.graph.node)
        known = {t.name for t in before.graph.initializer}
        constants = [t for t in made.graph.initializer if t.name not in known]
        produced = {name for n in nodes for name in n.output}
        if not {v.name for v in node.outputs if v.name} <= produced:
            raise _cannot(node, self.opset, "the converter leaves one of its outputs out")
        for each in nodes:
            for attribute in each.attribute:
                if attribute.ref_attr_name:
                    raise _cannot(node, self.opset, "the converter refers to an attribute")
        self._retype_limits(node, nodes, constants)
        if node.op == "GroupNormalization" and old < self.opset:
            constants += self._per_channel(node, nodes)
        return self._checked(node, old, nodes, constants)

    def _retype_limits(
        self, node: Node, nodes: Sequence[onnx.NodeProto], constants: Sequence[onnx.TensorProto]
    ) -> None:
        """Give the limits of a Clip its type; of attributes the converter makes float32."""
        known = self.facts.type(node.inputs[0]) if node.op == "Clip" else None
        if known is None or known.element not in (
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.DOUBLE,
        ):
            return
        made = [a.t for n in nodes if n.op_type == "Constant" for a in n.attribute]
        for tensor in (*made, *constants):
            array = onnx.numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):  # the largest float32 is no limit for float16
                array = array.astype(helper.tensor_dtype_to_np_dtype(known.element))
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))

    def _per_channel(self, node: Node, nodes: Sequence[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """Give a group norm of opset 21 on its scale and bias, which the converter leaves.

        They have a number for each channel there, and for each group before; and float64 is
        computed in float32 unless the node says otherwise.
        """
        groups, known = node.attrs["num_groups"], self.facts.type(node.inputs[0])
        channels = known.shape[1] if known is not None and known.shape else None
        if known is None or not isinstance(channels, int):
            raise _cannot(node, self.opset, "the number of its channels is not known")
        made = []
        for role, value in zip(("scale", "bias"), node.inputs[1:], strict=True):
            constant = self.facts.constant(value)
            if constant is None:
                raise _cannot(node, self.opset, f"its {role} is not constant")
            array = np.repeat(constant.array(), channels // groups)
            made.append(onnx.numpy_helper.from_array(array, f"{role}_of_channels"))
        for each in nodes:
            if each.op_type == node.op:
                each.input[1:] = [tensor.name for tensor in made]
                if known.element == onnx.TensorProto.DOUBLE:
                    each.attribute.append(helper.make_attribute("stash_type", known.element))
        return made

    def _checked(
        self,
        node: Node,
        old: int,
        nodes: list[onnx.NodeProto],
        constants: list[onnx.TensorProto],
    ) -> _Plan:
        """What a node becomes, if it is valid where the node was.

        Raises:
            UsageError: It is not.
        """
        for each in nodes:
            schema = onnx.defs.get_schema(each.op_type, self.opset, each.domain)
            for attribute in each.attribute:
                if attribute.name not in schema.attributes:
                    reason = f"{each.op_type} has no attribute {attribute.name} there"
                    raise _cannot(node, self.opset, reason)
        complaint = _complaint(self._alone(node, nodes, constants, self.opset))
        if complaint is not None:
            before = self._alone(node, [node.proto_now()], [], old)
            if _complaint(before) is None:
                raise _cannot(node, self.opset, complaint)
        return _Plan(nodes, constants)

    def _alone(
        self,
        node: Node,
        nodes: Sequence[onnx.NodeProto],
        constants: Sequence[onnx.TensorProto],
        opset: int,
    ) -> onnx.ModelProto:
        """A model of a node alone, or of what it becomes, with the small constants it reads."""
        inputs, held = [], list(constants)
        for value in dict.fromkeys(v for v in node.inputs if v.name):
            tensor = self._small(value)
            if tensor is not None:
                held.append(tensor)
            else:
                inputs.append(self._info(value))
        outputs = [self._info(v) for v in node.outputs if v.name]
        bare = []
        for each in nodes:
            bare.append(onnx.NodeProto())
            bare[-1].CopyFrom(each)
            bare[-1].domain = ""
            del bare[-1].metadata_props[:]
        graph = helper.make_graph(bare, "one", inputs, outputs, held)
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )

    def _arrays(self, node: Node) -> Callable[[str], Array | None]:
        constants = {v.name: self.facts.constant(v) for v in node.inputs if v.name}

        def array(name: str) -> Array | None:
            constant = constants.get(name)
            return None if constant is None or constant.nbytes > _SMALL else constant.array()

        return array

    def _shapes(self, node: Node) -> Callable[[str], tuple[int | str | None, ...] | None]:
        types = {v.name: self.facts.type(v) for v in (*node.inputs, *node.outputs) if v.name}

        def shape(name: str) -> tuple[int | str | None, ...] | None:
            known = types.get(name)
            return None if known is None else known.shape

        return shape

    def _small(self, value: AnyValue) -> onnx.TensorProto | None:
        constant = self.facts.constant(value)
        if constant is None or constant.nbytes > _SMALL:
            return None
        return onnx.numpy_helper.from_array(constant.array(), value.name)

    def _info(self, value: AnyValue) -> onnx.ValueInfoProto:
        known = self.facts.type(value)
        if known is None:
            return helper.make_tensor_value_info(value.name, onnx.TensorProto.UNDEFINED, None)
        return helper.make_tensor_value_info(value.name, known.element, known.shape)

    def apply(self, scope: Scope, decided: Sequence[tuple[Node, _Plan | None]]) -> None:
        """Put what nodes became in their places."""
        if all(plan is None for _, plan in decided):
            return
        nodes: list[Node] = []
        for node, plan in decided:
            if plan is None:
                nodes.append(node)
            else:
                nodes += self._placed(scope, node, plan)
                self.changed.append(f"{node.op} {node.label}")
        scope.graph.nodes[:] = nodes
        scope.touch()

    def _placed(self, scope: Scope, node: Node, plan: _Plan) -> list[Node]:
        values: dict[str, AnyValue] = {v.name: v for v in (*node.inputs, *node.outputs) if v.name}
        results, first = list(node.outputs), node.outputs[0].name
        node.inputs.clear()
        node.outputs.clear()
        placed: list[Node] = []
        for tensor in plan.constants:
            name = self.module.fresh_name(f"{first}_{tensor.name}")
            known, tensor.name = tensor.name, name
            if scope.is_function:
                constant = Value(name, scope)
                tensor.name = ""
                proto = helper.make_node("Constant", [], [name], value=tensor)
                placed.append(Node(proto, scope, [], [constant], f"opset:{first}"))
                values[known] = constant
            else:
                values[known] = weight = Weight(tensor, scope, self.module.stored)
                scope.weights[weight] = None
            scope.values[name] = values[known]
        for proto in plan.nodes:
            for name in proto.output:
                if name and name not in values:
                    made = Value(self.module.fresh_name(f"{first}_{name}"), scope)
                    scope.values[made.name] = values[name] = made
            _keep(node.proto, proto, last=any(v.name in proto.output for v in results if v.name))
            inputs = [values[n] if n else Value("", scope) for n in proto.input]
            made_here = [values[n] if n else Value("", scope) for n in proto.output]
            outputs = [v for v in made_here if isinstance(v, Value)]
            placed.append(Node(proto, scope, inputs, outputs, f"opset:{first}"))
        return placed


def _keep(before: onnx.NodeProto, after: onnx.NodeProto, *, last: bool) -> None:
    """Let the node that computes what the old one did have what was said of that."""
    if not last:
        after.name = ""
        return
    after.name, after.doc_string = before.name, before.doc_string
    del after.metadata_props[:]
    after.metadata_props.extend(e for e in before.metadata_props if e.key != SITE_KEY)


def _cannot(node: Node, opset: int, reason: str) -> UsageError:
    return UsageError(
        f"--opset {opset}: {node.op} '{node.label}' cannot be converted: {reason}",
        "Use another opset, or export the model at this one.",
    )


def _reason(error: Exception) -> str:
    """The last clause of what the converter says, without its source lines."""
    text = " ".join(str(error).split())
    return text.rpartition("failed: ")[2].strip() or type(error).__name__
