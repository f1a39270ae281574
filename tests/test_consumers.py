"""What reads a value, and where a shift of it can go."""

from __future__ import annotations

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.consumers import Consumers, consumers
from onnxnorm.facts import Facts
from onnxnorm.layout import Layout
from onnxnorm.module import Module
from onnxnorm.shift import Sinks, sinks
from onnxnorm.sizes import find_sizes
from onnxnorm.transfer import Transfer

FEATURES = Layout.whole_axes([-1], [2])


def taken(body: str, constants: str, functions: str = "") -> tuple[Module, Transfer]:
    module = Module(
        storage.from_proto(
            parser.parse_model(
                '<ir_version: 8, opset_import: ["" : 17, "f" : 1]>'
                f"main (float[3,2] x) => (float[3,2] y) <{constants}> {{ {body} }} {functions}"
            )
        )
    )
    facts = Facts(module)
    return module, Transfer(facts, find_sizes(facts))


@pytest.mark.parametrize("doublings", [1, 3, 20])
def test_a_value_that_is_added_to_itself_is_followed_once(doublings: int) -> None:
    adds = " ".join(f"v{i + 1} = Add (v{i}, v{i})" for i in range(doublings))
    body = f"v0 = Identity (x) {adds} y = MatMul (v{doublings}, w)"
    module, transfer = taken(body, "float[2,2] w = {1, 2, 3, 4}")
    found = consumers(module.main.values["x"], FEATURES, transfer)
    assert isinstance(found, Consumers)
    assert [c.inlet.node.op for c in found.places] == ["MatMul"]
    assert len(found.between) == doublings + 1


@pytest.mark.parametrize(("beta", "taken_up"), [("float = 1.0", True), ("float = @scale", False)])
def test_a_bias_that_is_scaled_by_a_parameter_takes_no_shift(beta: str, taken_up: bool) -> None:
    function = (
        '<domain: "f", opset_import: ["" : 17]> linear <scale> (a, b) => (s) {'
        " w = Constant <value = float[2,2] {1, 2, 3, 4}> () c = Constant <value = float[2]"
        f" {{1, 2}}> () g = Gemm <beta: {beta}> (b, w, c) s = Add (a, g) }}"
    )
    module, transfer = taken("y = f.linear <scale = 2.0> (x, x)", "", function)
    scope = next(s for s in module.scopes if s.is_function)
    found = sinks(scope.values["a"], FEATURES, transfer)
    assert isinstance(found, Sinks) == taken_up


@pytest.mark.parametrize(("mode", "passes"), [("half_pixel", True), ("tf_crop_and_resize", False)])
def test_a_resize_that_fills_in_a_value_is_not_passed(mode: str, passes: bool) -> None:
    body = (
        "i = Reshape (x, s)"
        f' r = Resize <coordinate_transformation_mode = "{mode}", extrapolation_value = 3.0>'
        " (i, roi, scales) y = Reshape (r, t)"
    )
    constants = (
        "int64[4] s = {1, 1, 3, 2}, int64[2] t = {3, 2},"
        " float[8] roi = {0, 0, 0, 0, 1, 1, 2, 1}, float[4] scales = {1, 1, 1, 1}"
    )
    module, transfer = taken(body, constants)
    node = next(n for n in module.nodes() if n.op == "Resize")
    assert isinstance(transfer.moved(node, FEATURES), Layout) == passes
