"""Sizes behind shapes that the graph computes, as exporters of dynamic models write them."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.sizes import Sizes
from tests.networks import Net


def sizes_of(net: Net, value: str) -> Any:
    graph = onnx.helper.make_graph(net.nodes, "g", net.inputs, [], list(net.weights.values()))
    graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    module = Module(storage.from_proto(model))
    return Sizes(Facts(module)).of(module.main.values[value])


def _dim(net: Net, x: str, axis: int) -> str:
    picked = net.op("Gather", net.op("Shape", x), net.keep(np.asarray(axis)), axis=0)
    return net.op("Unsqueeze", picked, net.ints(0))


def test_a_target_put_together_from_sizes_and_numbers() -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens", 12])
    target = net.op("Concat", _dim(net, x, 0), _dim(net, x, 1), net.ints(3), net.ints(4), axis=0)
    assert sizes_of(net, net.op("Reshape", x, target)) == ("batch", "tokens", 3, 4)


def test_minus_one_is_what_is_left() -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens", 12])
    assert sizes_of(net, net.op("Reshape", x, net.ints(0, -1, 3, 4)))[2:] == (3, 4)
    target = net.op("Concat", net.ints(-1), _dim(net, x, 1), net.ints(12), axis=0)
    assert sizes_of(net, net.op("Reshape", x, target)) == ("batch", "tokens", 12)


@pytest.mark.parametrize(
    ("given", "wanted", "dims"),
    [
        (("N", 6, 4, 5), (0, 2, -1), ("N", 2, 60)),
        (("N", 6, 4, 5), (-1, 120), ("N", 120)),
        (("N", 6, 4, 5), (0, 0, -1), ("N", 6, 20)),
        (("N", 6, "H"), (0, 6, -1), ("N", 6, "H")),
        (("N", 6, "H", "W"), (0, 6, -1), ("N", 6, "H*W")),
        (("N", 6, "H", "W"), (0, 3, -1), ("N", 3, "2*H*W")),
        ((2, 3, 4), (6, -1), (6, 4)),
        ((2, 3, 4), (6, 4), (6, 4)),
    ],
)
def test_the_dims_that_a_reshape_gives(given: Any, wanted: Any, dims: Any) -> None:
    net = Net()
    assert sizes_of(net, net.op("Reshape", net.input("x", list(given)), net.ints(*wanted))) == dims


def test_a_reshape_shows_that_two_sizes_are_the_same() -> None:
    net = Net()
    x, z = net.input("x", ["batch", "tokens", 12]), net.input("z", ["queries", 12])
    target = net.op("Concat", _dim(net, x, 0), net.ints(1, 12), axis=0)
    y = net.op("Reshape", z, target)
    assert sizes_of(net, y) == (*sizes_of(net, "z")[:1], 1, 12)


def test_of_two_sizes_no_one_is_shown_to_be_another() -> None:
    net = Net()
    x, z = net.input("x", ["batch", "tokens", 12]), net.input("z", ["rows", "columns"])
    net.op("Reshape", z, net.op("Concat", _dim(net, x, 0), _dim(net, x, 1), axis=0), name="y")
    assert (sizes_of(net, "y"), sizes_of(net, "z")) == (("batch", "tokens"), ("rows", "columns"))


def test_an_integer_that_may_be_minus_one_is_no_size() -> None:
    net = Net()
    x, z = net.input("x", ["batch", 12]), net.input("z", ["rows", 12])
    asked = net.input("asked", [1], onnx.TensorProto.INT64)
    target = net.op("Concat", asked, net.ints(12), axis=0)
    for value in (x, z):
        net.op("Reshape", value, target, name=f"{value}y")
    assert sizes_of(net, "xy")[0] != sizes_of(net, "zy")[0]
    assert (sizes_of(net, "x"), sizes_of(net, "z")) == (("batch", 12), ("rows", 12))


def test_a_length_put_together_is_the_same_one_every_time() -> None:
    net = Net()
    past, new = net.input("past", ["p", 12]), net.input("new", ["n", 12])
    joined = net.op("Concat", past, new, axis=0)
    total = net.op("Add", _dim(net, new, 0), _dim(net, past, 0))
    mask = net.op("Expand", net.keep(np.zeros(1)), total)
    assert sizes_of(net, mask) == sizes_of(net, joined)[:1]


def test_arithmetic_on_sizes() -> None:
    net = Net()
    x = net.input("x", ["batch", 56, 56, 12])
    height = net.op("Div", _dim(net, x, 1), net.ints(7))
    target = net.op("Concat", _dim(net, x, 0), height, net.ints(7), height, net.ints(7, 12), axis=0)
    assert sizes_of(net, net.op("Reshape", x, target)) == ("batch", 8, 7, 8, 7, 12)


def test_pads_computed_from_sizes_that_fit() -> None:
    net = Net()
    x = net.input("x", ["batch", 56, 12])
    rest = net.op("Mod", _dim(net, x, 1), net.ints(7))
    pads = net.op("Concat", net.ints(0, 0, 0, 0), rest, net.ints(0), axis=0)
    assert sizes_of(net, net.op("Pad", x, pads)) == ("batch", 56, 12)


@pytest.mark.parametrize(
    ("kind", "attrs", "expected"),
    [
        ("Softmax", {}, ("batch", 6, 12)),
        ("Transpose", {"perm": [2, 0, 1]}, (12, "batch", 6)),
        ("ReduceMean", {"axes": [1], "keepdims": 0}, ("batch", 12)),
        ("ReduceMean", {"axes": [1]}, ("batch", 1, 12)),
        ("Flatten", {"axis": 2}, (None, 12)),
    ],
)
def test_sizes_pass_operators(kind: str, attrs: dict[str, Any], expected: Any) -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens", 12])
    shaped = net.op("Reshape", x, net.op("Concat", _dim(net, x, 0), net.ints(6, 12), axis=0))
    found = sizes_of(net, net.op(kind, shaped, name="y", **attrs))
    assert len(found) == len(expected)
    assert all(e is None or f == e for f, e in zip(found, expected, strict=True))


def test_an_expansion_to_sizes_that_exporters_guard() -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens", 12])
    token = net.keep(np.ones((1, 1, 12)))
    wanted = net.op("Concat", _dim(net, x, 0), net.ints(-1, -1), axis=0)
    ones = net.op("Equal", wanted, net.ints(-1, -1, -1))
    target = net.op("Where", ones, net.ints(1, 1, 1), wanted)
    assert sizes_of(net, net.op("Expand", token, target)) == ("batch", 1, 12)


@pytest.mark.parametrize(
    ("heads", "rank", "expected"),
    [((4, 2), 3, ("batch", 5, 24)), ((2, 2), 3, ("batch", 5, 12)), (None, 4, ("batch", 3, 5, 12))],
)
def test_attention_has_the_features_of_its_values(heads: Any, rank: int, expected: Any) -> None:
    net = Net(opset=23)
    lead = ["batch"] if rank == 3 else ["batch", 3]
    q, k, v = (
        net.input(n, [*lead, tokens, width])
        for n, tokens, width in (("q", 5, 16), ("k", 7, 8), ("v", 7, 12))
    )
    attrs = {} if heads is None else {"q_num_heads": heads[0], "kv_num_heads": heads[1]}
    assert sizes_of(net, net.op("Attention", q, k, v, **attrs)) == expected


def test_a_range_up_to_a_size_has_that_size() -> None:
    net = Net()
    x = net.input("x", ["batch", 12])
    n = net.op("Squeeze", _dim(net, x, 0))
    zero, one, five = (net.keep(np.asarray(i)) for i in (0, 1, 5))
    assert sizes_of(net, net.op("Range", zero, n, one)) == ("batch",)
    assert sizes_of(net, net.op("Range", one, five, one)) == (4,)
    assert sizes_of(net, net.op("Range", one, n, one)) != ("batch",)


def _windows(kind: str, size: tuple[int, int], attrs: dict[str, Any]) -> tuple[Any, Any]:
    """The sizes behind windows: derived where shape inference has given up, and inferred."""
    net = Net()
    x = net.input("x", ["batch", 6 * size[0] * size[1]])
    target = net.op("Concat", _dim(net, x, 0), net.ints(6, *size), axis=0)
    hidden = net.op("Reshape", x, target)
    shown = net.input("shown", [5, 6, *size])
    weight = [net.keep(np.zeros((6, 2, 3, 2), np.float32))] if kind.startswith("Conv") else []
    if kind == "Conv":
        attrs, weight = {**attrs, "group": 2}, [net.keep(np.zeros((4, 3, 3, 2), np.float32))]
    elif not weight:
        attrs = {**attrs, "kernel_shape": [3, 2]}
    given = sizes_of(net, net.op(kind, hidden, *weight, **attrs))
    return given, sizes_of(net, net.op(kind, shown, *weight, **attrs))


@pytest.mark.parametrize("kind", ["AveragePool", "Conv", "ConvTranspose", "MaxPool"])
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_windows_are_as_many_as_shape_inference_says(kind: str, data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(5, 9), st.integers(5, 9)))
    attrs: dict[str, Any] = {
        "strides": data.draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    }
    if kind in ("Conv", "ConvTranspose"):
        attrs["dilations"] = data.draw(st.lists(st.integers(1, 2), min_size=2, max_size=2))
    if data.draw(st.booleans()):
        attrs["pads"] = data.draw(st.lists(st.integers(0, 1), min_size=4, max_size=4))
    elif kind != "ConvTranspose":
        auto = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
        attrs["auto_pad"] = auto
        if auto.startswith("SAME"):
            attrs.pop("dilations", None)
    else:
        attrs["output_padding"] = [s - 1 for s in attrs["strides"]]
    derived, inferred = _windows(kind, size, attrs)
    assert derived == ("batch", *inferred[1:])


_HALF: Final[dict[str, Any]] = {"strides": [2, 2]}


def test_windows_that_keep_an_unknown_size_and_windows_of_one_kind() -> None:
    net = Net()
    x = net.input("x", ["N", 6, "H", 7])
    same, half = net.keep(np.zeros((6, 6, 3, 3), np.float32)), _HALF
    kept = sizes_of(net, net.op("Conv", x, same, pads=[1, 1, 1, 1]))
    assert kept == ("N", 6, "H", 7)
    first, second, third = (
        sizes_of(net, net.op("Conv", x, same, pads=pads, **half))
        for pads in ([1, 1, 1, 1], [0, 1, 2, 1], [0, 1, 0, 1])
    )
    assert first[3] == second[3] == 4
    assert first[2] != third[2] != "H"
    both = net.op("Conv", x, same, pads=[1, 1, 1, 1], **half)
    other = net.op("Conv", net.op("Relu", x), same, pads=[1, 1, 1, 1], **half)
    assert sizes_of(net, net.op("Add", both, other))[2] == sizes_of(net, both)[2]


def test_a_pool_that_rounds_up_makes_sizes_of_which_nothing_is_known() -> None:
    derived, _ = _windows("MaxPool", (6, 7), {"strides": [2, 2], "ceil_mode": 1})
    assert derived[:2] == ("batch", 6)
    assert not any(isinstance(d, int) for d in derived[2:])


def _cut(net: Net, end: str, rows: int, start: int = 0) -> str:
    """The first rows of a table, as many as an input has tokens."""
    table = net.keep(np.zeros((1, rows, 12), np.float32))
    return net.op("Slice", table, net.ints(start), end, net.ints(1))


def test_a_table_that_is_cut_and_fits_has_the_size_at_which_it_is_cut() -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens", 12])
    y = net.input("y", ["batch", "others", 12])
    fits = net.op("Add", x, _cut(net, _dim(net, x, 1), 8))
    assert sizes_of(net, fits) == ("batch", "tokens", 12)
    assert sizes_of(net, net.op("Add", _cut(net, _dim(net, x, 1), 8), x))[1] == "tokens"
    # It may be 1, of another size, or longer than what it is added to.
    assert sizes_of(net, net.op("Add", x, _cut(net, _dim(net, y, 1), 8)))[1] != "tokens"
    assert sizes_of(net, net.op("Add", x, _cut(net, _dim(net, x, 1), 8, start=1)))[1] != "tokens"
    minus = net.op("Sub", _dim(net, x, 1), net.ints(1))
    assert sizes_of(net, net.op("Add", x, _cut(net, minus, 8)))[1] != "tokens"
    assert sizes_of(net, net.op("Add", x, _cut(net, _dim(net, x, 1), 0)))[1] != "tokens"


def test_what_is_gathered_has_the_shape_of_the_indices() -> None:
    net = Net()
    x = net.input("x", ["batch", "tokens"])
    index = net.input("i", ["batch", 1, "some", 2], onnx.TensorProto.INT64)
    assert sizes_of(net, net.op("GatherND", x, index)) == ("batch", 1, "some")
    one = net.input("j", ["batch", 1], onnx.TensorProto.INT64)
    assert sizes_of(net, net.op("GatherND", x, one)) == ("batch", "tokens")
    assert sizes_of(net, net.op("GatherND", x, one, batch_dims=1)) == ("batch",)
    same = net.input("k", ["batch", "some"], onnx.TensorProto.INT64)
    assert sizes_of(net, net.op("GatherElements", x, same, axis=1)) == ("batch", "some")
