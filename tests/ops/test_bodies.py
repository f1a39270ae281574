"""The operators as functions: with the library, without it, and in onnx's reference evaluator."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxnorm.errors import UsageError
from onnxnorm.ops import bodies
from onnxnorm.ops.library import describe, register_ops
from tests.ops.calls import FLOAT32, FLOAT64, Array, assert_expected, model_of, needs_library, run

RNG = np.random.default_rng(11)


def example(name: str, dtype: Any = np.float32) -> tuple[list[Array], dict[str, Any]]:
    """Inputs and attributes of each operator."""

    def normal(*shape: int) -> Array:
        result: Array = RNG.standard_normal(shape).astype(dtype)
        return result

    x = normal(2, 6, 5)
    half = np.full([1], 0.5, dtype)
    if "Masked" in name:
        return [x, half, normal(6, 1)], {"axis": -2}
    if name.startswith("TwoPass"):
        return [x], {"axis": 1}
    if name.startswith("Group"):
        return [x, normal(6), normal(6)], {"num_groups": 3}
    scales = [normal(6, 1), normal(6, 1)] if "Layer" in name else [normal(6, 1)]
    return [x, *scales], {"axes": [1]}


def evaluated(model: onnx.ModelProto, inputs: list[Array]) -> Array:
    """What onnx's reference evaluator makes of it."""
    feeds = {f"X{i}": array for i, array in enumerate(inputs)}
    (output,) = ReferenceEvaluator(model).run(None, feeds)
    result: Array = np.asarray(output)
    return result


def assert_everywhere(
    name: str, model: onnx.ModelProto, inputs: list[Array], attributes: dict[str, Any], folder: Path
) -> None:
    """The reference evaluator, the inlined body and the kernel, each against the truth.

    Softmax bodies compute in X's type. Standard operators add all terms of a sum one after the
    other, and subtract a mean that nobody corrects.
    """
    body: dict[str, Any] = {"corrected": False, "run": inputs[0].size}
    if name.startswith("TwoPass"):
        body["computed_in"] = inputs[0].dtype
    assert_expected(evaluated(model, inputs), name, inputs, attributes, **body)
    inlined = run(model, inputs, folder, kernel=False)
    assert_expected(inlined, name, inputs, attributes, **body)
    if describe().path is not None:
        assert_expected(run(model, inputs, folder), name, inputs, attributes)


OPSETS = [15, 17, 18, 20, 21, 22, 23]


@pytest.mark.parametrize("name", bodies.OPERATORS)
@pytest.mark.parametrize("opset", OPSETS)
def test_the_model_agrees_everywhere(name: str, opset: int, tmp_path: Path) -> None:
    inputs, attributes = example(name)
    model = model_of(name, inputs, opset=opset, **attributes)
    assert_everywhere(name, model, inputs, attributes, tmp_path)


