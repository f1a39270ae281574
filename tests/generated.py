"""Models that carry every kind of field, for tests that nothing of it is lost.

A model is a pure function of its seed. It has the structure of a model (every value has one
producer, every input is defined), and otherwise whatever the format allows: operators that do not
exist, values that mean nothing, fields of the future.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, Final

import onnx
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    SparseTensorProto,
    TensorProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from onnxnorm.wire import INLINE_LIMIT, REFERENCE_KEY

DOMAINS: Final = ("", "com.example", "com.example.unknown")
TYPES: Final = tuple(v for k, v in TensorProto.DataType.items() if k != "UNDEFINED")
BITS: Final[dict[int, int]] = {
    TensorProto.UINT2: 2,
    TensorProto.INT2: 2,
    TensorProto.UINT4: 4,
    TensorProto.INT4: 4,
    TensorProto.FLOAT4E2M1: 4,
    TensorProto.FLOAT6E2M3: 6,
    TensorProto.FLOAT6E3M2: 6,
}
# Which of the typed fields holds the elements of a type that has no field of its own.
_SHARED_FIELDS: Final[dict[int, str]] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.INT64: "int64_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}
_TEXTS: Final = (
    "",
    "plain",
    "Übergröße",
    "層正規化",
    "\U0001f642",
    "a\nb\tc",
    REFERENCE_KEY,
    "x" * 300,
)


def bits(data_type: int) -> int:
    """Bits of one element."""
    return BITS.get(data_type) or helper.tensor_dtype_to_np_dtype(data_type).itemsize * 8


class Maker:
    """Makes messages; each call of a method gives another one.

    Args:
        seed: Where the random choices start.
        ir_version: Before 4 every initializer is listed as an input.
    """

    def __init__(self, seed: int, ir_version: int) -> None:
        self.rng = random.Random(seed)
        self.ir_version = ir_version

    def maybe(self, share: float = 0.5) -> bool:
        return self.rng.random() < share

    def text(self) -> str:
        return self.rng.choice(_TEXTS)

    def note(self, message: Any) -> None:
        """Fill in what nearly every message has, where this one has it, and unknown fields."""
        known = message.DESCRIPTOR.fields_by_name
        if "doc_string" in known and self.maybe():
            message.doc_string = self.text()
        if "metadata_props" in known:
            for number in range(self.rng.randrange(3)):
                message.metadata_props.add(key=f"key {number}", value=self.text())
        if self.maybe(0.3):
            self.unknown(message)

    def unknown(self, message: Any) -> None:
        """Field 3000 and the next, of each wire type, as a later version of the format may have."""
        tail = b"\xbb\x01"
        fields = [b"\xc0" + tail + b"\x07", b"\xc9" + tail + b"8 bytes."]
        fields += [b"\xca" + tail + b"\x03abc", b"\xcd" + tail + b"four"]
        message.MergeFromString(self.rng.choice(fields))

    # ** tensors and types **

    def dims(self, data_type: int) -> list[int]:
        """A shape; that of one tensor in four takes about as much as stays in a skeleton."""
        if data_type == TensorProto.STRING or self.maybe(0.75):
            return self.rng.choice([[], [0], [1], [3], [2, 3], [2, 0, 5], [5, 1, 1]])
        count = INLINE_LIMIT * 8 // bits(data_type)
        return self.rng.choice([[count], [count + 1], [count - 1], [3, 1, count], [2, count // 2]])

    def tensor(self, name: str, data_type: int | None = None) -> TensorProto:
        kind = self.rng.choice(TYPES) if data_type is None else data_type
        dims = self.dims(kind)
        count = 1
        for dim in dims:
            count *= dim
        made = TensorProto(data_type=kind, dims=dims)
        if name or self.maybe():
            made.name = name
        if kind == TensorProto.STRING:
            made.string_data.extend(self.text().encode() for _ in range(count))
        elif self.maybe(0.7):
            made.raw_data = self.rng.randbytes((count * bits(kind) + 7) // 8)
        else:
            self.typed(made, count)
        if self.maybe(0.2):
            made.data_location = TensorProto.DEFAULT
        if self.maybe(0.1):
            made.segment.begin, made.segment.end = 0, count
        self.note(made)
        return made

    def typed(self, made: TensorProto, count: int) -> None:
        field = _SHARED_FIELDS.get(made.data_type, "int32_data")
        if made.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            count *= 2
        elif made.data_type in BITS:
            count = (count * BITS[made.data_type] + 7) // 8
        target: Any = getattr(made, field)
        target.extend(self.rng.randrange(2) for _ in range(count))

    def sparse(self, name: str) -> SparseTensorProto:
        made = SparseTensorProto(dims=[3, 5])
        positions = sorted(self.rng.sample(range(15), 4))
        made.values.CopyFrom(helper.make_tensor(name, TensorProto.FLOAT, [4], [1, 2, 3, 4]))
        if self.maybe():
            made.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [4], positions))
        else:
            pairs = [i for p in positions for i in divmod(p, 5)]
            made.indices.CopyFrom(helper.make_tensor("", TensorProto.INT64, [4, 2], pairs))
        self.note(made.values)
        self.note(made)
        return made

    def type(self, depth: int = 2) -> TypeProto:
        made = TypeProto()
        kinds = ["tensor", "tensor", "sparse", "opaque", "sequence", "map", "optional"]
        kind = self.rng.choice(kinds if depth else kinds[:4])
        if kind in ("tensor", "sparse"):
            target: Any = made.tensor_type if kind == "tensor" else made.sparse_tensor_type
            target.elem_type = self.rng.choice(TYPES)
            if self.maybe(0.8):
                target.shape.SetInParent()
            for _ in range(self.rng.randrange(4) if target.HasField("shape") else 0):
                dim = target.shape.dim.add()
                if self.maybe():
                    dim.dim_value = self.rng.randrange(5)
                elif self.maybe():
                    dim.dim_param = self.rng.choice("NCHW")
                if self.maybe(0.2):
                    dim.denotation = "DATA_BATCH"
        elif kind == "opaque":
            made.opaque_type.domain, made.opaque_type.name = "com.example", "Blob"
        elif kind == "map":
            made.map_type.key_type = TensorProto.STRING
            made.map_type.value_type.CopyFrom(self.type(depth - 1))
        else:
            inner = made.sequence_type if kind == "sequence" else made.optional_type
            inner.elem_type.CopyFrom(self.type(depth - 1))
        if self.maybe(0.2):
            made.denotation = "IMAGE"
        return made

    def info(self, name: str) -> ValueInfoProto:
        made = ValueInfoProto(name=name)
        if self.maybe(0.9):
            made.type.CopyFrom(self.type())
        self.note(made)
        return made

    # ** nodes and graphs **

    def attribute(
        self, name: str, kind: int, graph: Callable[[], GraphProto] | None = None
    ) -> AttributeProto:
        made = AttributeProto(name=name, type=AttributeProto.AttributeType.Name(kind))
        some = range(self.rng.randrange(4))
        if kind == AttributeProto.FLOAT:
            made.f = self.rng.randrange(100) / 8
        elif kind == AttributeProto.INT:
            made.i = self.rng.randrange(-5, 5)
        elif kind == AttributeProto.STRING:
            made.s = self.rng.randbytes(5)
        elif kind == AttributeProto.TENSOR:
            made.t.CopyFrom(self.tensor(""))
        elif kind == AttributeProto.SPARSE_TENSOR:
            made.sparse_tensor.CopyFrom(self.sparse("s"))
        elif kind == AttributeProto.TYPE_PROTO:
            made.tp.CopyFrom(self.type())
        elif kind == AttributeProto.FLOATS:
            made.floats.extend(i / 4 for i in some)
        elif kind == AttributeProto.INTS:
            made.ints.extend(some)
        elif kind == AttributeProto.STRINGS:
            made.strings.extend(self.rng.randbytes(3) for _ in some)
        elif kind == AttributeProto.TENSORS:
            made.tensors.extend(self.tensor("") for _ in some)
        elif kind == AttributeProto.SPARSE_TENSORS:
            made.sparse_tensors.extend(self.sparse("s") for _ in some)
        elif kind == AttributeProto.TYPE_PROTOS:
            made.type_protos.extend(self.type() for _ in some)
        elif kind == AttributeProto.GRAPH and graph:
            made.g.CopyFrom(graph())
        elif kind == AttributeProto.GRAPHS and graph:
            made.graphs.extend(graph() for _ in range(2))
        self.note(made)
        return made

    def node(self, inputs: Sequence[str], outputs: Sequence[str]) -> NodeProto:
        made = NodeProto(op_type=f"Op{self.rng.randrange(4)}", input=inputs, output=outputs)
        if self.maybe(0.8):
            made.domain = self.rng.choice(DOMAINS[1:])
        elif self.maybe():
            made.domain = "ai.onnx"  # the long form of the empty domain
        if self.maybe(0.8):
            made.name = f"node of {outputs[0] if outputs else ''}"
        if self.maybe(0.3):
            made.overload = "second"
        if self.maybe(0.2):
            spec = made.device_configurations.add(configuration_id="two", pipeline_stage=1)
            shard = spec.sharding_spec.add(tensor_name=(*inputs, "")[0], device=[0, 1])
            shard.sharded_dim.add(axis=0).simple_sharding.add(dim_param="N", num_shards=2)
            shard.index_to_device_group_map.add(key=0, value=[0, 1])
        self.note(made)
        return made

    def nodes(
        self, known: list[str], prefix: str, depth: int, parameters: Sequence[str] = ()
    ) -> list[NodeProto]:
        """Nodes over the values `known`; the names of what they compute are added to it."""
        made = []
        for number in range(self.rng.randrange(1, 4)):
            inputs = [self.rng.choice([*known, ""]) for _ in range(self.rng.randrange(4))]
            outputs = [f"{prefix}{number}.{i}" for i in range(self.rng.randrange(1, 4))]
            if len(outputs) > 2:
                outputs[1] = ""
            node = self.node(inputs, outputs)

            def body(outer: tuple[str, ...] = tuple(known)) -> GraphProto:
                return self.graph("g", outer, depth - 1)

            if depth and self.maybe(0.6):
                node.domain = ""
                node.op_type = self.rng.choice(["If", "Loop", "Scan"])
                names = ["then_branch", "else_branch"] if node.op_type == "If" else ["body"]
                for name in names:
                    node.attribute.append(self.attribute(name, AttributeProto.GRAPH, body))
                if self.maybe(0.2):
                    node.attribute.append(self.attribute("more", AttributeProto.GRAPHS, body))
            kinds = [k for k in AttributeProto.AttributeType.values() if k]
            for kind in self.rng.sample(kinds, 3):
                if kind not in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
                    node.attribute.append(self.attribute(f"a{kind}", kind))
            if parameters and self.maybe():
                node.attribute.add(
                    name="given", ref_attr_name=parameters[0], type=AttributeProto.FLOAT
                )
            known += [name for name in outputs if name]
            made.append(node)
        return made

    def graph(self, name: str, outer: Sequence[str], depth: int) -> GraphProto:
        """A graph; its names repeat in its siblings and differ from those around it."""
        made = GraphProto(name=name)
        prefix = f"{'v' * (depth + 1)}"
        inputs = [f"{prefix}in{i}" for i in range(self.rng.randrange(1, 4))]
        weights = [f"{prefix}w{i}" for i in range(self.rng.randrange(4))]
        sparse = [f"{prefix}s{i}" for i in range(self.rng.randrange(2))]
        made.initializer.extend(self.tensor(w) for w in weights)
        made.sparse_initializer.extend(self.sparse(s) for s in sparse)
        listed = list(inputs)
        for weight in (*weights, *sparse):
            if self.ir_version < 4 or self.maybe(0.3):
                listed.insert(self.rng.randrange(len(listed) + 1), weight)
        made.input.extend(self.info(i) for i in listed)
        known = [*outer, *inputs, *weights, *sparse]
        nodes = self.nodes(known, prefix, depth)
        made.node.extend(nodes)
        own = [o for n in nodes for o in n.output if o]
        ends = self.rng.sample(own, min(2, len(own)))
        if outer and self.maybe(0.2):
            ends.append(outer[0])
        made.output.extend(self.info(o) for o in ends)
        for value in (*own, *inputs, "nobody"):
            if self.maybe(0.4):
                made.value_info.append(self.info(value))
            if self.maybe(0.3):
                entry = made.quantization_annotation.add(tensor_name=value)
                for key in ("SCALE_TENSOR", "ZERO_POINT_TENSOR"):
                    entry.quant_parameter_tensor_names.add(key=key, value="scale of " + value)
        self.note(made)
        return made

    # ** the model **

    def function(self, name: str, overload: str) -> FunctionProto:
        made = FunctionProto(name=name, domain="com.example", overload=overload)
        made.input.extend(["x", "y"][: self.rng.randrange(3)])
        made.attribute.extend(["alpha", "beta"])
        made.attribute_proto.append(self.attribute("gamma", AttributeProto.TENSOR))
        made.attribute_proto.append(self.attribute("delta", AttributeProto.FLOAT))
        known = list(made.input)
        nodes = self.nodes(known, "f", 1, parameters=made.attribute)
        made.node.extend(nodes)
        own = [o for n in nodes for o in n.output if o]
        made.output.extend(own[:2])
        made.value_info.extend(self.info(o) for o in own if self.maybe())
        for domain in DOMAINS:
            made.opset_import.add(domain=domain, version=17)
        self.note(made)
        return made

    def model(self, depth: int) -> ModelProto:
        made = ModelProto(ir_version=self.ir_version)
        for version, domain in enumerate(DOMAINS):
            made.opset_import.add(domain=domain, version=17 + version)
        if self.maybe():
            made.opset_import.add(domain="never.used", version=3)
        if self.maybe(0.8):
            made.producer_name, made.producer_version = self.text(), "1.0"
            made.domain, made.model_version = "com.example.models", 7
        made.graph.CopyFrom(self.graph("main", (), depth))
        for name, overload in (("F", ""), ("F", "second"), ("G", "")):
            if self.maybe():
                made.functions.append(self.function(name, overload))
        if self.maybe(0.4):
            info = made.training_info.add()
            info.initialization.CopyFrom(self.graph("initialization", (), 1))
            info.algorithm.CopyFrom(self.graph("algorithm", ("vw0",), 1))
            info.initialization_binding.add(key="a", value="b")
            info.update_binding.add(key="c", value="d")
        if self.maybe(0.3):
            made.configuration.add(name="two", num_devices=2, device=["cpu:0", "cpu:1"])
        self.note(made)
        return made


def make_model(seed: int, depth: int = 3, ir_version: int = 11) -> ModelProto:
    """A model with bodies up to `depth` levels deep."""
    return Maker(seed, ir_version).model(depth)


def graphs(model: onnx.ModelProto) -> list[GraphProto]:
    """The main graph and the bodies in it, outermost first."""
    found = [model.graph]
    for graph in found:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    found.append(attribute.g)
                found.extend(attribute.graphs)
    return found


def mutate(data: bytes, seed: int) -> bytes:
    """The same file with a few bytes changed, removed, repeated or cut off."""
    rng = random.Random(seed)
    out = bytearray(data)
    for _ in range(rng.randrange(1, 5)):
        at = rng.randrange(len(out) + 1)
        run = rng.randrange(1, 20)
        kind = rng.randrange(5)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del out[at : at + run]
        elif kind == 2:
            out[at:at] = out[at : at + run]
        elif kind == 3:
            out[at:at] = rng.randbytes(run)
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)
