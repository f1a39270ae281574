"""One row for each normalization operator, with its axes and epsilon."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import TensorProto, helper, parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms


def rows(
    op: str,
    shape: list[int | str] | None,
    *,
    opset: int = 17,
    domain: str = "",
    weights: int = 2,
    outputs: int = 1,
    **attributes: Any,
) -> list[Norm]:
    inputs = ["x", *(f"w{i}" for i in range(weights))]
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, inputs, names, domain=domain, **attributes)
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    given += [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in inputs[1:]]
    out = [helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)]
    imports = [helper.make_opsetid("", opset)] + (
        [helper.make_opsetid(domain, 1)] if domain else []
    )
    model = helper.make_model(helper.make_graph([node], "g", given, out), opset_imports=imports)
    return list(find_norms(Facts(Module(storage.from_proto(model)))))


MS = "com.microsoft"


@pytest.mark.parametrize(
    ("given", "kind", "axes", "epsilon"),
    [
        ({"op": "LayerNormalization"}, "layer_norm", (3,), 1e-5),
        ({"op": "LayerNormalization", "axis": 1, "epsilon": 1e-6}, "layer_norm", (1, 2, 3), 1e-6),
        ({"op": "LayerNormalization", "axis": -2}, "layer_norm", (2, 3), 1e-5),
        ({"op": "RMSNormalization", "opset": 23, "weights": 1}, "rms_norm", (3,), 1e-5),
        ({"op": "SimplifiedLayerNormalization", "weights": 1}, "rms_norm", (3,), 1e-5),
        ({"op": "SkipLayerNormalization", "domain": MS, "weights": 3}, "layer_norm", (3,), 1e-12),
        ({"op": "GroupNorm", "domain": MS, "groups": 2}, "group_norm", (1, 2, 3), 1e-5),
        ({"op": "SkipGroupNorm", "domain": MS, "weights": 3}, "group_norm", (1, 2, 3), 1e-5),
        ({"op": "BiasSoftmax", "domain": MS, "weights": 1, "axis": 3}, "softmax", (3,), None),
        ({"op": "BatchNormalization", "weights": 4}, "batch_norm", (0, 2, 3), 1e-5),
        (
            {"op": "BatchNormalization", "weights": 4, "epsilon": 1e-3},
            "batch_norm",
            (0, 2, 3),
            1e-3,
        ),
        ({"op": "InstanceNormalization"}, "instance_norm", (2, 3), 1e-5),
        ({"op": "GroupNormalization", "opset": 21, "num_groups": 2}, "group_norm", (1, 2, 3), 1e-5),
        ({"op": "LpNormalization", "weights": 0}, "l2_norm", (3,), None),
        ({"op": "LpNormalization", "weights": 0, "axis": 1, "p": 2}, "l2_norm", (1,), None),
        ({"op": "Softmax", "weights": 0}, "softmax", (3,), None),
        ({"op": "Softmax", "weights": 0, "axis": 1}, "softmax", (1,), None),
        ({"op": "Softmax", "weights": 0, "opset": 11}, "softmax", (1, 2, 3), None),
        ({"op": "Softmax", "weights": 0, "opset": 11, "axis": 2}, "softmax", (2, 3), None),
        ({"op": "LogSoftmax", "weights": 0, "axis": -2}, "log_softmax", (2,), None),
    ],
)
def test_rows(
    given: dict[str, Any], kind: str, axes: tuple[int, ...], epsilon: float | None
) -> None:
    (row,) = rows(shape=["N", 4, 6, 8], **given)
    assert (row.kind, row.axes, row.meant) == (kind, axes, epsilon)
    assert (row.input.name, row.output.name, row.recognised, row.reason) == ("x", "y0", True, "")


def test_an_unknown_rank_leaves_axes_that_need_it_open() -> None:
    assert rows("LayerNormalization", None)[0].axes == (-1,)
    assert rows("LayerNormalization", None, axis=1)[0].axes is None
    assert rows("BatchNormalization", None, weights=4)[0].axes is None
    assert rows("Softmax", None, weights=0)[0].axes == (-1,)


def test_what_callers_of_a_function_give_is_open() -> None:
    model = parser.parse_model("""
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[2,3] x) => (float[2,3] y) { y = local.Block <e = 1.0, a = 1, t = 0> (x) }
    <domain: "local", opset_import: ["" : 17]> Block <e, a, t> (x) => (z)
    {
       w = Constant <value_floats = [1.0, 2.0, 3.0]> ()
       y = LayerNormalization <epsilon: float = @e, axis: int = @a> (x, w)
       z = BatchNormalization <training_mode: int = @t> (y, w, w, w, w)
    }
    """)
    layer, batch = find_norms(Facts(Module(storage.from_proto(model))))
    assert (layer.axes, layer.epsilon, layer.recognised) == (None, None, True)
    assert (batch.recognised, batch.reason) == (
        False,
        "training_mode is a parameter of the function",
    )


def test_what_is_no_norm_has_no_row() -> None:
    assert rows("Relu", [2, 3], weights=0) == []
    assert rows("LayerNormalization", [2, 3], domain="elsewhere") == []


def test_another_power_than_two_is_a_near_miss() -> None:
    (row,) = rows("LpNormalization", [2, 3], weights=0, p=1)
    assert (row.kind, row.recognised) == ("l2_norm", False)
    assert row.reason == "p is 1, where an L2 norm has 2"


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes", "reason"),
    [
        (15, 3, {"training_mode": 1}, "training_mode is set"),
        (9, 5, {}, "further outputs"),
        (6, 1, {}, "is_test is not set"),
    ],
)
def test_training_mode_is_a_near_miss(
    opset: int, outputs: int, attributes: dict[str, Any], reason: str
) -> None:
    (row,) = rows(
        "BatchNormalization", ["N", 4, 6], opset=opset, weights=4, outputs=outputs, **attributes
    )
    assert not row.recognised
    assert reason in row.reason
