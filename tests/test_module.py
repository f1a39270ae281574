"""Modules: nothing is lost that no pass touched, and what is no graph is refused by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import staging, storage
from onnxnorm.errors import ModelError
from onnxnorm.facts import Facts
from onnxnorm.module import SITE_KEY, Module, Node, Value, Weight, dense, reads
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.pipeline import Pipeline
from tests.generated import Maker, graphs, make_model, mutate

SEEDS: Final = st.integers(0, 2**32 - 1)
VERSIONS: Final = st.sampled_from([3, 4, 8, 11, 13])
DEPTHS: Final = st.integers(0, 3)
bounded = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def same(found: Any, wanted: Any) -> None:
    """Equality of every field, also of unknown ones and of fields that hold their default."""
    assert found == wanted
    assert found.SerializeToString() == wanted.SerializeToString()


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')


def module(text: str) -> Module:
    return Module(storage.from_proto(parse(text)))


# ** nothing is lost **


@bounded
@given(SEEDS, DEPTHS, VERSIONS)
def test_a_file_is_written_back_as_it_was(
    tmp_path: Path, seed: int, depth: int, version: int
) -> None:
    data = make_model(seed, depth, version).SerializeToString()
    (tmp_path / "in.onnx").write_bytes(data)
    stored = storage.load(tmp_path / "in.onnx")
    assert Module(stored).export() is stored
    assert staging.save(stored, tmp_path / "out.onnx") == (tmp_path / "out.onnx",)
    assert (tmp_path / "out.onnx").read_bytes() == data


@bounded
@given(SEEDS, DEPTHS, VERSIONS)
def test_scopes_that_are_built_anew_equal_the_input(seed: int, depth: int, version: int) -> None:
    model = make_model(seed, depth, version)
    opened = Module(storage.from_proto(model))
    for scope in opened.scopes:
        scope.touch()
    assert opened.touched
    same(opened.export().complete(), model)


@bounded
@given(SEEDS, DEPTHS, VERSIONS)
def test_a_model_in_memory_is_not_changed(
    tmp_path: Path, seed: int, depth: int, version: int
) -> None:
    model = make_model(seed, depth, version)
    data = model.SerializeToString()
    stored = storage.from_proto(model)
    same(stored.complete(), model)
    assert model.SerializeToString() == data
    staging.save(stored, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == data


@pytest.mark.parametrize(("seed", "version"), [(1, 3), (2, 11)])
def test_the_command_line_with_no_pass_copies_the_file(
    tmp_path: Path, seed: int, version: int
) -> None:
    data = make_model(seed, 2, version).SerializeToString()
    (tmp_path / "in.onnx").write_bytes(data)
    command = [sys.executable, "-m", "onnxnorm", "optimize", "in.onnx", "out.onnx"]
    command += ["--passes", "none", "--no-parity", "--no-latency", "--quiet"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out.onnx").read_bytes() == data
    assert {p.name for p in tmp_path.iterdir()} == {"in.onnx", "out.onnx"}


def add_foldable(maker: Maker, model: onnx.ModelProto, graph: onnx.GraphProto) -> None:
    """A convolution and its BatchNormalization, with all that can hang on them."""
    rng = np.random.default_rng(maker.rng.randrange(2**32))
    model.graph.input.append(helper.make_tensor_value_info("image", 1, ["N", 2, 5, 5]))
    shapes: dict[str, tuple[int, ...]] = {"weight": (16, 2, 3, 3), "bias": (16,)}
    shapes |= dict.fromkeys(("gamma", "beta", "mean", "variance"), (16,))
    for name, shape in shapes.items():
        values = rng.uniform(0.5, 2, shape).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(values, name))
        if maker.ir_version < 4:
            graph.input.append(helper.make_tensor_value_info(name, 1, shape))
    conv = maker.node(["image", "weight", "bias"], ["convolved"])
    conv.op_type, conv.domain, conv.overload = "Conv", "", ""
    conv.attribute.append(helper.make_attribute("pads", [1, 1, 1, 1], doc_string="same"))
    norm = maker.node(["convolved", "gamma", "beta", "mean", "variance"], ["normed"])
    norm.op_type, norm.domain, norm.overload = "BatchNormalization", "", ""
    nodes = list(graph.node)
    at = maker.rng.randrange(len(nodes) + 1)
    nodes[at:at] = [conv]
    at = maker.rng.randrange(at + 1, len(nodes) + 1)
    nodes[at:at] = [norm]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output.append(maker.info("normed"))
    for name in ("convolved", "normed"):
        graph.value_info.append(helper.make_tensor_value_info(name, 1, ["N", 16, 5, 5]))
        graph.quantization_annotation.add(tensor_name=name)


def keep(messages: Any, wanted: Callable[[Any], bool]) -> list[Any]:
    """Remove what is not wanted from a repeated field; returns it."""
    kept: list[Any] = []
    gone: list[Any] = []
    for message in messages:
        (kept if wanted(message) else gone).append(message)
    del messages[:]
    messages.extend(kept)
    return gone


def cut(graph: onnx.GraphProto, nodes: Sequence[str], names: Sequence[str]) -> list[onnx.NodeProto]:
    """Take nodes, by their first output, and values out of a graph."""
    for field in (graph.initializer, graph.input, graph.value_info):
        keep(field, lambda m: m.name not in names)
    keep(graph.quantization_annotation, lambda q: q.tensor_name not in names)
    return keep(graph.node, lambda n: n.output[0] not in nodes)


@bounded
@given(SEEDS, DEPTHS, VERSIONS)
def test_a_changed_model_keeps_what_no_pass_touched(seed: int, depth: int, version: int) -> None:
    maker = Maker(seed, version)
    model = maker.model(depth)
    number = maker.rng.randrange(len(graphs(model)))
    add_foldable(maker, model, graphs(model)[number])
    data = model.SerializeToString()
    run = Pipeline([FoldBatchnorm()]).run(storage.from_proto(model))
    assert [r.outcome for r in run.remarks] == ["applied"]
    assert model.SerializeToString() == data

    result = run.stored.complete()
    parameters = ["weight", "bias", "gamma", "beta", "mean", "variance"]
    old = cut(graphs(model)[number], ["convolved", "normed"], [*parameters, "convolved"])
    new = cut(graphs(result)[number], ["normed"], ["normed_weight", "normed_bias"])
    same(result, model)

    (folded,), conv = new, old[0]
    assert (list(folded.input), list(folded.output)) == (
        ["image", "normed_weight", "normed_bias"],
        ["normed"],
    )
    site = folded.metadata_props.pop()
    assert (site.key, site.value) == (SITE_KEY, run.applied[0].site)
    del folded.input[:], folded.output[:], conv.input[:], conv.output[:]
    same(folded, conv)


def test_a_name_that_goes_takes_what_is_said_of_it_along() -> None:
    model = parse(
        "main (float[N] x) => (float[N] y) <float[1] a = {1}, float[1] b = {2}, float[1] c = {3}>"
        "{ y = Add (x, a) }"
    )
    for name in ("a", "b", "elsewhere"):
        model.graph.value_info.append(helper.make_tensor_value_info(name, 1, [1]))
        model.graph.quantization_annotation.add(tensor_name=name)
    opened = Module(storage.from_proto(model))
    gone = opened.main.values["b"]
    assert isinstance(gone, Weight)
    del opened.main.weights[gone]
    opened.main.touch()
    graph = opened.export().proto.graph
    assert [t.name for t in graph.initializer] == ["a", "c"]
    assert [i.name for i in graph.value_info] == ["a", "elsewhere"]
    assert [q.tensor_name for q in graph.quantization_annotation] == ["a", "elsewhere"]


def test_an_edit_touches_the_scopes_around_it_only() -> None:
    opened = module(
        "main (bool c, float[N] x) => (float[N] y) {"
        " y = If (c) <then_branch = t () => (float[N] a) { a = Neg (x) },"
        "             else_branch = e () => (float[N] a) { a = Abs (x) }> }"
    )
    touched = next(s for s in opened.scopes if s.path == "y/then_branch/")
    touched.touch()
    assert [s.path for s in opened.scopes if s.touched] == ["", "y/then_branch/"]


# ** what a module knows **


def test_bodies_see_the_values_around_them_by_identity() -> None:
    opened = module(
        "main (bool c, float[N] x) => (float[N] y) <float[1] w = {1}> {"
        " y = If (c) <then_branch = t () => (float[N] a) { a = Mul (x, w) },"
        "             else_branch = e () => (float[N] a) { a = Identity (x) }> }"
    )
    x, w = opened.main.values["x"], opened.main.values["w"]
    (node,) = opened.main.nodes
    assert {v.name for v in reads(node)} == {"c", "x", "w", "a"}
    assert sum(v is x for v in reads(node)) == 2
    assert [reader.op for reader in w.outputs] == ["Mul"]
    assert [s.path for s in opened.scopes] == ["", "y/then_branch/", "y/else_branch/"]
    first, second = (s.values["a"] for s in opened.scopes[1:])
    assert first is not second
    assert isinstance(first, Value)


def test_initializers_that_callers_may_override_are_inputs() -> None:
    text = "main (float[N] x, float[1] w = {2}) => (float[N] y) { y = Mul (x, w) }"
    model = parse(text)
    value = Module(storage.from_proto(model)).main.values["w"]
    assert isinstance(value, Value)
    assert value.default is not None
    model.ir_version = 3
    opened = Module(storage.from_proto(model))
    weight = opened.main.values["w"]
    assert isinstance(weight, Weight)
    assert opened.main.inputs[1] is weight


def test_functions_are_scopes_with_opsets_of_their_own() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20, "d" : 1]>'
        " main (float[N] x) => (float[N] y) { y = d.f (x) }"
        ' <opset_import: ["" : 18], domain: "d"> f (a) => (b) { b = Neg (a) }'
        ' <opset_import: ["" : 17], domain: "d", overload: "two"> f (a) => (b) { b = Abs (a) }'
    )
    scopes = Module(storage.from_proto(model)).scopes
    assert [(s.path, s.is_function, s.opsets[""]) for s in scopes] == [
        ("", False, 20),
        ("d.f/", True, 18),
        ("d.f:two/", True, 17),
    ]


def test_scopes_of_nodes_that_look_alike_have_paths_of_their_own() -> None:
    model = parse(
        "main (bool c, float[N] x) => (float[N] y) { y = Neg (x)"
        " z = If (c) <then_branch = t () => () { }, else_branch = e () => () { }>"
        " w = If (c) <then_branch = t () => () { }, else_branch = e () => () { }> }"
    )
    for node in model.graph.node[1:]:
        del node.output[:]
    paths = [s.path for s in Module(storage.from_proto(model)).scopes]
    assert len(paths) == len(set(paths)) == 5


def test_attributes_have_python_values() -> None:
    opened = module(
        'main (float[N] x) => (float[N] y) { y = Op <i = 2, s = "t", l = [1, 2],'
        " body = g () => (float[N] a) { a = Neg (x) }> (x) }"
    )
    attrs = opened.main.nodes[0].attrs
    assert (attrs["i"], attrs["s"], attrs["l"]) == (2, b"t", [1, 2])
    assert attrs["body"].nodes == opened.scopes[1].nodes


def test_a_node_is_called_by_its_name_or_what_it_computes() -> None:
    opened = module("main (float[N] x) => (float[N] y) { [n] a = Neg (x)  y = Neg (a) }")
    assert [node.label for node in opened.nodes()] == ["n", "y"]
    nameless = Node(helper.make_node("Sink", [], []), opened.main, [], [])
    assert nameless.label == "Sink"


def test_fresh_names_are_those_that_no_scope_uses() -> None:
    opened = module(
        "main (bool c, float[N] x) => (float[N] y) <float[1] w = {1}> {"
        " [n] y = If (c) <then_branch = t () => (float[N] a) { a = Mul (x, w) },"
        "                 else_branch = e () => (float[N] b) { b = Identity (x) }> }"
    )
    assert [opened.fresh_name(n) for n in "cxywnabnew"[:7]] == [f"{n}_1" for n in "cxywnab"]
    assert [opened.fresh_name("new") for _ in range(3)] == ["new", "new_1", "new_2"]


def test_weights_are_read_when_asked_for(tmp_path: Path) -> None:
    values = np.arange(600, dtype=np.float32).astype(ml_dtypes.bfloat16)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "w")])
    path = tmp_path / "m.onnx"
    path.write_bytes(helper.make_model(graph, ir_version=10).SerializeToString())
    opened = Module(storage.load(path))
    weight = opened.main.values["w"]
    assert isinstance(weight, Weight)
    assert isinstance(weight.proto, TensorProto)
    assert not weight.proto.raw_data
    assert weight.values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(weight.values, values)


def test_what_a_module_keeps_goes_with_it() -> None:
    stored = storage.from_proto(parse("main (float[N] x) => (float[N] y) { y = Neg (x) }"))
    opened = Module(stored)
    kept = opened.stored.keep("w", np.ones(5000, np.float32))
    assert opened.stored.array(kept).sum() == 5000
    assert len(stored.sources) == 0  # or every attempt would leave its weights behind


@pytest.mark.parametrize("indices", [[1, 5], [[0, 1], [1, 2]]])
def test_sparse_tensors_in_both_forms(indices: list[Any]) -> None:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.array([3, 4], np.float16), "s"),
        numpy_helper.from_array(np.array(indices)),
        [2, 3],
    )
    found = dense(sparse)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, [[0, 3, 0], [0, 0, 4]])


@pytest.mark.parametrize(
    ("indices", "dims"),
    [([1, 60], [2, 3]), ([1, 2, 3], [2, 3]), ([1, 5], [-2, 3]), ([[0, 1], [9, 2]], [2, 3])],
)
def test_broken_sparse_tensors_are_refused(indices: list[Any], dims: list[int]) -> None:
    sparse = onnx.SparseTensorProto(dims=dims)
    sparse.values.CopyFrom(numpy_helper.from_array(np.array([3, 4], np.float16), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array(indices)))
    with pytest.raises(ModelError, match="sparse tensor 's' cannot be read"):
        dense(sparse)


# ** what is no graph **


BODY: Final = "else_branch = e () => (float[N] a) { a = Identity (x) }"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{ y = Add (x, q) }", "node 'Add' (Add) reads 'q', which nothing produces"),
        ("{ z = Neg (x) }", "output of the graph is 'y', which nothing produces"),
        ("{ y = Neg (x) y = Abs (x) }", "the name 'y' of a node output is defined twice"),
        ("{ y, x = Split (x) }", "the name 'x' of a node output is defined twice"),
        ("{ y = Neg (y) }", "the graph has a cycle through node 'y' (Neg)"),
        ("{ y = Neg (z) z = Abs (y) }", "the graph has a cycle through node 'y' (Neg)"),
        ("{ y = com.acme.Op (x) }", "calls Op of the domain 'com.acme', which the model does not"),
        (
            "{ y = If (c) <then_branch = t () => (float[N] a) { a = Neg (y) }, " + BODY + "> }",
            "the graph has a cycle through node 'y' (If)",
        ),
        (
            "{ y = If (c) <then_branch = t () => (float[N] a) { a = Neg (z) }, " + BODY + ">"
            " z = Abs (y) }",
            "the graph has a cycle through node 'y' (If)",
        ),
        (
            "{ y = If (c) <then_branch = t () => (float[N] a) { a = Neg (b) b = Abs (a) }, "
            + BODY
            + "> }",
            "the graph y/then_branch/ has a cycle through node 'a' (Neg)",
        ),
        (
            "{ y = If (c) <then_branch = t () => (float[N] q) { a = Neg (x) }, " + BODY + "> }",
            "output of y/then_branch/ is 'q', which nothing produces",
        ),
        (
            "{ y = If (c) <then_branch = t () => (float[N] q) { q = Neg (a) }, " + BODY + "> }",
            "node 'Neg' (Neg) reads 'a', which nothing produces",
        ),
    ],
)
def test_what_is_no_graph_is_refused(text: str, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        module(f"main (bool c, float[N] x) => (float[N] y) {text}")
    assert says in caught.value.what
    assert caught.value.hint


def test_names_that_repeat_are_refused() -> None:
    model = parse("main (float[N] x) => (float[N] y) <float[1] w = {1}> { y = Mul (x, w) }")
    for field in (model.graph.initializer, model.graph.input):
        broken = onnx.ModelProto.FromString(model.SerializeToString())
        target: Any = broken.graph.initializer
        target = target if field is model.graph.initializer else broken.graph.input
        target.append(target[0])
        with pytest.raises(ModelError, match="is defined twice"):
            Module(storage.from_proto(broken))
    model.graph.input.append(helper.make_tensor_value_info("w", 1, [1]))
    model.graph.initializer.append(model.graph.initializer[0])
    with pytest.raises(ModelError, match="the name 'w' of a initializer is defined twice"):
        Module(storage.from_proto(model))


def test_an_attribute_without_a_known_type_is_refused() -> None:
    model = parse("main (float[N] x) => (float[N] y) { y = Op <k = 1> (x) }")
    model.graph.node[0].attribute[0].ClearField("type")
    with pytest.raises(ModelError, match="attribute 'k' has no type that is known"):
        Module(storage.from_proto(model))


@pytest.mark.parametrize("name", [b"node!", b"value", b"Oper!"])
def test_names_that_are_no_text_are_refused(name: bytes) -> None:
    model = parse(
        "main (float[N] x) => (float[N] y) { [node!] value = Oper! (x) y = Neg (value) }".replace(
            "Oper!", "Opera"
        ).replace("node!", "nodex")
    )
    data = model.SerializeToString().replace(b"nodex", b"node!").replace(b"Opera", b"Oper!")
    broken = onnx.ModelProto.FromString(data.replace(name, name[:-1] + b"\xff"))
    with pytest.raises(ModelError, match="is not UTF-8 text"):
        Module(storage.from_proto(broken))


def test_nodes_need_not_be_sorted() -> None:
    opened = module("main (float[N] x) => (float[N] y) { y = Neg (a) a = Abs (x) }")
    assert [n.op for n in opened.main.nodes[0].inputs[0].inputs] == ["Abs"]


@settings(bounded, max_examples=150)
@given(SEEDS)
def test_a_broken_model_is_refused_and_nothing_else(tmp_path: Path, seed: int) -> None:
    model = make_model(seed % 50, 2, 10)
    model.graph.node.append(helper.make_node("Constant", [], ["one"], value_float=1.0))
    (tmp_path / "m.onnx").write_bytes(mutate(model.SerializeToString(), seed))
    try:
        stored = storage.load(tmp_path / "m.onnx")
        for tensor in storage.tensors(stored.proto):
            stored.array(tensor)
    except ModelError:
        return
    try:
        opened = Module(stored)
        for scope in opened.scopes:
            scope.touch()
        facts = Facts(opened)
        for node in opened.nodes():
            for value in node.inputs:
                facts.constant(value)
    except ModelError:
        return
    same(opened.export().proto, stored.proto)