@pytest.mark.parametrize("name", bodies.OPERATORS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_types_agree_too(name: str, dtype: Any, tmp_path: Path) -> None:
    inputs, attributes = example(name, dtype)
    model = model_of(name, inputs, **attributes)
    assert_everywhere(name, model, inputs, attributes, tmp_path)


@pytest.mark.parametrize("name", bodies.OPERATORS)
def test_the_checker_takes_the_model_and_shapes_go_through_the_body(name: str) -> None:
    inputs, attributes = example(name)
    model = model_of(name, inputs, **attributes)
    shape = model.graph.output[0].type.tensor_type.shape
    shape.dim.extend(helper.make_tensor_value_info("s", 1, [2, 6, 5]).type.tensor_type.shape.dim)
    onnx.checker.check_model(model, full_check=True)
    assert model.functions[0].opset_import[0].version == 18


def operators_run(model: onnx.ModelProto, inputs: list[Array], folder: Path, *, ours: bool) -> Any:
    """The operator types that a profile of one run shows."""
    path = folder / "profiled.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.log_severity_level = 3
    if ours:
        register_ops(options)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session.run(None, {f"X{i}": array for i, array in enumerate(inputs)})
    events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    return {e["args"]["op_name"] for e in events if e.get("cat") == "Node" and "args" in e}


@needs_library
@pytest.mark.parametrize("name", bodies.OPERATORS)
def test_a_profile_shows_that_the_kernel_ran(name: str, tmp_path: Path) -> None:
    inputs, attributes = example(name)
    model = model_of(name, inputs, **attributes)
    assert operators_run(model, inputs, tmp_path, ours=True) == {name}
    assert name not in operators_run(model, inputs, tmp_path, ours=False)


@needs_library
def test_the_kernel_runs_inside_a_subgraph(tmp_path: Path) -> None:
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    branch = helper.make_graph(
        [bodies.node("TwoPassSoftmax", ["X0"], "inner", axis=0)],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [3, 4])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["cond"], ["Y"], then_branch=branch, else_branch=branch)],
        "outer",
        [helper.make_tensor_value_info("X0", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor("cond", TensorProto.BOOL, [], [True])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    bodies.add_functions(model)
    assert [f.name for f in model.functions] == ["TwoPassSoftmax"]
    for kernel in (True, False):
        found = run(model, [x], tmp_path, kernel=kernel)
        assert_expected(found, "TwoPassSoftmax", [x], {"axis": 0})


def test_adding_functions_twice_changes_nothing() -> None:
    inputs, attributes = example("TwoPassSoftmax")
    model = model_of("TwoPassSoftmax", inputs, **attributes)
    before = model.SerializeToString(deterministic=True)
    assert bodies.add_functions(model).SerializeToString(deterministic=True) == before


def test_a_model_without_our_operators_is_left_alone() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["": 12]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    before = model.SerializeToString(deterministic=True)
    assert bodies.add_functions(model).SerializeToString(deterministic=True) == before


def test_what_a_node_lacks_is_said() -> None:
    with pytest.raises(UsageError, match="no operator 'Softmaxx'"):
        bodies.node("Softmaxx", ["x"], "y")
    with pytest.raises(UsageError, match="num_groups is missing"):
        bodies.node("GroupNormalization", ["x", "s", "b"], "y")
    with pytest.raises(UsageError, match="alpha is missing, or no attribute"):
        bodies.node("TwoPassSoftmax", ["x"], "y", alpha=1)
    with pytest.raises(UsageError, match="was given the inputs"):
        bodies.node("TwoPassMaskedSoftmax", ["x", "", "m"], "y")
    with pytest.raises(UsageError, match="no body at opset 13"):
        bodies.function("GroupNormalization", 13)


def test_float64_is_computed_in_float64() -> None:
    made = bodies.node("ChannelRMSNormalization", ["x", "s"], "y", element_type=11, axes=[1])
    assert {a.name: a.i for a in made.attribute}["stash_type"] == TensorProto.DOUBLE
    assert FLOAT64 != FLOAT32


@needs_library
@pytest.mark.parametrize("name", bodies.OPERATORS)
def test_a_size_that_is_not_known_is_told_as_such(name: str, tmp_path: Path) -> None:
    """Of a Reshape by a computed target onnxruntime knows the rank alone."""
    inputs, attributes = example(name)
    model = model_of(name, inputs, **attributes)
    graph = model.graph
    call = graph.node.pop(0)
    call.input[0], call.output[0] = "reshaped", "called"
    graph.node.extend(
        [
            helper.make_node("Reshape", ["X0", "target"], ["reshaped"]),
            call,
            helper.make_node("Slice", ["called", "zero", "one", "zero"], ["first"]),
            helper.make_node("Add", ["first", "same"], ["Y"]),
        ]
    )
    graph.input.append(helper.make_tensor_value_info("target", TensorProto.INT64, [3]))
    constants = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "same": np.zeros((1, 6, 5), np.float32),
    }
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in constants.items())
    given = [*inputs, np.array([2, 6, 5])]
    found = run(model, given, tmp_path)
    assert found.shape == (1, 6, 5)
    np.testing.assert_allclose(found, run(model, given, tmp_path, kernel=False), atol=1e-5)
