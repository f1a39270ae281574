"""Parity: correct rewrites always pass, wrong ones never, and what cannot be judged says so."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import parity
from onnxnorm.agreement import ParityResult
from onnxnorm.distance import Allowance, distance_of, identical, misplaced, ulp
from onnxnorm.errors import ParityError
from onnxnorm.parity import ParityChecker
from onnxnorm.remark import Region
from onnxnorm.truth import Evaluator, OutOfTime

EPSILON = float(np.float32(1e-5))  # what the file holds, which float64 tells from 1e-5
DTYPES = {"float32": np.float32, "float16": np.float16, "float64": np.float64}


def save(
    folder: Path,
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[str | onnx.ValueInfoProto],
    weights: dict[str, Any] | None = None,
    opset: int = 17,
    domains: Sequence[str] = (),
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "g",
        list(inputs),
        [onnx.ValueInfoProto(name=o) if isinstance(o, str) else o for o in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    path = folder / f"{name}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=9), path)
    return path


def tensor(name: str, shape: Sequence[Any] | None, dtype: Any = np.float32) -> Any:
    number = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, number, shape)


def check(original: Path, candidate: Path, **options: Any) -> ParityResult:
    with ParityChecker(original, **options) as checker:
        return checker.check(candidate)


# --- folding -----------------------------------------------------------------------------------


class LinearBatchNorm:
    """Linear -> BatchNormalization -> Relu of a random shape, and its folded forms.

    The linear operator is a Conv of any rank, or a MatMul in float64, which onnxruntime has no
    convolution for.
    """

    def __init__(self, seed: int, dtype: Any) -> None:
        rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.convolves = dtype != np.float64
        self.rank = int(rng.integers(1, 4)) if self.convolves else 0
        self.group = int(rng.choice([1, 1, 2, 4])) if self.convolves else 1
        self.channels = 4 * int(rng.integers(1, 5))
        kernel = [int(k) for k in rng.integers(1, 4, self.rank)]
        shape = (self.channels, self.channels // self.group, *kernel)
        fan = math.prod(shape[1:])
        # what float16 resolves of an epsilon it resolves only beside a small variance
        spread = 1e-4 if dtype == np.float16 else 1.0
        draw: dict[str, Any] = {
            "weight": rng.standard_normal(shape) * math.sqrt(spread / fan),
            "gamma": rng.uniform(0.5, 1.5, self.channels) * rng.choice([-1, 1, 1], self.channels),
            "beta": rng.standard_normal(self.channels),
            "mean": rng.standard_normal(self.channels) * math.sqrt(spread),
            "variance": rng.uniform(0.5, 2.0, self.channels) * spread,
        }
        if self.convolves and rng.random() < 0.5:
            draw["bias"] = rng.standard_normal(self.channels) * math.sqrt(spread)
        self.weights = {name: value.astype(dtype) for name, value in draw.items()}

    def _save(self, folder: Path, name: str, nodes: Any, weights: dict[str, Any]) -> Path:
        if not self.convolves:
            weights = {**weights, "weight": weights["weight"].T}
        shape = ["N", self.channels, *[6] * self.rank]
        return save(folder, name, nodes, [tensor("x", shape, self.dtype)], ["y"], weights)

    def save_original(self, folder: Path) -> Path:
        names = ["x", "weight", *(["bias"] if "bias" in self.weights else [])]
        linear = (
            helper.make_node("Conv", names, ["c"], group=self.group)
            if self.convolves
            else helper.make_node("MatMul", names, ["c"])
        )
        norm = helper.make_node(
            "BatchNormalization", ["c", "gamma", "beta", "mean", "variance"], ["n"], epsilon=EPSILON
        )
        relu = helper.make_node("Relu", ["n"], ["y"])
        return self._save(folder, "original", [linear, norm, relu], self.weights)

    def save_folded(
        self, folder: Path, *, epsilon: float = EPSILON, axis: int = 0, sign: float = -1.0
    ) -> Path:
        w = {name: value.astype(np.float64) for name, value in self.weights.items()}
        scale = w["gamma"] / np.sqrt(w["variance"] + epsilon)
        shape = [1] * w["weight"].ndim
        shape[axis] = -1
        along = scale if axis == 0 else scale[: w["weight"].shape[axis]]
        weight = w["weight"] * along.reshape(shape)
        bias = (w.get("bias", 0.0) + sign * w["mean"]) * scale + w["beta"]
        folded = {"weight": weight.astype(self.dtype), "bias": bias.astype(self.dtype)}
        linear = (
            [helper.make_node("Conv", ["x", "weight", "bias"], ["n"], group=self.group)]
            if self.convolves
            else [helper.make_node("Gemm", ["x", "weight", "bias"], ["n"])]
        )
        relu = helper.make_node("Relu", ["n"], ["y"])
        return self._save(folder, "folded", [*linear, relu], folded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(40))
def test_correct_folding_is_accepted_and_wrong_folding_is_not(
    seed: int, dtype: str, tmp_path: Path
) -> None:
    model = LinearBatchNorm(seed, DTYPES[dtype])
    with ParityChecker(model.save_original(tmp_path), seed=seed) as checker:
        right = checker.check(model.save_folded(tmp_path))
        assert right.passed, right.failure
        assert not checker.check(model.save_folded(tmp_path, epsilon=1e-6)).passed
        assert not checker.check(model.save_folded(tmp_path, sign=1.0)).passed
        assert not checker.check(model.save_folded(tmp_path, axis=1)).passed


@pytest.mark.parametrize("seed", range(10))
def test_one_number_per_sample_is_enough(seed: int, tmp_path: Path) -> None:
    """A scalar output has eight errors in all; their ratio must not reject a correct rewrite."""
    rng = np.random.default_rng(seed)
    gamma, beta = (rng.standard_normal(64).astype(np.float32) for _ in range(2))
    w = rng.standard_normal((64, 1)).astype(np.float32)
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"]),
        helper.make_node("MatMul", ["n", "w"], ["y"]),
    ]
    weights = {"gamma": gamma, "beta": beta, "w": w}
    original = save(tmp_path, "a", nodes, [tensor("x", [1, 64])], ["y"], weights)
    unit = {"gamma": np.ones(64, np.float32), "beta": np.zeros(64, np.float32)}
    scaled = {
        **unit,
        "w": (gamma[:, None].astype(np.float64) * w).astype(np.float32),
        "b": (beta.astype(np.float64) @ w).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"]),
        helper.make_node("Gemm", ["n", "w", "b"], ["y"]),
    ]
    candidate = save(tmp_path, "b", nodes, [tensor("x", [1, 64])], ["y"], scaled)
    result = check(original, candidate, seed=seed)
    assert result.passed, result.failure
    assert len(result.inputs) == 8


# --- single rules ------------------------------------------------------------------------------


def elementwise(folder: Path, name: str, op: str, constant: Any, shape: Any = ("N", 8)) -> Path:
    constant = np.asarray(constant)
    node = helper.make_node(op, ["x", "c"], ["y"])
    weights = {"c": constant}
    return save(folder, name, [node], [tensor("x", shape, constant.dtype)], ["y"], weights)


def test_an_exact_baseline_leaves_four_ulp(tmp_path: Path) -> None:
    original = elementwise(tmp_path, "a", "Mul", np.float32(1.0))
    within = np.float32(1.0) + 2 * np.finfo(np.float32).eps
    beyond = np.float32(1.0) + 16 * np.finfo(np.float32).eps
    with ParityChecker(original) as checker:
        result = checker.check(original)
        (output,) = result.outputs
        assert output.unoptimized.baseline_error == 0.0
        assert output.unoptimized.budget > 0.0
        assert checker.check(elementwise(tmp_path, "b", "Mul", within)).passed
        assert not checker.check(elementwise(tmp_path, "c", "Mul", beyond)).passed


def test_numbers_are_those_of_the_rule(tmp_path: Path) -> None:
    original = elementwise(tmp_path, "a", "Mul", np.float32(0.1))
    result = check(original, elementwise(tmp_path, "b", "Mul", np.float32(0.11)))
    level = result.outputs[0].unoptimized
    unit = level.error / level.error_ulp
    assert level.budget == pytest.approx(2 * level.baseline_error + 4 * unit)
    assert level.budget_rms == pytest.approx(2 * level.baseline_error_rms + 4 * unit)
    assert level.cosine == pytest.approx(1.0)
    assert level.argmax_agreement == 1.0
    assert not result.passed
    assert "exceeds the budget" in str(result.failure)


def test_ulp_is_the_spacing_of_the_dtype() -> None:
    for scale in (1e-30, 0.1, 1.0, 1.5, 3e4):
        for dtype in (np.float32, np.float64):
            assert ulp(scale, np.dtype(dtype)) == float(np.spacing(dtype(scale)))
    assert ulp(1.0, np.dtype(np.float16)) == 2.0**-10
    assert ulp(1.0, np.dtype(ml_dtypes.bfloat16)) == 2.0**-7
    assert ulp(0.0, np.dtype(np.float32)) == float(np.finfo(np.float32).smallest_subnormal)
    assert ulp(1e9, np.dtype(np.float16)) == 32.0


def test_a_missing_output_fails(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    original = save(tmp_path, "a", nodes, [tensor("x", [4])], ["y", "z"])
    candidate = save(tmp_path, "b", nodes[:1], [tensor("x", [4])], ["y"])
    result = check(original, candidate)
    assert [output.passed for output in result.outputs] == [True, False]
    assert result.failure == "output 'z': the changed model has no such output"


def test_another_dtype_or_shape_fails(tmp_path: Path) -> None:
    inputs = [tensor("x", [4])]
    original = save(tmp_path, "a", [helper.make_node("Exp", ["x"], ["y"])], inputs, ["y"])
    nodes = [helper.make_node("Exp", ["x"], ["e"]),
             helper.make_node("Cast", ["e"], ["y"], to=TensorProto.DOUBLE)]  # fmt: skip
    result = check(original, save(tmp_path, "b", nodes, inputs, ["y"]))
    assert "dtype is float64" in str(result.failure)
    nodes[1] = helper.make_node("Unsqueeze", ["e", "axes"], ["y"])
    axes = {"axes": np.array([0], np.int64)}
    result = check(original, save(tmp_path, "c", nodes, inputs, ["y"], axes))
    assert "shape is [1, 4]" in str(result.failure)


@pytest.mark.parametrize("text_in_the_candidate", [True, False])
def test_text_in_place_of_numbers_fails(text_in_the_candidate: bool, tmp_path: Path) -> None:
    def model(name: str, text: bool) -> Path:
        to = TensorProto.STRING if text else TensorProto.FLOAT
        node = helper.make_node("Cast", ["x"], ["y"], to=to)
        return save(tmp_path, name, [node], [tensor("x", ["N", 4])], ["y"])

    text = text_in_the_candidate
    assert "dtype" in str(check(model("a", not text), model("b", text)).failure)


def test_what_only_the_truth_has_as_infinite_is_said_not_to_be_compared(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "c"], ["a"]),
        helper.make_node("Sub", ["a", "c"], ["b"]),
        helper.make_node("Sub", ["b", "x"], ["d"]),  # 0, and float32's rounding
        helper.make_node("Reciprocal", ["d"], ["y"]),
    ]
    path = save(tmp_path, "a", nodes, [tensor("x", [4])], ["y"], {"c": np.float32(1e4)})
    notes = check(path, path).notes
    assert any("not compared in 'y'" in note for note in notes), notes


def test_nan_and_infinity_stay_where_they_were(tmp_path: Path) -> None:
    inputs = [tensor("x", ["N", 8])]
    log = [helper.make_node("Log", ["x"], ["y"])]
    original = save(tmp_path, "a", log, inputs, ["y"])
    assert check(original, original).passed
    shifted = [helper.make_node("Abs", ["x"], ["p"]), helper.make_node("Log", ["p"], ["y"])]
    result = check(original, save(tmp_path, "b", shifted, inputs, ["y"]))
    assert "NaN or infinite" in str(result.failure)


def test_a_float16_overflow_of_the_original_may_stay_or_go(tmp_path: Path) -> None:
    def model(name: str, first: float, second: float) -> Path:
        nodes = [
            helper.make_node("Mul", ["x", "a"], ["m"]),
            helper.make_node("Mul", ["m", "b"], ["y"]),
        ]
        weights = {"a": np.float16(first), "b": np.float16(second)}
        return save(tmp_path, name, nodes, [tensor("x", ["N", 8], np.float16)], ["y"], weights)

    original = model("a", 65000.0, 1.0 / 1024)
    assert check(original, original).passed
    assert check(original, model("b", 1.0 / 1024, 65000.0)).passed


def test_non_finite_where_either_run_of_the_original_has_it_is_no_fault() -> None:
    truth, off, on = np.ones(3), np.array([1.0, np.inf, 1.0]), np.array([np.inf, 1.0, 1.0])
    for run in (off, on):
        assert misplaced(truth, [off, on], run) == 0
    assert misplaced(truth, [off], on) == 1
    assert misplaced(truth, [off, on], np.array([1.0, 1.0, np.nan])) == 1


@pytest.mark.filterwarnings("error")
def test_unwritten_memory_is_measured_without_a_warning() -> None:
    # the present of a ring buffer, of which onnxruntime writes the new part alone
    signalling = np.array([0x7FA00000, 0], np.uint32).view(np.float32)
    nans = np.array([np.nan, 0.0])
    assert misplaced(nans, [signalling], signalling) == 0
    assert identical(signalling, nans.astype(np.float32))
    assert distance_of("y", [{"y": nans}], [{"y": signalling}]).largest == 0.0


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("Min", "x", "never"), ("Relu", "m", "")], "'y': 0 on all inputs"),
        ([("Min", "x", "never"), ("Log", "m", "")], "'y': NaN or infinite on all inputs"),
        ([("Mul", "x", "much"), ("Sin", "m", "")], "zeros would agree as well"),
        ([("Mul", "x", "none"), ("Relu", "m", "")], "nothing to compare in 'y'"),
    ],
)
def test_an_agreement_that_shows_little_says_so(
    nodes: list[tuple[str, str, str]], said: str, tmp_path: Path
) -> None:
    (first, x, constant), (second, m, _) = nodes
    weights = {
        "never": np.float32(-1.0),
        "much": np.float32(1e10),
        "none": np.zeros((0, 1), np.float32),
    }
    graph = [helper.make_node(first, [x, constant], [m]), helper.make_node(second, [m], ["y"])]
    original = save(tmp_path, "a", graph, [tensor("x", [1, 64])], ["y"], weights)
    result = check(original, original)
    assert result.passed
    assert sum(said in note for note in result.notes) == 1
    other = save(tmp_path, "b", [helper.make_node("Exp", ["x"], ["y"])], [tensor("x", [4])], ["y"])
    assert not any("shows" in note for note in check(other, other).notes)


def test_an_original_that_is_far_off_by_itself_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "large"], ["a"]),
        helper.make_node("Sub", ["a", "large"], ["y"]),
    ]

    def notes(large: float) -> str:
        weights = {"large": np.float32(large)}
        path = save(tmp_path, "a", nodes, [tensor("x", ["N", 4])], ["y"], weights)
        return "".join(check(path, path).notes)

    assert "over half of its digits by itself in 'y'" in notes(2.0**17)
    assert "over half of its digits" not in notes(2.0**9)


def test_outputs_that_only_the_candidate_has_are_named(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Abs", ["y"], ["z"])]
    original = save(tmp_path, "a", nodes[:1], [tensor("x", [4])], ["y"])
    result = check(original, save(tmp_path, "b", nodes, [tensor("x", [4])], ["y", "z"]))
    assert result.passed
    assert "outputs of the changed model alone: 'z'" in result.notes


# --- integers ----------------------------------------------------------------------------------


def arg_max(folder: Path, name: str, table: Any) -> Path:
    """ArgMax of 0 x + table."""
    nodes = [helper.make_node("Mul", ["x", "zero"], ["z"]),
             helper.make_node("Add", ["z", "t"], ["s"]),
             helper.make_node("ArgMax", ["s"], ["i"], axis=-1, keepdims=0),
             helper.make_node("Cast", ["i"], ["y"], to=TensorProto.INT32)]  # fmt: skip
    weights = {"zero": np.float32(0.0), "t": np.asarray(table, np.float32)}
    return save(folder, name, nodes, [tensor("x", ["N", 4])], ["y"], weights)


def test_argmax_may_differ_only_where_the_truth_is_tied(tmp_path: Path) -> None:
    one = np.float32(1.0)
    up = np.nextafter(one, np.float32(2.0))
    original = arg_max(tmp_path, "a", [0.0, one, up, 0.5])
    tied = arg_max(tmp_path, "b", [0.0, up, one, 0.5])
    wrong = arg_max(tmp_path, "c", [0.0, 0.5, 0.25, 1.0])
    with ParityChecker(original) as checker:
        assert checker.check(original).passed
        assert checker.check(tied).passed
        result = checker.check(wrong)
    assert not result.passed
    assert "no tie" in str(result.failure)


def test_places_have_no_distance(tmp_path: Path) -> None:
    """Where the original's ArgMax is elsewhere than the truth's, no further place is allowed."""

    def model(name: str, table: list[float]) -> Path:
        nodes = [helper.make_node("Mul", ["x", "zero"], ["z"]),
                 helper.make_node("Add", ["z", "t"], ["s"]),
                 helper.make_node("Add", ["s", "large"], ["a"]),
                 helper.make_node("ArgMax", ["a"], ["y"], axis=-1)]  # fmt: skip
        weights = {"zero": 0.0, "t": table, "large": float(1 << 24)}
        arrays = {n: np.asarray(v, np.float32) for n, v in weights.items()}
        return save(tmp_path, name, nodes, [tensor("x", ["N", 4])], ["y"], arrays)

    original = model("a", [0.25, -900.0, -900.0, 0.5])
    with ParityChecker(original) as checker:
        assert checker.check(original).passed
        assert checker.check(model("b", [-900.0, -900.0, -900.0, 0.5])).passed
        assert not checker.check(model("c", [-900.0, -900.0, 0.5, -900.0])).passed


def decided(folder: Path, name: str, nodes: list[onnx.NodeProto], constant: Any) -> Path:
    half = np.array([0, 0, 0, 9, 9, 9], np.float32)
    weights = {"c": np.float32(constant), "k": np.array([2], np.int64), "half": half}
    return save(folder, name, nodes, [tensor("x", ["N", 6])], ["y"], weights)


ULP = float(np.finfo(np.float32).eps)
ABOVE = [
    helper.make_node("Add", ["s", "half"], ["a"]),
    helper.make_node("Greater", ["a", "x"], ["b"]),
]
SHIFT = helper.make_node("Mul", ["x", "c"], ["s"])


@pytest.mark.parametrize(
    "nodes",
    [
        pytest.param([helper.make_node("TopK", ["s", "k"], ["v", "y"])], id="TopK"),
        pytest.param([*ABOVE, helper.make_node("Identity", ["b"], ["y"])], id="Greater"),
        pytest.param([helper.make_node("Floor", ["s"], ["f"]),
                      helper.make_node("Cast", ["f"], ["y"], to=TensorProto.INT64)], id="Floor"),
        pytest.param([*ABOVE, helper.make_node("NonZero", ["b"], ["y"])], id="NonZero"),
    ],
)  # fmt: skip
def test_decisions_within_the_budget_are_ties(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    original = decided(tmp_path, "a", [SHIFT, *nodes], 1.0)
    nearly = decided(tmp_path, "b", [SHIFT, *nodes], 1.0 + ULP)
    wrong = decided(tmp_path, "c", [SHIFT, *nodes], -25.0)
    with ParityChecker(original) as checker:
        result = checker.check(nearly)
        assert result.passed, result.failure
        assert not checker.check(wrong).passed


def test_integers_that_cannot_be_traced_must_agree(tmp_path: Path) -> None:
    def model(name: str, step: int) -> Path:
        node = helper.make_node("Add", ["x", "c"], ["y"])
        weights = {"c": np.int64(step)}
        return save(tmp_path, name, [node], [tensor("x", ["N", 4], np.int64)], ["y"], weights)

    original = model("a", 1)
    assert check(original, original).passed
    assert not check(original, model("b", 2)).passed


def test_strings_must_agree(tmp_path: Path) -> None:
    text = helper.make_tensor_value_info("x", TensorProto.STRING, ["N"])
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    original = save(tmp_path, "a", nodes, [text], ["y"])
    assert check(original, original).passed
    nodes = [helper.make_node("Where", ["no", "x", "w"], ["y"])]
    weights = {"no": np.array([False]), "w": np.array(["other"], dtype=object)}
    assert not check(original, save(tmp_path, "b", nodes, [text], ["y"], weights)).passed


# --- quantized, random, odd --------------------------------------------------------------------


def dynamic_linear(folder: Path, name: str, scale: float, wrong: float = 1.0) -> Path:
    """Mul -> DynamicQuantizeLinear -> MatMulInteger, the scale on one side or the other."""
    rng = np.random.default_rng(5)
    weights = {
        "g": (np.linspace(0.5, 1.5, 32) * scale * wrong).astype(np.float32),
        "w": rng.integers(0, 255, (32, 16)).astype(np.uint8),
        "wz": np.uint8(128),
        "r": np.float32(0.01 / scale),
    }
    nodes = [
        helper.make_node("Mul", ["x", "g"], ["m"]),
        helper.make_node("DynamicQuantizeLinear", ["m"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["p"]),
        helper.make_node("Cast", ["p"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["d"]),
        helper.make_node("Mul", ["d", "r"], ["y"]),
    ]
    return save(folder, name, nodes, [tensor("x", ["N", 32])], ["y"], weights)


@pytest.mark.parametrize("seed", range(8))
def test_dynamic_quantization_may_flip_roundings(seed: int, tmp_path: Path) -> None:
    original = dynamic_linear(tmp_path, "a", 1.0)
    with ParityChecker(original, seed=seed) as checker:
        result = checker.check(dynamic_linear(tmp_path, "b", 0.77))
        assert result.passed, result.failure
        assert any("one-ulp" in note for note in result.notes)
        assert not checker.check(dynamic_linear(tmp_path, "c", 1.0, wrong=1.2)).passed


def noisy(folder: Path, name: str, factor: float, op: str = "RandomNormalLike") -> Path:
    nodes = [
        helper.make_node(op, ["x"], ["noise"]),
        helper.make_node("Mul", ["noise", "c"], ["scaled"]),
        helper.make_node("Add", ["x", "scaled"], ["y"]),
    ]
    weights = {"c": np.float32(factor)}
    return save(folder, name, nodes, [tensor("x", ["N", 8])], ["y"], weights)


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike"])
def test_random_operators_draw_the_same_on_both_sides(op: str, tmp_path: Path) -> None:
    original = noisy(tmp_path, "a", 0.1, op)
    with ParityChecker(original) as checker:
        result = checker.check(original)
        assert result.passed, result.failure
        assert any("random" in note for note in result.notes)
        assert not checker.check(noisy(tmp_path, "b", 0.1001, op)).passed


def test_dropout_in_training_mode_drops_the_same(tmp_path: Path) -> None:
    def model(name: str, factor: float) -> Path:
        nodes = [
            helper.make_node("Dropout", ["x", "ratio", "on"], ["d", "mask"]),
            helper.make_node("Mul", ["d", "c"], ["y"]),
        ]
        weights = {"ratio": np.float32(0.5), "on": np.array(True), "c": np.float32(factor)}
        return save(tmp_path, name, nodes, [tensor("x", ["N", 8])], ["y", "mask"], weights)

    original = model("a", 1.0)
    with ParityChecker(original) as checker:
        result = checker.check(original)
        assert result.passed, result.failure
        assert not checker.check(model("b", 1.01)).passed


def test_a_model_that_differs_from_itself_says_so(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["r"])], "b", [], [tensor("r", [4])]
    )
    nodes = [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)]
    weights = {"yes": np.array(True)}
    path = save(tmp_path, "a", nodes, [tensor("x", [4])], ["y"], weights)
    notes = check(path, path).notes
    assert any("differ by themselves" in note for note in notes)


def test_sequences_are_compared_element_by_element(tmp_path: Path) -> None:
    def model(name: str, factor: float) -> Path:
        nodes = [
            helper.make_node("Mul", ["x", "c"], ["z"]),
            helper.make_node("SequenceConstruct", ["x", "z"], ["y"]),
        ]
        weights = {"c": np.float32(factor)}
        return save(tmp_path, name, nodes, [tensor("x", ["N", 4])], ["y"], weights)

    original = model("a", 0.3)
    with ParityChecker(original) as checker:
        same = checker.check(original)
        assert same.passed, same.failure
        assert [output.name for output in same.outputs] == ["y.length", "y[0]", "y[1]"]
        result = checker.check(model("b", 0.31))
    assert [output.passed for output in result.outputs] == [True, True, False]


def split(folder: Path, name: str, last: float, shape: Sequence[Any], axis: int) -> Path:
    """The rows (or columns) of x times 1, 1, ..., 1, last, as a sequence."""
    table = np.ones(16, np.float32)
    table[2:] = last
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=axis, end=axis + 1),
        helper.make_node("Slice", ["t", "zero", "n", "along"], ["c"]),
        helper.make_node("Mul", ["x", "c"], ["z"]),
        helper.make_node("SplitToSequence", ["z", "one"], ["y"], axis=axis),
    ]
    weights = {
        "t": table.reshape((-1, 1) if axis == 0 else (1, -1)),
        "zero": np.array([0]),
        "along": np.array([axis]),
        "one": np.array(1),
    }
    return save(folder, name, nodes, [tensor("x", shape)], ["y"], weights)


def test_a_sequence_that_is_longer_on_a_later_input_is_compared_to_its_end(tmp_path: Path) -> None:
    original = split(tmp_path, "a", 0.3, ["N", 4], 0)
    with ParityChecker(original) as checker:
        assert len(checker.feeds[0].values["x"]) < 3 <= len(checker.feeds[1].values["x"])
        assert checker.check(original).passed
        result = checker.check(split(tmp_path, "b", 0.31, ["N", 4], 0))
    assert [o.name for o in result.outputs if not o.passed] == ["y[2]", "y[3]"]


def test_a_sequence_may_be_shorter_on_a_later_input(tmp_path: Path) -> None:
    original = split(tmp_path, "a", 0.3, [1, "seq"], 1)
    with ParityChecker(original) as checker:
        result = checker.check(original)
        assert result.passed, result.failure
        assert not checker.check(split(tmp_path, "b", 0.31, [1, "seq"], 1)).passed


def test_outputs_that_copy_inputs_and_empty_ones(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Relu", ["e"], ["z"])]
    inputs = [tensor("x", ["N", 4]), tensor("e", [0, 3])]
    path = save(tmp_path, "a", nodes, inputs, ["y", "z"])
    result = check(path, path)
    assert result.passed
    assert [o.unoptimized.error for o in result.outputs] == [0.0, 0.0]


def test_rows_of_a_changed_table_that_no_input_reads_are_counted(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((5000, 4)).astype(np.float32)

    def model(name: str, table: Any) -> Path:
        nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
        inputs = [tensor("x", ["N", "S"], np.int64)]
        return save(tmp_path, name, nodes, inputs, ["y"], {"table": table})

    with ParityChecker(model("a", table)) as checker:
        unread = np.ones(5000, np.bool_)
        for feed in checker.feeds:
            unread[feed.values["x"]] = False
        changed = table.copy()
        changed[np.flatnonzero(unread)[0]] *= 1.5
        result = checker.check(model("b", changed))
        assert result.passed, "no input shows it"
        read = 5000 - int(unread.sum())
        assert f"the inputs read {read} of the 5000 rows of 'table'" in result.notes[0]
        assert not checker.check(model("c", table)).notes


# --- bodies that no input leads to -------------------------------------------------------------


def branches(folder: Path, name: str, factor: float, bound: float) -> Path:
    """If(sum x > bound, factor * x, x / 2)."""

    def product(weight: str, out: str) -> onnx.GraphProto:
        nodes = [helper.make_node("Mul", ["x", weight], [out])]
        return helper.make_graph(nodes, out, [], [tensor(out, ["N", 4])])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "bound"], ["q"]),
        helper.make_node(
            "If", ["q"], ["y"], then_branch=product("c", "t"), else_branch=product("d", "e")
        ),
    ]
    weights = {"c": np.float32(factor), "d": np.float32(0.5), "bound": np.float32(bound)}
    return save(folder, name, nodes, [tensor("x", ["N", 4])], ["y"], weights)


def test_a_branch_that_no_input_takes_is_compared_too(tmp_path: Path) -> None:
    original = branches(tmp_path, "a", 1.5, 1e9)
    with ParityChecker(original) as checker:
        same = checker.check(original)
        assert same.passed, same.failure
        assert "no input leads to the then branch of If 'y': both models were made to enter it" in (
            same.notes
        )
        result = checker.check(branches(tmp_path, "b", 1.51, 1e9))
    assert "in the then branch of If 'y': " in str(result.failure)


def test_a_branch_that_a_constant_never_takes_is_not_compared(tmp_path: Path) -> None:
    def model(name: str, factor: float) -> Path:
        proto = onnx.load(branches(tmp_path, name, factor, 1.0))
        del proto.graph.node[:2]
        proto.graph.initializer.append(numpy_helper.from_array(np.array(False), "q"))
        onnx.save(proto, tmp_path / f"{name}.onnx")
        return tmp_path / f"{name}.onnx"

    result = check(model("a", 1.5), model("b", 1.51))
    assert result.passed, result.failure
    assert not result.notes


def test_a_loop_that_no_input_starts_is_compared_too(tmp_path: Path) -> None:
    def model(name: str, factor: float) -> Path:
        body = helper.make_graph(
            [helper.make_node("Mul", ["v", "c"], ["w"]), helper.make_node("Not", ["k"], ["l"])],
            "body",
            [tensor("i", [], np.int64), tensor("k", [], np.bool_), tensor("v", ["N", 4])],
            [tensor("l", [], np.bool_), tensor("w", ["N", 4])],
        )
        nodes = [
            helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
            helper.make_node("Greater", ["s", "bound"], ["q"]),
            helper.make_node("Loop", ["", "q", "x"], ["y"], body=body),
        ]
        weights = {"c": np.float32(factor), "bound": np.float32(1e9)}
        return save(tmp_path, name, nodes, [tensor("x", ["N", 4])], ["y"], weights)

    original = model("a", 1.5)
    with ParityChecker(original) as checker:
        same = checker.check(original)
        assert same.passed, same.failure
        assert "in the body of Loop 'y': " in str(checker.check(model("b", 1.51)).failure)


def test_a_branch_whose_result_nothing_can_take_is_said_not_to_be_compared(tmp_path: Path) -> None:
    """The branch that no input takes gives another shape, and the product behind needs this one."""

    def branch(name: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [tensor(name, None)])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "bound"], ["q"]),
        helper.make_node(
            "If",
            ["q"],
            ["m"],
            then_branch=branch("t", [helper.make_node("Concat", ["x", "x"], ["t"], axis=1)]),
            else_branch=branch("e", [helper.make_node("Identity", ["x"], ["e"])]),
        ),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    weights = {"bound": np.float32(1e9), "w": np.ones((4, 2), np.float32)}
    path = save(tmp_path, "a", nodes, [tensor("x", ["N", 4])], ["y"], weights)
    result = check(path, path)
    assert result.passed, result.failure
    assert result.notes == (
        "no input leads to the then branch of If 'm': what it computes was not compared",
    )


# --- the runtime's own faults ------------------------------------------------------------------


def test_a_model_that_the_runtime_cannot_run_is_an_error_of_two_lines(tmp_path: Path) -> None:
    nodes = [helper.make_node("Nothing", ["x"], ["y"], domain="example.org")]
    path = save(tmp_path, "a", nodes, [tensor("x", [4])], [tensor("y", [4])],
                domains=["example.org"])  # fmt: skip
    with pytest.raises(ParityError, match="parity could not be checked") as caught:
        check(path, path)
    assert caught.value.exit_code == 1
    assert "--no-parity" in caught.value.hint


def test_a_candidate_that_the_runtime_rejects_fails(tmp_path: Path) -> None:
    original = save(
        tmp_path, "a", [helper.make_node("Exp", ["x"], ["y"])], [tensor("x", [4])], ["y"]
    )
    nodes = [helper.make_node("Reshape", ["x", "s"], ["y"])]
    weights = {"s": np.array([3], np.int64)}
    candidate = save(tmp_path, "b", nodes, [tensor("x", [4])], ["y"], weights)
    result = check(original, candidate)
    assert not result.passed
    assert "the changed model cannot be run" in str(result.failure)


def exposed_norm(folder: Path, name: str, epsilon: float = 1e-5) -> Path:
    """D / sqrt(E[d^2] + epsilon) of d = x - E[y]: no layer norm, though it looks like one."""
    weights = {
        "two": np.float32(2.0),
        "epsilon": np.float32(epsilon),
        "w": np.full(16, 3.0, np.float32),
    }
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], axes=[-1]),
        helper.make_node("Sub", ["x", "m"], ["d"]),
        helper.make_node("Pow", ["d", "two"], ["p"]),
        helper.make_node("ReduceMean", ["p"], ["v"], axes=[-1]),
        helper.make_node("Add", ["v", "epsilon"], ["e"]),
        helper.make_node("Sqrt", ["e"], ["s"]),
        helper.make_node("Div", ["d", "s"], ["n"]),
        helper.make_node("Mul", ["n", "w"], ["y"]),
    ]
    return save(folder, name, nodes, [tensor("x", ["N", 16])], ["y"], weights)


def test_a_fusion_that_the_runtime_gets_wrong_is_reported_and_not_the_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulate it: with optimizations on, the original runs as a model of another epsilon."""
    original, wrong = exposed_norm(tmp_path, "a"), exposed_norm(tmp_path, "b", 0.5)
    honest = exposed_norm(tmp_path, "c")
    run = ParityChecker._run

    def fused(self: ParityChecker, path: Path, feeds: Any, *, optimize: bool) -> Any:
        return run(self, wrong if optimize and path == original else path, feeds, optimize=optimize)

    monkeypatch.setattr(ParityChecker, "_run", fused)
    with ParityChecker(original) as checker:
        result = checker.check(honest)
        assert result.passed, result.failure
        assert any("over half of its digits in 'y'" in note for note in result.notes)
        (output,) = result.outputs
        assert output.optimized is not None
        assert output.optimized.baseline_error == output.unoptimized.baseline_error
        assert checker.check(original).passed  # as wrong as the original, and no more
        assert not checker.check(wrong).passed


