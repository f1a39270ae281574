"""Temporary copies of a model that parity runs beside the model itself.

* `exposing`: some inner values are outputs as well.
* `frozen`: the outputs of random operators are inputs, so that two models draw the same.
* `nudged`: every weight is one ulp away, up or down by chance.
* `extracted`: only what lies between some values.
* `forced`: an If takes a branch, or a Loop runs, that no input leads to.

Each returns a `Stored` over the payloads of the original, so nothing is copied until it is saved.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx

from onnxnorm import storage
from onnxnorm.errors import UsageError
from onnxnorm.float64 import Array, is_float_dtype
from onnxnorm.module import RANDOM
from onnxnorm.truth import draw, names_read, subgraphs

# A weight that one of these reads may be off by an ulp; elsewhere it may be an exponent, a scale
# of a resize or a bound, where an ulp is not a rounding error but another model.
_NUDGED_READERS: Final = frozenset(
    {
        "Add",
        "BatchNormalization",
        "Conv",
        "ConvTranspose",
        "Div",
        "Gather",
        "Gemm",
        "GroupNormalization",
        "GRU",
        "InstanceNormalization",
        "LayerNormalization",
        "LSTM",
        "MatMul",
        "Mul",
        "PRelu",
        "RMSNormalization",
        "RNN",
        "Sub",
    }
)
_NUDGED_BYTES: Final = 1 << 26  # weights beyond this are left alone: the copy is held in memory


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield every node: main graph, nested graphs and functions."""

    def walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            yield node
            for graph in subgraphs(node):
                yield from walk(graph.node)

    yield from walk(model.graph.node)
    for function in model.functions:
        yield from walk(function.node)


def _copy(stored: storage.Stored) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(stored.proto)
    return proto


def exposing(stored: storage.Stored, names: Sequence[str]) -> storage.Stored:
    """Return the model with further values of its main graph as outputs, untyped."""
    proto = _copy(stored)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in dict.fromkeys(names) if name not in known
    )
    return stored.with_proto(proto)


# --- random operators --------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomNode:
    """A random operator of the main graph.

    Attributes:
        op_type: The operator.
        output: The value it draws.
        inputs: The values it reads.
        attributes: Its attributes.
        seed: Seeds the draw, together with the value's name.
    """

    op_type: str
    output: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    def draw(self, like: Array, inputs: Sequence[Array], seed: Sequence[int]) -> Array:
        """Return a draw with the shape and dtype of `like`, which a run has produced."""
        rng = np.random.default_rng([*seed, zlib.crc32(self.output.encode())])
        if self.op_type == "Dropout":
            ratio = float(inputs[1]) if len(inputs) > 1 else 0.5
            keep = (rng.random(like.shape) >= ratio) / (1.0 - ratio if ratio < 1.0 else 1.0)
            return keep.astype(like.dtype)
        shape = like.shape if self.op_type.startswith("Random") else None
        wide = [v.astype(np.float64) if is_float_dtype(v.dtype) else v for v in inputs]
        return draw(self.op_type, self.attributes, wide, rng, shape).astype(like.dtype)


def random_nodes(stored: storage.Stored) -> list[RandomNode]:
    """Return the random operators of the main graph, Dropout in training mode among them."""
    constants = _true_constants(stored)
    found = []
    for node in stored.proto.graph.node:
        training = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] in constants
        if node.domain in {"", "ai.onnx"} and (node.op_type in RANDOM or training):
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            inputs = tuple(name for name in node.input[:2] if name)
            found.append(RandomNode(node.op_type, node.output[0], inputs, attributes))
    return found


def hidden_random_nodes(stored: storage.Stored) -> int:
    """Count random operators that no copy can freeze: those in nested graphs and functions."""
    everywhere = sum(node.op_type in RANDOM for node in all_nodes(stored.proto))
    return everywhere - sum(node.op_type in RANDOM for node in stored.proto.graph.node)


