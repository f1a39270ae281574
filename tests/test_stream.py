"""Streams of graphs that nobody designed: whatever is changed, the outputs stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.stream import Prices, Stream, Streams, find_streams
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net, transformer

SIZE = 8


def streams_of(model: onnx.ModelProto) -> tuple[Streams, list[Stream]]:
    facts = Facts(Module(storage.from_proto(model)))
    streams = find_streams(facts)
    return streams, streams.all()


def _random_net(choices: st.DataObject, opset: int) -> onnx.ModelProto:
    """A graph of values of shape (n, 6, 8), each made of earlier ones by a random operator."""
    net = Net(opset=opset, seed=choices.draw(st.integers(0, 5)))
    ids = net.input("ids", ["n", 6], onnx.TensorProto.INT64)
    x = net.input("x", ["n", 6, 5])
    raw = net.input("raw", ["n", 6, SIZE])
    gate = net.input("gate", ["n", 6, 1])
    mask = net.input("mask", ["n", 6, 1], onnx.TensorProto.BOOL)
    values = [
        net.linear(x, 5, SIZE),
        net.op("Gather", net.keep(net.random.normal(size=(9, SIZE)) + 0.5), ids),
        raw,
    ]

    def pick() -> str:
        return choices.draw(st.sampled_from(values))

    for _ in range(choices.draw(st.integers(2, 9))):
        kind = choices.draw(
            st.sampled_from(
                ["add", "sub", "norm", "norm", "uniform", "mlp", "scale", "gate", "where", "turn",
                 "roll", "heads", "bias", "relu", "mix", "div", "center", "cast", "attention"]
            )
        )  # fmt: skip
        v = pick()
        if kind == "add":
            made = net.op("Add", v, pick())
        elif kind == "sub":
            # A part only: what cancels leaves nothing but rounding, and a norm makes it large.
            made = net.op("Sub", v, net.op("Mul", pick(), net.scalar(0.3)))
        elif kind == "norm":
            made = net.norm(v, SIZE)
        elif kind == "uniform":
            made = net.norm(v, SIZE, uniform=True, bias=choices.draw(st.booleans()))
        elif kind == "mlp":
            made = net.linear(v, SIZE, SIZE, bias=choices.draw(st.booleans()))
        elif kind == "attention":
            made = net.attention(v, SIZE, key_bias=choices.draw(st.booleans()))
        elif kind == "scale":
            made = net.op("Mul", v, net.vector(SIZE, 1.0))
        elif kind == "gate":
            made = net.op("Mul", gate, v)
        elif kind == "div":
            made = net.op("Div", v, net.scalar(2.0))
        elif kind == "where":
            made = net.op("Where", mask, v, pick())
        elif kind == "turn":
            turned = net.op("Transpose", v, perm=[0, 2, 1])
            mixed = net.op("MatMul", turned, net.matrix(6, 6))
            made = net.op("Transpose", mixed, perm=[0, 2, 1])
        elif kind == "mix":
            made = net.op("MatMul", net.matrix(6, 6), v)
        elif kind == "roll":
            left = net.op("Slice", v, net.ints(0), net.ints(2), net.ints(1))
            right = net.op("Slice", v, net.ints(2), net.ints(6), net.ints(1))
            made = net.op("Concat", right, left, axis=1)
        elif kind == "heads":
            heads = net.op("Reshape", v, net.ints(0, 0, 2, SIZE // 2))
            inner = net.norm(heads, SIZE // 2) if choices.draw(st.booleans()) else heads
            made = net.op("Reshape", inner, net.ints(0, 0, SIZE))
        elif kind == "bias":
            made = net.op("Add", v, net.vector(SIZE, 0.4))
        elif kind == "cast":
            wide = net.op("Cast", v, to=onnx.TensorProto.DOUBLE)
            made = net.op("Cast", wide, to=onnx.TensorProto.FLOAT)
        elif kind == "center":
            axes = [net.ints(-1)] if opset >= 18 else []
            attrs: dict[str, Any] = {} if opset >= 18 else {"axes": [-1]}
            made = net.op("Sub", v, net.op("ReduceMean", v, *axes, keepdims=1, **attrs))
        else:
            made = net.op("Relu", v)
        values.append(made)
    last = net.linear(net.norm(values[-1], SIZE), SIZE, 3)
    extra = [pick()] if choices.draw(st.booleans()) else []
    return net.model(last, *(net.op("Identity", e) for e in extra))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([17, 18, 23]), st.sampled_from([0.1, 1.0, 3.0]))
def test_random_graphs_stay_what_they_compute(
    choices: st.DataObject, opset: int, centering: float
) -> None:
    model = _random_net(choices, opset)
    rule = StreamFoldMean(centering=centering, add=0.1)
    done = run(model, rule)
    assert_sound(model, done, rule)
    if done.applied:
        assert_parity(model, done.stored.complete())
    left = [n for n in done.stored.proto.graph.node if n.op_type == "LayerNormalization"]
    assert len(left) == sum(r.outcome == "refused" for r in done.remarks)
    for stream in streams_of(model)[1]:
        assert stream.features in (SIZE, SIZE // 2)


def test_writers_and_readers_of_a_transformer() -> None:
    _, (stream,) = streams_of(transformer(layers=2, stem="patches"))
    assert stream.features == 16
    assert len(stream.norms) == 5
    kinds = sorted(w.op for w in stream.writers if hasattr(w, "op"))
    assert kinds == ["Conv", "MatMul", "MatMul", "MatMul", "MatMul"]


def test_obstacles_are_told_nearest_first() -> None:
    model = transformer(layers=2, hidden=True)
    streams, _ = streams_of(model)
    last = streams.norms[0]
    readers, writers = streams.obstacles(last)
    assert [s.why for _, s in readers if "graph output" in s.why]
    assert not writers


def test_prices_decide_and_the_smallest_choice_wins() -> None:
    streams, _ = streams_of(transformer(layers=1, stem="gelu"))
    gains = dict.fromkeys(streams.inputs, 1.0)
    assert sum(streams.choose(gains, Prices(centering=2.9)).converts(n) for n in gains) == 3
    assert not streams.choose(gains, Prices(centering=3.0)).groups(), "nothing for nothing"


@pytest.mark.parametrize("shared", [False, True])
def test_one_change_of_a_shared_table_is_stored_once(shared: bool) -> None:
    net = Net()
    ids = net.input("ids", ["n", 4], onnx.TensorProto.INT64)
    table = net.keep(np.random.default_rng(0).normal(size=(3000, SIZE)) + 1.0, name="table")
    first = net.op("Gather", table, ids)
    second = net.op("Gather", table if shared else net.matrix(3000, SIZE), ids)
    x = net.op("Add", first, net.op("Mul", second, net.scalar(0.5)))
    model = net.model(net.linear(net.norm(x, SIZE), SIZE, 3))
    done = run(model, StreamFoldMean())
    assert done.applied
    tables = [t for t in done.stored.proto.graph.initializer if list(t.dims) == [3000, SIZE]]
    assert len(tables) == (1 if shared else 2)
