"""Slots and inlets of linear operators, against what numpy says the operators do."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module, Node
from onnxnorm.port import Inlet, slots
from tests.networks import Net


def taken(net: Net, output: str) -> tuple[Node, Facts, onnx.ModelProto]:
    model = net.model(output)
    module = Module(storage.from_proto(model))
    node = next(n for n in module.nodes() if n.outputs[0].name == output)
    return node, Facts(module), model


def _run(model: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    result: Any = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(result[0])


CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "matmul": ("MatMul", (3, 5), (5, 4), {}),
    "gemm": ("Gemm", (3, 5), (5, 4), {"alpha": 0.5, "beta": 2.0}),
    "gemm b": ("Gemm", (3, 5), (4, 5), {"transB": 1, "alpha": -1.5}),
    "gemm a": ("Gemm", (5, 3), (5, 4), {"transA": 1}),
    "conv": ("Conv", (2, 5, 6), (4, 5, 3), {}),
    "grouped conv": ("Conv", (2, 6, 6), (4, 3, 3), {"group": 2}),
    "transposed conv": ("ConvTranspose", (2, 5, 6), (5, 4, 3), {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bias", [False, True])
def test_scaling_every_slot_scales_the_features(name: str, bias: bool) -> None:
    kind, shape, weight, attrs = CASES[name]
    net = Net(dtype=np.float64)
    inputs = [net.input("x", list(shape)), net.matrix(*weight)]
    if bias and kind != "MatMul":
        inputs.append(net.vector(4, 1.0))
    output = net.op(kind, *inputs, **attrs)
    node, facts, model = taken(net, output)
    found = slots(node, facts)
    assert not isinstance(found, str)
    assert [s.bias for s in found] == ([False, True] if len(inputs) == 3 else [False])
    factors = np.asarray([2.0, 3.0, 5.0, 7.0])
    x = np.random.default_rng(0).normal(size=shape)
    before = _run(model, x)
    for slot in found:
        array = slot.constant.float64()
        shaped = [1] * array.ndim
        shaped[slot.axis] = 4
        scaled = array * factors.reshape(shaped)
        index = [t.name for t in model.graph.initializer].index(slot.constant.name)
        tensor = onnx.numpy_helper.from_array(scaled, slot.constant.name)
        model.graph.initializer[index].CopyFrom(tensor)
    shaped = [1] * before.ndim
    shaped[found[0].output_axis] = 4
    assert np.allclose(_run(model, x), before * factors.reshape(shaped))


@pytest.mark.parametrize("name", ["matmul", "gemm", "gemm b", "conv"])
def test_an_inlet_says_what_a_shift_of_the_input_adds(name: str) -> None:
    kind, shape, weight, attrs = CASES[name]
    net = Net(dtype=np.float64)
    output = net.op(kind, net.input("x", list(shape)), net.matrix(*weight), **attrs)
    node, facts, model = taken(net, output)
    inlet = Inlet.of(node, 0, facts)
    assert not isinstance(inlet, str)
    shift = np.asarray([1.0, -2.0, 0.5, 3.0, -1.0])
    x = np.random.default_rng(1).normal(size=shape)
    (axis,) = inlet.axes
    spread = shift.reshape([5 if a - x.ndim == axis else 1 for a in range(x.ndim)])
    before = _run(model, x)
    added = inlet.through(spread)
    assert added.shape == (4,), "a bias is a vector"
    shaped = (4, *(1,) * (x.ndim - 2)) if kind == "Conv" else (4,)
    assert np.allclose(_run(model, x + spread), before + added.reshape(shaped))


@pytest.mark.parametrize(
    ("equation", "weight", "sizes"),
    [
        ("bsd,dhe->bshe", (5, 2, 3), {-1: 5}),
        ("bsd,hde->bhse", (2, 5, 3), {-1: 5}),
        ("dfs,bsd->bf", (5, 4, 3), {-1: 5, -2: 3}),
        ("bsd,sde->bse", (3, 5, 4), {-1: 5}),
        ("...d,d->...", (5,), {-1: 5}),
    ],
)
@pytest.mark.parametrize("blocks", [1 << 20, 64])
def test_the_inlet_of_an_einsum(
    equation: str, weight: tuple[int, ...], sizes: dict[int, int], blocks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("onnxnorm.port._BLOCK", blocks)
    net = Net(dtype=np.float64)
    index = 1 if equation[:2] == "df" else 0
    operands = [net.input("x", [2, 3, 5]), net.matrix(*weight)]
    output = net.op("Einsum", *operands[:: 1 - 2 * index], equation=equation)
    node, facts, model = taken(net, output)
    inlet = Inlet.of(node, index, facts)
    assert not isinstance(inlet, str)
    assert set(inlet.axes) == set(sizes)
    random = np.random.default_rng(1)
    shift = random.normal(size=[sizes.get(a, 1) for a in range(min(sizes), 0)])
    x = random.normal(size=(2, 3, 5))
    assert np.allclose(_run(model, x + shift), _run(model, x) + inlet.through(shift))
    name = inlet.weight.name
    at = [t.name for t in model.graph.initializer].index(name)
    scaled = inlet.weight.float64() * inlet.factors(shift)
    expected = _run(model, x * shift)
    model.graph.initializer[at].CopyFrom(onnx.numpy_helper.from_array(scaled, name))
    assert np.allclose(_run(model, x), expected)
    mixing = random.normal(size=(5, 5))
    mixed = inlet.mixed(-1, mixing)
    model.graph.initializer[at].CopyFrom(onnx.numpy_helper.from_array(inlet.weight.float64(), name))
    expected = _run(model, x @ mixing)
    model.graph.initializer[at].CopyFrom(onnx.numpy_helper.from_array(mixed, name))
    assert np.allclose(_run(model, x), expected)


@pytest.mark.parametrize(
    "equation",
    ["bsd,de->be", "bsd,d->bsd", "ssd,de->se", "d...,de->...e", "bsd,...d->bs", "bsd,de,e->bs"],
)
def test_an_einsum_that_is_no_product_with_a_weight(equation: str) -> None:
    net = Net()
    weight = net.matrix(*(3,) if equation in ("bsd,d->bsd",) else (3, 3))
    operands = [net.input("x", [3, 3, 3]), weight]
    if equation.count(",") == 2:
        operands.append(net.vector(3))
    node, facts, _ = taken(net, net.op("Einsum", *operands, equation=equation))
    found = Inlet.of(node, 0, facts)
    assert isinstance(found, str)
    assert "more in it" in found


def test_large_weights_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net(dtype=np.float64)
    output = net.op("MatMul", net.input("x", [3, 50]), net.matrix(50, 4))
    node, facts, _ = taken(net, output)
    inlet = Inlet.of(node, 0, facts)
    assert not isinstance(inlet, str)
    shift = np.arange(50.0)
    whole = inlet.through(shift)
    monkeypatch.setattr("onnxnorm.port._BLOCK", 64)
    assert np.allclose(inlet.through(shift), whole)


@pytest.mark.parametrize(
    ("kind", "weight", "attrs", "why"),
    [
        ("Conv", (4, 5, 3), {"pads": [1, 1]}, "pads with zeros"),
        ("Conv", (4, 5, 3), {"auto_pad": "SAME_UPPER"}, "pads with zeros"),
        ("Conv", (5, 1, 3), {"group": 5}, "is grouped"),
        ("ConvTranspose", (5, 4, 3), {}, "not linear in this input"),
    ],
)
def test_what_has_no_inlet(kind: str, weight: Any, attrs: Any, why: str) -> None:
    net = Net(dtype=np.float64)
    output = net.op(kind, net.input("x", [2, 5, 6]), net.matrix(*weight), **attrs)
    node, facts, _ = taken(net, output)
    found = Inlet.of(node, 0, facts)
    assert isinstance(found, str)
    assert why in found


def test_what_has_no_slots() -> None:
    net = Net()
    x = net.input("x", [2, 5])
    for output, why in (
        (net.op("Relu", x), "it is not linear"),
        (net.op("MatMul", x, net.op("Transpose", x)), "none of its operands"),
        (net.op("Conv", net.op("Unsqueeze", x, net.ints(2)), net.op("Unsqueeze", x, net.ints(2))),
         "its weight is not constant"),
    ):  # fmt: skip
        node, facts, _ = taken(net, output)
        found = slots(node, facts)
        assert isinstance(found, str)
        assert why in found
