"""A residual Add and its norm as one operator. Dyadic constants make goldens exact."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser

from onnxnorm import storage
from onnxnorm.passes import lower_skip_norm
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.passes.lower_skip_norm import LowerSkipNorm
from onnxnorm.pipeline import Pipeline
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import computes_the_same, mutated
from tests.networks import transformer

CUDA: Final = LowerSkipNorm("ort-cuda")
MS: Final = ', "com.microsoft" : 1'


def graph(
    body: str,
    opset: int = 17,
    *,
    a: str = "N,3,2",
    b: str = "N,3,2",
    outs: str = "float[N,3,2] y",
    more: str = "",
    imports: str = "",
) -> str:
    return f"""
    <ir_version: {10 if opset > 20 else 8}, opset_import: ["" : {opset}{imports}]>
    main (float[{a}] a, float[{b}] b{more}) => ({outs})
    <float[2] g = {{1, 2}}, float[2] c = {{0.5, -1}}, float[2] v = {{0.25, 4}},
     float[2,2] w = {{1, 0.5, -1, 2}}> {{ {body} }}
    """


LN: Final = "y = LayerNormalization <epsilon = 0.25> (s, g, c)"
RMS: Final = "y = SimplifiedLayerNormalization <epsilon = 0.25> (s, g)"
SKIP: Final = "com.microsoft.SkipLayerNormalization <epsilon: float = 0.25>"
SKIP_RMS: Final = "com.microsoft.SkipSimplifiedLayerNormalization <epsilon: float = 0.25>"

# name -> before, after
GOLDENS: Final[dict[str, tuple[str, str]]] = {
    "one reader": (
        graph(f"s = Add (a, b) {LN}"),
        graph(f"y = {SKIP} (a, b, g, c)", imports=MS),
    ),
    "an RMS norm and several readers": (
        graph(f"s = Add (a, b) {RMS} m = MatMul (y, w) z = Add (s, m)", outs="float[N,3,2] z"),
        graph(
            f"y, , , s = {SKIP_RMS} (a, b, g) m = MatMul (y, w) z = Add (s, m)",
            outs="float[N,3,2] z",
            imports=MS,
        ),
    ),
    "the sum is an output": (
        graph(f"s = Add (a, b) {LN}", outs="float[N,3,2] y, float[N,3,2] s"),
        graph(
            f"y, , , s = {SKIP} (a, b, g, c)",
            outs="float[N,3,2] y, float[N,3,2] s",
            imports=MS,
        ),
    ),
    "a reader between them": (
        graph(f"s = Add (a, b) e = Exp (s) {LN} z = Add (y, e)", outs="float[N,3,2] z"),
        graph(
            f"y, , , s = {SKIP} (a, b, g, c) e = Exp (s) z = Add (y, e)",
            outs="float[N,3,2] z",
            imports=MS,
        ),
    ),
    "a skip without a batch comes second": (
        graph(f"s = Add (a, b) {LN}", a="3,2"),
        graph(f"y = {SKIP} (b, a, g, c)", a="3,2", imports=MS),
    ),
    "the bias of a linear operator": (
        graph(f"m = MatMul (a, w) n = Add (v, m) s = Add (b, n) {LN}", outs="float[N,3,2] y"),
        graph(f"m = MatMul (a, w) y = {SKIP} (m, b, g, c, v)", imports=MS),
    ),
    "the bias of the first operand": (
        graph(f"m = MatMul (a, w) n = Add (m, v) s = Add (n, b) {LN}", outs="float[N,3,2] y"),
        graph(f"m = MatMul (a, w) y = {SKIP} (m, b, g, c, v)", imports=MS),
    ),
    "the standard operator": (
        graph("s = Add (a, b) y = RMSNormalization <epsilon = 0.25> (s, g)", 23),
        graph(f"y = {SKIP_RMS} (a, b, g)", 23, imports=MS),
    ),
    "a Reshape behind the sum": (
        graph(
            "s = Add (a, b) r = Reshape (s, t) y = LayerNormalization <epsilon = 0.25> (r, g, c)"
            " z = Exp (s)",
            a="2,3,2",
            b="2,3,2",
            outs="float[2,3,1,2] y, float[2,3,2] z",
        ).replace("float[2,2] w", "int64[4] t = {2, 3, 1, 2}, float[2,2] w"),
        graph(
            f"s_normalized, , , s = {SKIP} (a, b, g, c) y = Reshape (s_normalized, t) z = Exp (s)",
            a="2,3,2",
            b="2,3,2",
            outs="float[2,3,1,2] y, float[2,3,2] z",
            imports=MS,
        ).replace("float[2,2] w", "int64[4] t = {2, 3, 1, 2}, float[2,2] w"),
    ),
    "four dims between Reshapes": (
        graph(
            "p = Reshape (a, t) s = Add (p, b) r = Reshape (s, f)"
            " y = LayerNormalization <epsilon = 0.25> (r, g, c) z = Add (r, y)",
            a="2,3,2",
            b="2,3,1,2",
            outs="float[2,3,2] z",
        ).replace(
            "float[2,2] w", "int64[4] t = {2, 3, 1, 2}, int64[3] f = {2, 3, 2}, float[2,2] w"
        ),
        graph(
            f"[s_skip] s_skip = Reshape (b, f) y, , , r = {SKIP} (a, s_skip, g, c) z = Add (r, y)",
            a="2,3,2",
            b="2,3,1,2",
            outs="float[2,3,2] z",
            imports=MS,
        ).replace(
            "float[2,2] w", "int64[4] t = {2, 3, 1, 2}, int64[3] f = {2, 3, 2}, float[2,2] w"
        ),
    ),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    before, after = GOLDENS[name]
    assert_rewrites(before, _spelled(after, before), CUDA)


def _spelled(text: str, before: str) -> onnx.ModelProto:
    """A golden without the initializers that nobody reads any more."""
    model = parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    read_before = {n for node in parser.parse_model(before).graph.node for n in node.input}
    kept = [t for t in model.graph.initializer if t.name in read or t.name not in read_before]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph(f"s = Add (a, b) {LN}", b="M,3,2", outs="float[?,3,2] y"), "the same sizes"),
        (graph(f"s = Add (a, b) {LN}", b="N,1,2"), "the same sizes"),
        (graph(f"s = Add (a, b) {LN}", b="2"), "the same sizes"),
        (graph(f"s = Add (a, b) {LN}", b="").replace("float[] b", "float b"), "the same sizes"),
        (
            graph(
                "s = Add (a, b) y, n = LayerNormalization <epsilon = 0.25> (s, g, c)",
                outs="float[N,3,2] y, float[N,3,1] n",
            ),
            "its mean or inverse deviation",
        ),
        (
            graph("s = Add (a, b) y = LayerNormalization <axis = -2> (s, w)", a="N,2,2", b="N,2,2"),
            "more than the last axis",
        ),
        (
            graph("s = Add (a, b) k = Exp (s) y = LayerNormalization (s, d)", more=", float[2] d"),
            "",
        ),
        (
            graph(
                "s = Add (a, b) d = ReduceMax <axes = [0, 1], keepdims = 0> (s)"
                " y = LayerNormalization (s, d)"
            ),
            "computed behind the Add",
        ),
        (
            graph(f"s = Add (a, b) {LN}", a="N,3,1,2", b="N,3,1,2", outs="float[N,3,1,2] y"),
            "the sum has 4 dims",
        ),
        (
            graph(
                "s = Add (a, b) r = Reshape (s, t) y = LayerNormalization (r, g) z = Exp (r)",
                a="2,3,2",
                b="2,3,2",
                outs="float[2,3,1,2] y, float[2,3,1,2] z",
            ).replace("float[2,2] w", "int64[4] t = {2, 3, 1, 2}, float[2,2] w"),
            "has other readers, so another one",
        ),
        (
            graph(
                "s = Add (a, b) r = Reshape (s, f) y = LayerNormalization (r, g)",
                a="2,3,1,2",
                b="2,3,1,2",
                outs="float[2,3,2] y",
            ).replace("float[2,2] w", "int64[3] f = {2, 3, 2}, float[2,2] w"),
            "two Reshapes would be needed",
        ),
        (
            graph(
                "s = Add (a, b) r = Reshape (s, f) y = LayerNormalization (r, k)",
                a="2,3,2",
                b="2,3,2",
                outs="float[2,6] y",
                more=", float[6] k",
            ).replace("float[2,2] w", "int64[2] f = {2, 6}, float[2,2] w"),
            "ends in 6 features",
        ),
    ],
)
def test_refusals(model: str, reason: str) -> None:
    if reason:
        assert_refuses(model, CUDA, reason)
    else:  # a scale that is an input is one as good as any
        assert len(run(model, CUDA).applied) == 1


def test_other_types_are_left_alone() -> None:
    text = graph(f"s = Add (a, b) {LN}").replace("float[", "double[")
    assert_refuses(text, CUDA, "for float32 and float16")


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_other_targets_never_get_it(target: str) -> None:
    done = run(GOLDENS["one reader"][0], LowerSkipNorm(target))
    assert not done.remarks


def test_an_onnxruntime_without_the_kernel_is_named() -> None:
    before = GOLDENS["an RMS norm and several readers"][0]
    assert_refuses(before, LowerSkipNorm("ort-cuda", "1.15"), "needs onnxruntime 1.16")


def test_never_in_a_model_local_function() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    main (float[N,3,2] a, float[N,3,2] b) => (float[N,3,2] y) { y = local.f (a, b) }
    <opset_import: ["" : 17], domain: "local">
    f (a, b) => (y) {
        g = Constant <value_floats = [1.0, 2.0]> ()
        s = Add (a, b)
        y = LayerNormalization (s, g)
    }
    """
    assert_refuses(text, CUDA, "in a model-local function")


