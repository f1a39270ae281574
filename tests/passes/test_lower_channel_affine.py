"""Scales and shifts that stay between convolutions become a BatchNormalization, for the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxnorm.passes import lower_channel_affine
from onnxnorm.passes.lower_channel_affine import LowerChannelAffine
from onnxnorm.session import optimized_graph
from onnxnorm.staging import save
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.mutants import computes_the_same, mutated

RULE = LowerChannelAffine("ort-cpu")


class Net:
    """Two convolutions joined, maps of what they make, and a convolution that reads the result."""

    def __init__(self, channels: int = 16, *, kind: int = TensorProto.FLOAT, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.dtype = helper.tensor_dtype_to_np_dtype(kind)
        self.kind, self.channels = kind, channels
        self.weights: list[onnx.TensorProto] = []
        self.nodes: list[onnx.NodeProto] = []
        first = self.op("Conv", "x", self.keep(self.normal(channels, 3, 3, 3)), pads=[1] * 4)
        second = self.op("Conv", first, self.keep(self.normal(channels, channels, 1, 1)))
        self.joined = self.op("Concat", first, second, axis=1)

    def normal(self, *shape: int) -> np.ndarray[Any, Any]:
        return self.random.standard_normal(shape) * 0.5

    def keep(self, array: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, self.dtype), name))
        return name

    def each(self, *shape: int) -> str:
        """A constant with one number for each channel of what was joined."""
        return self.keep(self.random.uniform(0.5, 2, shape or (2 * self.channels, 1, 1)))

    def op(self, op: str, *inputs: str, **attrs: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attrs))
        return name

    def norm(self, read: str) -> str:
        flat = [self.each(2 * self.channels) for _ in range(4)]
        return self.op("BatchNormalization", read, *flat)

    def convolved(self, read: str, *, group: int = 1) -> str:
        weight = self.normal(8, 2 * self.channels // group, 3, 3)
        return self.op("Conv", read, self.keep(weight), pads=[1] * 4, group=group)

    def model(self, result: str, *more: str, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", self.kind, ["N", 3, 6, 5])],
            [helper.make_tensor_value_info(name, self.kind, None) for name in (result, *more)],
            self.weights,
        )
        return helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    done = run(model, RULE)
    assert_sound(model, done, RULE)
    after = done.stored.complete()
    assert_parity(model, after)
    return after


@pytest.mark.parametrize(
    "maps",
    [
        ["Add"],
        ["Mul"],
        ["Mul", "Add"],
        ["Sub", "Div"],
        ["BatchNormalization", "Mul", "Add"],
        ["Mul", "BatchNormalization"],
        ["one Add"],
    ],
    ids=" ".join,
)
def test_a_chain_of_maps_is_one_operator(maps: list[str]) -> None:
    net = Net()
    value = net.joined
    for each in maps:
        if each == "BatchNormalization":
            value = net.norm(value)
        else:
            value = net.op(each.split()[-1], value, net.each(1) if "one" in each else net.each())
    model = net.model(net.convolved(net.op("Relu", value)), net.joined)
    expected = ["Conv", "Conv", "Concat", "BatchNormalization", "Relu", "Conv"]
    assert kinds(lowered(model)) == expected


def test_the_numbers_are_those_of_the_chain() -> None:
    net = Net()
    s, t = net.each(), net.each()
    scaled = net.op("Mul", net.joined, s)
    model = net.model(net.convolved(net.op("Add", scaled, t)))
    after = lowered(model)
    (norm,) = (node for node in after.graph.node if node.op_type == "BatchNormalization")
    kept = {each.name: numpy_helper.to_array(each) for each in after.graph.initializer}
    before = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    scale, shift, mean, variance = (kept[name] for name in norm.input[1:])
    assert (scale == before[s].ravel()).all()
    assert (shift == before[t].ravel()).all()
    assert not mean.any()
    assert (variance == 1).all()
    assert [a.f for a in norm.attribute if a.name == "epsilon"] == [0.0]


def test_onnxruntime_stays_in_blocks(tmp_path: Path) -> None:
    net = Net(32)
    value = net.op("Add", net.op("Mul", net.joined, net.each()), net.each())
    model = net.model(net.convolved(net.op("Relu", value)), net.joined)
    reorders = []
    for name, passes in (("before", ()), ("after", (RULE,))):
        save(run(model, *passes).stored, tmp_path / name)
        made = kinds(optimized_graph(tmp_path / name))
        if "ReorderOutput" not in made:
            pytest.skip("onnxruntime has no blocks of channels on this processor")
        reorders.append(made.count("ReorderInput") + made.count("ReorderOutput"))
    assert reorders[1] < reorders[0]


def refused(case: str) -> onnx.ModelProto:
    channels = 12 if case == "channels that fill no block" else 16
    net = Net(channels, kind=TensorProto.DOUBLE if case == "float64" else TensorProto.FLOAT)
    value, more = net.joined, [net.joined]
    if case == "a convolution that onnxruntime takes them into":
        value, more = net.op("Conv", value, net.keep(net.normal(32, 32, 1, 1))), []
    if case == "an operator that is not done on blocks":
        value = net.op("HardSigmoid", value)
    if case == "a grouped convolution in front":
        weight = net.keep(net.normal(32, 8, 1, 1))
        value = net.op("Relu", net.op("Conv", value, weight, group=4))
    if case == "one BatchNormalization":
        value = net.norm(value)
    elif case == "a constant that varies in space":
        value = net.op("Add", value, net.each(32, 6, 5))
    elif case == "no constant":
        value = net.op("Add", value, net.op("ReduceMean", value, axes=[2, 3]))
    elif case == "a map that has no finite numbers":
        value = net.op("Div", value, net.keep(np.zeros((32, 1, 1))))
    else:
        value = net.op("Add", value, net.each())
    if case == "a reader that is not done on blocks":
        return net.model(net.op("HardSigmoid", value), *more)
    if case == "a grouped convolution behind":
        return net.model(net.convolved(value, group=4), *more)
    return net.model(net.convolved(value), *more)


@pytest.mark.parametrize(
    "case",
    [
        "channels that fill no block",
        "float64",
        "a convolution that onnxruntime takes them into",
        "an operator that is not done on blocks",
        "a grouped convolution in front",
        "one BatchNormalization",
        "a constant that varies in space",
        "no constant",
        "a map that has no finite numbers",
        "a reader that is not done on blocks",
        "a grouped convolution behind",
    ],
)
def test_what_gains_nothing_stays(case: str) -> None:
    model = refused(case)
    assert kinds(run(model, RULE).stored.complete()) == kinds(model)


@pytest.mark.parametrize("target", ["onnx", "ort-cuda"])
def test_other_targets_have_no_use_for_it(target: str) -> None:
    net = Net()
    model = net.model(net.convolved(net.op("Add", net.joined, net.each())))
    assert not run(model, LowerChannelAffine(target)).remarks


def test_a_value_that_others_read_ends_a_chain() -> None:
    net = Net()
    scaled = net.op("Mul", net.joined, net.each())
    shifted = net.op("Add", scaled, net.each())
    model = net.model(net.convolved(shifted), net.op("MaxPool", scaled, kernel_shape=[2, 2]))
    after = kinds(lowered(model))
    assert after == ["Conv", "Conv", "Concat", *["BatchNormalization"] * 2, "Conv", "MaxPool"]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_chain_agrees(data: st.DataObject) -> None:
    net = Net(16, seed=data.draw(st.integers(0, 99)))
    value = net.joined
    if data.draw(st.booleans()):
        value = net.op(data.draw(st.sampled_from(["Relu", "Tanh"])), value)
    if data.draw(st.booleans()):
        kept = net.op("MaxPool", value, kernel_shape=[3, 3], pads=[1] * 4)
        value = net.op("Add", value, kept)
    steps = st.sampled_from(["Add", "Sub", "Mul", "Div", "Norm"])
    for each in data.draw(st.lists(steps, min_size=1, max_size=4)):
        if each == "Norm":
            value = net.norm(value)
            continue
        shape = data.draw(st.sampled_from([(), (1,), (1, 32, 1, 1)]))
        swapped = each != "Div" and each != "Sub" and data.draw(st.booleans())
        pair = (value, net.each(*shape))
        value = net.op(each, *(pair[::-1] if swapped else pair))
    if data.draw(st.booleans()):
        value = net.op("Relu", value)
    model = net.model(net.convolved(value), net.joined, opset=data.draw(st.integers(9, 20)))
    lowered(model)


@pytest.mark.parametrize(
    ("last", "old", "new"),
    [
        ("Mul", "step.scale * scale, step.scale * shift", "step.scale * scale, shift"),
        ("Sub", "shift = shift + step.shift", "shift = shift - step.shift"),
        ("Mul", '"bias": found.shift', '"bias": found.scale'),
        ("Sub", "np.ones_like", "np.zeros_like"),
    ],
)
def test_mutants_are_caught(last: str, old: str, new: str) -> None:
    net = Net()
    value = net.op("Add", net.op("Mul", net.joined, net.each()), net.each())
    value = net.op(last, value, net.each())
    model = net.model(net.convolved(net.op("Relu", value)), net.joined)
    assert computes_the_same(model, RULE)
    wrong = mutated(lower_channel_affine, old, new)["LowerChannelAffine"]("ort-cpu")
    assert not computes_the_same(model, wrong)
