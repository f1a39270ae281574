"""Architectures by name: what converts, and that who is named is all that stands in the way.

A reason is true if heeding it helps. `heeded` changes what a reason names, and nothing else, until
the norm converts; a reason that names a bystander never gets there.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.pipeline import Run
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net, encoder_decoder, transformer

RULE = StreamFoldMean()
ADDS = {"Add", "Sub", "Identity", "Mul", "Transpose", "Reshape", "Concat", "Slice"}


def converted(done: Run) -> set[str]:
    return {v for r in done.applied for v in (r.anchor, *r.anchors)}


def centerings(done: Run) -> int:
    return sum(a.startswith("Sub ") for r in done.applied for a in r.added)


def refusals(done: Run) -> dict[str, str]:
    return {r.anchor: r.reason for r in done.remarks if r.outcome == "refused"}


def norms(model: onnx.ModelProto) -> list[str]:
    return [n.output[0] for n in model.graph.node if n.op_type == "LayerNormalization"]


# ** who is on a stream, told by additions alone **


def stream_of(model: onnx.ModelProto, norm: str) -> set[str]:
    """The values that additions join with what a norm reads: an own walk, by names."""
    made = {o: n for n in model.graph.node for o in n.output}
    weights = {t.name for t in model.graph.initializer}
    found, frontier = set[str](), [made[norm].input[0]]
    while frontier:
        value = frontier.pop()
        if value in found or value in weights:
            continue
        found.add(value)
        links = [n for n in model.graph.node if value in n.input and n.op_type in ADDS]
        if value in made and made[value].op_type in ADDS:
            links.append(made[value])
        for node in links:
            frontier += [v for v in (*node.input, *node.output) if v]
    return found


# ** heeding a reason **

LINEAR = re.compile(r"the linear layer '(\w+)' reads this stream without a norm in front of it")
OUTPUT = re.compile(r"'(\w+)', which is on this stream, is a graph output")
AFFINE = re.compile(r"the layer norm '(\w+)' writes this stream with a (scale|bias)")
INPUT = re.compile(r"'(\w+)' is a graph input")
GATED = re.compile(r"Mul '(\w+)' multiplies feature by feature by what is computed")
BETA = re.compile(r"its bias would need an Add")


def heed(model: onnx.ModelProto, norm: str, reason: str) -> onnx.ModelProto:
    """The model without what a reason names; it must be on the stream of the norm."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph, stream = changed.graph, stream_of(model, norm)
    made = {o: n for n in graph.node for o in n.output}
    if found := AFFINE.match(reason):
        writer = made[found[1]]
        assert writer.output[0] in stream
        if raw := LINEAR.search(reason):
            assert made[raw[1]].input[0] == writer.output[0]
        parts = [writer]
        while parts[-1].op_type == "Mul":  # by constants, which belong to the norm
            parts.append(made[parts[-1].input[0]])
        uniform = True
        for part in parts:
            tensor = next(t for t in graph.initializer if t.name == part.input[1])
            gamma = numpy_helper.to_array(tensor)
            uniform &= bool((gamma == gamma.flat[0]).all())
            tensor.CopyFrom(numpy_helper.from_array(np.ones_like(gamma), tensor.name))
        assert parts[-1].op_type == "LayerNormalization", "as it is in the model that was given"
        assert uniform == (found[2] == "bias"), "what gives it a mean is told"
        del parts[-1].input[2:]
    elif found := LINEAR.match(reason):
        reader = made[found[1]]
        assert reader.op_type == "MatMul"
        assert reader.input[0] in stream
        known = {v.name: v for v in (*graph.value_info, *graph.input)}
        loose = onnx.ValueInfoProto()
        loose.CopyFrom(known[reader.input[0]])
        loose.name = f"loose_{len(graph.input)}"
        graph.input.append(loose)
        reader.input[0] = loose.name
    elif found := OUTPUT.match(reason):
        assert found[1] in stream
        graph.output.remove(next(o for o in graph.output if o.name == found[1]))
    elif found := GATED.match(reason) or INPUT.match(reason):
        assert found[1] in stream
        at = next((i + 1 for i, n in enumerate(graph.node) if found[1] in n.output), 0)
        for node in graph.node:
            node.input[:] = ["mixed" if v == found[1] else v for v in node.input]
        size = 16
        weight = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(weight, "mixing"))
        graph.node.insert(at, helper.make_node("MatMul", [found[1], "mixing"], ["mixed"]))
    elif BETA.match(reason):
        del made[norm].input[2:]
    else:
        raise AssertionError(f"what should a user do about: {reason}")
    return onnx.shape_inference.infer_shapes(changed)