def _true_constants(stored: storage.Stored) -> set[str]:
    tensors = {tensor.name: tensor for tensor in stored.proto.graph.initializer}
    for node in stored.proto.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    tensors[node.output[0]] = attribute.t
    return {
        name
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.BOOL and bool(stored.array(tensor).all())
    }


def frozen(stored: storage.Stored, draws: Mapping[str, Array]) -> storage.Stored:
    """Return the model with the named random values as inputs instead of drawn.

    Args:
        stored: The model.
        draws: One draw of each, for its dtype, by the name of the input that will carry it
            (`frozen_feed_name`); names of no random node of this model are ignored.
    """
    proto = _copy(stored)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        name = node.output[0] if node.output else ""
        given = f"{name}_kept" if node.op_type == "Dropout" else name
        if given not in draws or node.op_type not in {*RANDOM, "Dropout"}:
            nodes.append(node)
            continue
        like = draws[given]
        elem_type = onnx.helper.np_dtype_to_tensor_dtype(like.dtype)
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info(given, elem_type, [None] * like.ndim)
        )
        if node.op_type == "Dropout":
            nodes.append(onnx.helper.make_node("Mul", [node.input[0], given], [name]))
            if len(node.output) > 1 and node.output[1]:
                to = onnx.TensorProto.BOOL
                nodes.append(onnx.helper.make_node("Cast", [given], [node.output[1]], to=to))
    kept = [_node_copy(node) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return stored.with_proto(proto)


def frozen_feed_name(node: RandomNode) -> str:
    """Return the input that carries a node's draw in a frozen model."""
    return f"{node.output}_kept" if node.op_type == "Dropout" else node.output


def _node_copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    return copy


# --- one ulp away ------------------------------------------------------------------------------


def nudge(array: Array, rng: np.random.Generator) -> Array:
    """Return an array whose finite, non-zero elements are one ulp up or down, by chance."""
    if array.dtype not in (np.float16, np.float32, np.float64):
        return array
    target = np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype)
    moved = np.nextafter(array, target)
    return np.where(np.isfinite(array) & np.isfinite(moved) & (array != 0), moved, array)


def nudged(stored: storage.Stored, seed: int) -> storage.Stored:
    """Return the model with its weights one ulp away, as folding may round them."""
    rng = np.random.default_rng(seed)
    proto = _copy(stored)
    readers: dict[str, set[str]] = {}
    for node in all_nodes(proto):
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    room = _NUDGED_BYTES
    for tensor in proto.graph.initializer:
        used_by = readers.get(tensor.name, set())
        size = storage.payload_size(tensor)
        if not used_by or not used_by <= _NUDGED_READERS or size > room:
            continue
        array = stored.array(tensor)
        if array.size < 2 or np.array_equal(array, np.rint(array.astype(np.float64))):
            continue
        moved = nudge(array, rng)
        if moved is array:
            continue
        room -= size
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(moved), tensor.name))
    return stored.with_proto(proto)