def test_constants_behind_the_add_are_stored_where_it_stands() -> None:
    body = "s = Add (a, b) k = Constant <value = float[2] {1, 2}> () "
    text = graph(body + "y = LayerNormalization <epsilon = 0.25> (s, k)")
    done = run(text, CUDA)
    assert_sound(text, done, CUDA)
    assert_parity(text, done.stored.complete())
    assert [n.op_type for n in done.stored.proto.graph.node] == ["SkipLayerNormalization"]


def test_a_body_of_an_if_gets_it_too() -> None:
    text = graph(
        f"q = If (k) <then_branch = t () => (float[N,3,2] y) {{ s = Add (a, b) {LN} }},"
        " else_branch = e () => (float[N,3,2] o) { o = Sub (a, b) }>",
        more=", bool k",
        outs="float[N,3,2] q",
    )
    done = run(text, CUDA)
    assert len(done.applied) == 1
    assert_sound(text, done, CUDA)
    assert_parity(text, done.stored.complete())


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    placement=st.sampled_from(["pre", "post", "mix", "peri"]),
    seed=st.integers(0, 9),
    half=st.booleans(),
)
def test_transformers_agree(placement: Any, seed: int, half: bool) -> None:
    model = transformer(
        placement=placement, seed=seed, layers=2, dtype=np.float16 if half else np.float32
    )
    rules = (LowerNorms("ort-cuda"), CUDA)
    done = Pipeline(rules).run(storage.from_proto(model))
    ops = Counter(n.op_type for n in done.stored.proto.graph.node)
    assert ops["SkipLayerNormalization"] >= 3
    assert_sound(model, done, *rules)
    assert_parity(model, done.stored.complete())


MUTANTS: Final = {
    "epsilon": ('"epsilon", _NORMS[norm.op][1]))}', '"eps", _NORMS[norm.op][1]))}', "one reader"),
    "the sum is lost": (
        "return any(use.node not in own for use in facts.uses(self.total))",
        "return False",
        "an RMS norm and several readers",
    ),
    "the bias is lost": ("+ [found.bias[0]]", "+ [None]", "the bias of the first operand"),
    "the bias is the shift": (
        "inputs += [None] * (4 - len(inputs)) + [found.bias[0]]",
        "inputs[3] = found.bias[0]",
        "the bias of the first operand",
    ),
    "the wrong operand": (
        "return first, skip\n        # The",
        "return first, first\n        # The",
        "one reader",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str) -> None:
    old, new, golden = MUTANTS[name]
    rule = mutated(lower_skip_norm, old, new)["LowerSkipNorm"]("ort-cuda")
    before, _ = GOLDENS[golden]
    assert not computes_the_same(before, rule)