def heeded(model: onnx.ModelProto, norm: str) -> int:
    """How many reasons have to be heeded until a norm converts.

    Every one names another obstacle, so a norm of n steps had n of them.
    """
    model = onnx.shape_inference.infer_shapes(model)
    for steps in range(30):
        done = run(model, RULE)
        if norm in converted(done):
            assert_parity(model, done.stored.complete())
            return steps
        model = heed(model, norm, refusals(done)[norm])
    raise AssertionError("no end of reasons")


# ** architectures **


def whole(model: onnx.ModelProto) -> Run:
    done = run(model, RULE)
    assert_sound(model, done, RULE)
    if done.applied:
        assert_parity(model, done.stored.complete())
    assert converted(done) | set(refusals(done)) == set(norms(model))
    assert not converted(done) & set(refusals(done))
    return done


def widenet() -> onnx.ModelProto:
    """Blocks that share attention and experts, and have norms of their own; a router chooses."""
    net = Net()
    x = net.linear(net.input("x", ["batch", 5, 8]), 8, 16)
    first: dict[str, onnx.TensorProto] = {}
    for block in range(3):
        before = set(net.weights)
        if block:
            net.random = np.random.default_rng(1)
        else:
            net.random = np.random.default_rng(1)
        normed = net.norm(x, 16)
        x = net.op("Add", x, net.attention(normed, 16))
        normed = net.norm(x, 16)
        gates = net.op("Softmax", net.linear(normed, 16, 2), axis=-1)
        experts = []
        for at in range(2):
            gate = net.op("Slice", gates, net.ints(at), net.ints(at + 1), net.ints(2))
            experts.append(net.op("Mul", net.mlp(normed, 16), gate))
        x = net.op("Add", x, net.op("Add", *experts))
        new = [n for n in net.weights if n not in before and n.startswith("weight")]
        if not block:
            first = {str(i): net.weights[n] for i, n in enumerate(new)}
            names = new
            continue
        for at, name in enumerate(new):
            assert len(first) == len(new)
            for node in net.nodes:
                node.input[:] = [names[at] if v == name else v for v in node.input]
            del net.weights[name]
    return net.model(net.linear(net.norm(x, 16), 16, 7))


def albert() -> onnx.ModelProto:
    """Post-LN blocks that share everything, behind an embedding with a norm and a projection."""
    net = Net()
    ids = net.input("ids", ["batch", 6], onnx.TensorProto.INT64)
    table = net.keep(net.random.normal(size=(11, 8)) + 0.4, name="table")
    x = net.linear(net.norm(net.op("Gather", table, ids), 8), 8, 16)
    gammas = [net.keep(1.0 + 0.3 * net.random.normal(size=16), "gamma") for _ in range(2)]
    betas = [net.vector(16, 0.2) for _ in range(2)]
    weights = [net.matrix(16, 16) for _ in range(2)]
    for _ in range(3):
        for gamma, beta, weight in zip(gammas, betas, weights, strict=True):
            branch = net.op("Relu", net.op("MatMul", x, weight))
            branch = net.linear(branch, 16, 16)
            x = net.op("LayerNormalization", net.op("Add", x, branch), gamma, beta, axis=-1)
    return net.model(net.linear(x, 16, 7))