def test_where_no_digit_is_right_no_fusion_is_blamed(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "much"], ["m"]), helper.make_node("Sin", ["m"], ["y"])]
    weights = {"much": np.float32(1e10)}
    original = save(tmp_path, "a", nodes, [tensor("x", ["N", 16])], ["y"], weights)
    assert not any("half of its digits" in note for note in check(original, original).notes)


# --- budget and regions ------------------------------------------------------------------------


def layers(folder: Path, name: str, epsilon: float = 1e-5) -> Path:
    """Two layer norms between linear layers; the epsilon of the second is given."""
    rng = np.random.default_rng(3)
    weights = {f"w{i}": rng.standard_normal((16, 16)).astype(np.float32) for i in range(2)}
    weights |= {"gamma": np.ones(16, np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "gamma"], ["b"]),
        helper.make_node("MatMul", ["b", "w1"], ["c"]),
        helper.make_node("LayerNormalization", ["c", "gamma"], ["d"], epsilon=epsilon),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    return save(folder, name, nodes, [tensor("x", ["N", 16])], ["y"], weights)


def test_a_model_beyond_the_budget_is_checked_by_regions(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    region = Region("second", ("c",), ("d",))
    with ParityChecker(original, memory_bytes=2000) as checker:  # a weight takes 2048
        right = checker.check(original, [region])
        assert right.passed, right.failure
        assert "1 region that changed" in right.truth
        assert [output.name for output in right.outputs] == ["d"]
        assert not checker.check(layers(tmp_path, "b", 1e-3), [region]).passed
        elsewhere = replace(region, site="first", inputs=("a",), outputs=("b",))
        assert checker.check(layers(tmp_path, "c", 1e-3), [elsewhere]).passed


@pytest.mark.parametrize(
    "region",
    [
        pytest.param(Region("second", (), ("d",)), id="without inputs"),
        pytest.param(Region("second", ("c",), ()), id="without outputs"),
    ],
)
def test_no_region_is_left_out(region: Region, tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    regions = [Region("first", ("a",), ("b",)), region]
    with ParityChecker(original, memory_bytes=2000) as checker:
        assert checker.check(original, regions).passed
        assert not checker.check(layers(tmp_path, "b", 1e-3), regions).passed


def test_a_region_beyond_the_memory_is_unproven(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    region = Region("second", ("c",), ("d",))
    with ParityChecker(original, memory_bytes=1) as checker:
        result = checker.check(original, [region])
    assert not result.passed
    assert result.unproven == (region,)
    assert any("second: a float64 run does not fit into memory" in note for note in result.notes)


def test_what_is_said_of_many_regions_is_said_once(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    regions = [Region("first", ("a",), ("b",)), Region("second", ("c",), ("d",))]
    with ParityChecker(original, memory_bytes=1) as checker:
        result = checker.check(original, regions)
    notes = [note for note in result.notes if "does not fit into memory" in note]
    assert len(notes) == 1
    assert notes[0].startswith("first and 1 more: ")


def test_regions_that_there_is_no_time_for_are_unproven(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    regions = [Region("first", ("a",), ("b",)), Region("second", ("c",), ("d",))]
    with ParityChecker(original, memory_bytes=2000, budget_seconds=0.0) as checker:
        result = checker.check(original, regions)
    assert not result.passed
    assert result.unproven, "two budgets of no time are over after the first region"
    with ParityChecker(original, memory_bytes=2000) as checker:
        result = checker.check(original, regions)
    assert result.passed
    assert not result.unproven


def test_a_region_that_does_not_run_by_itself_lets_the_whole_be_measured(tmp_path: Path) -> None:
    """Its inputs are drawn one by one, and here one is the shape of the other."""

    def model(name: str, factor: float) -> Path:
        text = f"""
        <ir_version: 8, opset_import: ["" : 17]>
        main (float[N,6] x) => (float[A,B,C] y)
        <int64[2] split = {{2, 3}}, float k = {{{factor}}}>
        {{
            a = Exp (x)
            n = Shape <start = 0, end = 1> (x)
            whole = Concat <axis = 0> (n, split)
            s = Cast <to = 1> (whole)
            shape = Cast <to = 7> (s)
            b = Reshape (a, shape)
            y = Mul (b, k)
        }}
        """
        path = tmp_path / name
        onnx.save(onnx.parser.parse_model(text), path)
        return path

    original = model("a.onnx", 1.5)
    region = Region("pairs", ("a", "s"), ("y",))
    with ParityChecker(original, memory_bytes=1) as checker:
        result = checker.check(original, [region])
        assert result.passed, result.failure
        assert "the part around pairs does not run by itself" in result.notes
        assert "the original's own run" in result.truth
        assert not checker.check(model("b.onnx", 1.501), [region]).passed


def test_without_regions_a_model_beyond_the_budget_is_measured_by_itself(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    with ParityChecker(original, memory_bytes=1) as checker:
        result = checker.check(original)
        assert result.passed, result.failure
        assert "the original's own run" in result.truth
        assert not checker.check(layers(tmp_path, "b", 1e-3)).passed


def test_no_time_left_still_gives_one_sample(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    result = check(original, original, budget_seconds=0.0)
    assert result.passed
    assert len(result.inputs) == 1
    (said,) = (note for note in result.notes if "fit into the time budget" in note)
    assert said.startswith("1 of ")


def test_how_many_samples_were_tried_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an estimate leaves some out and the clock more of them."""
    original = layers(tmp_path, "a")
    every = check(original, original)
    part = parity._ESTIMATE_SLACK * parity._TRUTH_SHARE * 1000 / 2.5
    cost = SimpleNamespace(peak_bytes=0, seconds=lambda: part)
    monkeypatch.setattr(parity, "estimate", lambda stored, shapes: cost)
    run: Callable[..., Any] = Evaluator.run
    turns: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Any:
        turns.append(1)
        if len(turns) > 1:
            raise OutOfTime
        return run(*arguments, **options)

    monkeypatch.setattr(Evaluator, "run", slow)
    result = check(original, original, budget_seconds=1000.0)
    assert result.passed
    assert 2 <= len(turns) < len(every.inputs)
    said = [note for note in result.notes if "samples fit into" in note]
    assert said == [f"{result.samples} of {every.samples} samples fit into the time budget"]


# --- interface ---------------------------------------------------------------------------------


def test_the_truth_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    run: Callable[..., Any] = Evaluator.run

    def counting(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return run(*arguments, **options)

    monkeypatch.setattr(Evaluator, "run", counting)
    original = layers(tmp_path, "a")
    with ParityChecker(original) as checker:
        first = checker.check(original)
        once = len(counted)
        second = checker.check(layers(tmp_path, "b", 1e-3))
    assert once == len(first.inputs)
    assert len(counted) == once
    assert first.passed
    assert not second.passed


def test_json_holds_the_keys_of_the_report(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    data = check(original, original).to_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    keys = {"passed", "truth", "notes", "inputs", "samples", "seconds", "outputs"}
    assert set(data) == keys
    numbers = {"error", "baseline_error", "budget", "error_rms", "baseline_error_rms", "budget_rms",
               "error_ulp", "baseline_error_ulp", "cosine", "argmax_agreement", "passed",
               "reason"}  # fmt: skip
    (output,) = data["outputs"]
    assert set(output) == {"name", "dtype", "optimized", *numbers}
    assert set(output["optimized"]) == numbers


def test_feeds_are_those_the_model_accepts(tmp_path: Path) -> None:
    original = layers(tmp_path, "a")
    with ParityChecker(original) as checker:
        before = checker.feeds
        result = checker.check(original)
        after = checker.feeds
    assert [feed.description for feed in before] == list(result.inputs)
    assert [feed.description for feed in after] == list(result.inputs)


def test_progress_is_reported(tmp_path: Path) -> None:
    told: list[str] = []
    original = layers(tmp_path, "a")
    check(original, original, progress=lambda what, share: told.append(what))
    assert "parity: float64 truth" in told


# --- how many of the original's errors a budget rests on ---------------------------------------


def amplifying(folder: Path, name: str, weight: Any) -> Path:
    """1 + 1e5 (0 x + 1) W: with columns that cancel, a rounding of W shows 1e5 times as large."""
    nodes = [
        helper.make_node("Mul", ["x", "zero"], ["z"]),
        helper.make_node("Add", ["z", "one"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["d"]),
        helper.make_node("Mul", ["d", "large"], ["m"]),
        helper.make_node("Add", ["m", "one"], ["y"]),
    ]
    weights = {"zero": np.float32(0.0), "one": np.float32(1.0), "large": np.float32(1e5)}
    return save(folder, name, nodes, [tensor("x", ["N", 4])], ["y"], {**weights, "w": weight})


def test_a_candidate_that_rounds_otherwise_is_given_a_second_look(tmp_path: Path) -> None:
    cancelling = np.tile(np.array([[0.3], [-0.3], [0.7], [-0.7]], np.float32), (1, 4))
    otherwise, elsewhere = cancelling.copy(), cancelling.copy()
    otherwise[0, 0] = np.nextafter(otherwise[0, 0], np.float32(1.0))
    elsewhere[0, 0] *= np.float32(1.00001)
    original = amplifying(tmp_path, "a", cancelling)
    with ParityChecker(original) as checker:
        assert checker.check(original).notes == ()
        accepted = checker.check(amplifying(tmp_path, "b", otherwise))
        refused = checker.check(amplifying(tmp_path, "c", elsewhere))
    assert accepted.passed
    assert any("one-ulp change" in note for note in accepted.notes)
    assert not refused.passed


def test_with_optimizations_on_the_larger_error_of_the_original_counts() -> None:
    def budget(off: float, on: float, *, misfused: bool = False) -> float:
        allowances = {
            False: {"y": Allowance(off, off)},
            True: {"y": Allowance(on, on)},
        }
        reference = parity._Reference(
            [], [], {False: [], True: []}, allowances, {"y": 1.0}, "float64", [], [], ("y",)
        )
        reference.misfused = frozenset({"y"} if misfused else ())
        return reference.budget("y", True, np.dtype(np.float32))[0]

    room = 4.0 * ulp(1.0, np.dtype(np.float32))
    assert budget(3.0, 1.0) == budget(1.0, 3.0) == 6.0 + room
    assert budget(1.0, 3.0, misfused=True) == 2.0 + room