# --- branches that no input takes -------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """A body of a control-flow node.

    Attributes:
        op_type: If, Loop, Scan or SequenceMap.
        node: The node's first output.
        name: The attribute that holds the body: "then_branch", "else_branch" or "body".
        nested: Whether the node itself stands in a body.
    """

    op_type: str
    node: str
    name: str
    nested: bool

    def __str__(self) -> str:
        """Return what it is called in a sentence."""
        return f"the {self.name.replace('_', ' ')} of {self.op_type} '{self.node}'"


def bodies(stored: storage.Stored) -> list[Body]:
    """Return the bodies that some input might lead to, those in functions left out.

    The branch that a constant condition never takes is none.
    """
    graph = stored.proto.graph
    producers = {name: node for node in graph.node for name in node.output if name}
    weights = {tensor.name for tensor in graph.initializer}
    given = {value.name for value in graph.input} - weights
    found: list[Body] = []

    def varies(name: str) -> bool:
        pending, seen = [name], set[str]()
        while pending:
            name = pending.pop()
            if name in seen:
                continue
            seen.add(name)
            if name in given:
                return True
            if name in producers:
                if producers[name].op_type in RANDOM:
                    return True
                pending += names_read(producers[name])
        return False

    def walk(nodes: Iterable[onnx.NodeProto], *, nested: bool) -> None:
        for node in nodes:
            named = [a for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
            fixed = node.op_type == "If" and not nested and not varies(node.input[0])
            for attribute in named:
                if not fixed:
                    found.append(Body(node.op_type, _first(node), attribute.name, nested))
                    walk(attribute.g.node, nested=True)

    walk(graph.node, nested=False)
    return found


def _first(node: onnx.NodeProto) -> str:
    return next((name for name in node.output if name), "")


def forced(stored: storage.Stored, body: Body) -> storage.Stored | None:
    """Return the model that enters a body, whatever its inputs are: a Loop's is run once.

    None where there is no such node, or nothing in its inputs that leads there.
    """
    if body.nested or body.op_type not in {"If", "Loop"}:
        return None
    proto = _copy(stored)
    for node in proto.graph.node:
        if node.op_type == body.op_type and _first(node) == body.node:
            break
    else:
        return None
    if body.op_type == "If":
        given = [np.array(body.name == "then_branch")]
    else:
        given = [np.array(1, dtype=np.int64), np.array(True)]
    names = [f"{body.node}/{body.name}/{index}" for index in range(len(given))]
    node.input[:] = [*names, *node.input[len(names) :]]
    constants = [
        onnx.helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(value))
        for name, value in zip(names, given, strict=True)
    ]
    kept = [*constants, *(_node_copy(node) for node in proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    return stored.with_proto(proto)


# --- parts of a model --------------------------------------------------------------------------


def extracted(
    stored: storage.Stored,
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, tuple[int, tuple[int | None, ...] | None]],
) -> storage.Stored:
    """Return the model that computes `outputs` from `inputs`.

    Args:
        stored: The model.
        inputs: Values that become graph inputs. Graph inputs that are still needed stay inputs.
        outputs: Values that become graph outputs.
        types: Element type and shape of the inputs by name.

    Raises:
        UsageError: A value does not exist, or the type of an input is not known.
    """
    source = stored.proto
    producers = {name: node for node in source.graph.node for name in node.output if name}
    weights = {tensor.name: tensor for tensor in source.graph.initializer}
    graph_inputs = {value.name: value for value in source.graph.input}
    stop, needed, chosen = set(inputs), list(outputs), set()
    used: dict[str, None] = {}
    while needed:
        name = needed.pop()
        if name in used:
            continue
        used[name] = None
        if name in stop or name not in producers:
            continue
        node = producers[name]
        if id(node) not in chosen:
            chosen.add(id(node))
            needed.extend(sorted(names_read(node)))
    for name in outputs:
        if name not in producers and name not in graph_inputs and name not in weights:
            raise UsageError(f"the model has no value '{name}'", "Name a value of the model.")
    graph = onnx.GraphProto(name=source.graph.name or "part")
    graph.node.extend(node for node in source.graph.node if id(node) in chosen)
    inner = {name for node in graph.node for name in node.output}
    for name in used:
        if name in inner:
            continue
        if name in weights and name not in stop:
            graph.initializer.append(weights[name])
        elif name in stop or name in graph_inputs:
            graph.input.append(_typed(name, graph_inputs.get(name), types))
    for sparse in source.graph.sparse_initializer:
        if sparse.values.name in used:
            graph.sparse_initializer.append(sparse)
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    proto = onnx.ModelProto(
        ir_version=source.ir_version,
        graph=graph,
        opset_import=source.opset_import,
        functions=source.functions,
    )
    return stored.with_proto(proto)


def _typed(
    name: str,
    declared: onnx.ValueInfoProto | None,
    types: Mapping[str, tuple[int, tuple[int | None, ...] | None]],
) -> onnx.ValueInfoProto:
    elem_type, shape = types.get(name, (0, None))
    if elem_type:
        return onnx.helper.make_tensor_value_info(name, elem_type, shape)
    if declared is not None:
        return declared
    raise UsageError(
        f"the type of value '{name}' is not known",
        "Give --input-shape, so that shape inference can reach it.",
    )