# name -> (model, norms, converted, centerings)
NAMED: dict[str, tuple[onnx.ModelProto, int, int, int]] = {
    "pre-LN": (transformer(), 5, 5, 0),
    "pre-LN, GELU stem": (transformer(stem="gelu"), 5, 5, 1),
    "pre-LN, given embeddings": (transformer(stem="input"), 5, 5, 1),
    "post-LN": (transformer(placement="post"), 4, 0, 0),
    "post-LN without affine": (transformer(placement="post", affine=False), 4, 3, 0),
    "mix-LN": (transformer(placement="mix", layers=4), 9, 5, 1),
    "peri-LN": (transformer(placement="peri"), 9, 4, 0),
    "peri-LN without affine": (transformer(placement="peri", affine=False), 9, 9, 0),
    "parallel": (transformer(parallel=True), 3, 3, 0),
    "ALBERT": (albert(), 7, 1, 0),
    "shared blocks, own norms": (transformer(shared=True, layers=3), 7, 7, 0),
    "WideNet": (widenet(), 7, 7, 0),
    "tied head": (transformer(stem="embedding", tied=True), 5, 5, 0),
    "LayerScale": (transformer(layer_scale=True), 5, 5, 0),
    "LayerNorm Scaling": (transformer(depth_scale=True), 5, 5, 0),
    "hidden state": (transformer(hidden=True), 5, 3, 1),
    "hidden state, one block": (transformer(hidden=True, layers=1), 3, 0, 0),
    "encoder-decoder": (encoder_decoder(), 9, 9, 1),
}


@pytest.mark.parametrize("name", NAMED)
def test_an_architecture(name: str) -> None:
    model, count, wanted, centered = NAMED[name]
    done = whole(model)
    assert len(norms(model)) == count
    assert (len(converted(done)), centerings(done)) == (wanted, centered)


@pytest.mark.parametrize("name", [n for n, given in NAMED.items() if given[1] > given[2]])
def test_heeding_every_reason_converts_the_norm(name: str) -> None:
    model = NAMED[name][0]
    refused = list(refusals(run(model, RULE)))
    assert refused
    for norm in {refused[0], refused[-1]}:
        assert heeded(model, norm) > 0


def test_the_norms_of_a_peri_ln_network_that_convert_are_those_behind_the_branches() -> None:
    model = NAMED["peri-LN"][0]
    made = {o: n for n in model.graph.node for o in n.output}
    done = run(model, RULE)
    for norm in norms(model):
        behind = made[made[norm].input[0]]
        linear = behind.op_type == "Add" and made[behind.input[0]].op_type == "MatMul"
        assert (norm in converted(done)) == (linear and norm != norms(model)[0])


def test_a_reason_that_named_a_bystander_would_be_seen() -> None:
    model = onnx.shape_inference.infer_shapes(NAMED["post-LN"][0])
    (first, *_) = norms(model)
    bystander = [n.output[0] for n in model.graph.node if n.op_type == "MatMul"][-1]
    with pytest.raises(AssertionError):
        heed(model, first, f"the linear layer '{bystander}' reads this stream without a norm in"
             " front of it")  # fmt: skip


OPTIONS = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 2),
        "placement": st.sampled_from(["pre", "post", "mix", "peri"]),
        "stem": st.sampled_from(["embedding", "patches", "linear", "gelu", "input"]),
        **dict.fromkeys(
            ("parallel", "layer_scale", "depth_scale", "hidden", "uniform", "affine"),
            st.booleans(),
        ),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=8, deadline=None)
@given(OPTIONS)
def test_what_is_refused_has_its_true_reason(given: dict[str, Any]) -> None:
    model = transformer(**given)
    refused = list(refusals(run(model, RULE)))
    for norm in refused[-1:]:
        assert heeded(model, norm) > 0
