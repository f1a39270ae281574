"""Layer and RMS norms over channels as calls of our operators, and that both agree."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from onnxnorm.ops import costs
from onnxnorm.passes import lower_channel_norm
from onnxnorm.passes.lower_channel_norm import LowerChannelNorm
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated
from tests.ops.calls import assert_expected, needs_library

pytestmark = needs_library
RULE: Final = LowerChannelNorm("ort-cpu", True)
IMAGE: Final = "1,2,16,16"


def graph(body: str, dims: str = IMAGE, constants: str = "", **given: Any) -> str:
    dtype, opset = given.get("dtype", "float"), given.get("opset", 17)
    imports = f'"" : {opset}' + (', "onnxnorm" : 1' if given.get("ours") else "")
    return f"""
    <ir_version: {given.get("ir", 8)}, opset_import: [{imports}]>
    main ({dtype}[{dims}] x{given.get("inputs", "")}) => ({dtype}[{given.get("out", dims)}] y)
    <{constants or "float unused = {0}"}> {{ {body} }}
    """


FLAT: Final = "float[2] g = {1, 2}, float[2] b = {0.5, -1}"
WIDE: Final = "float[2,1,1] g = {1, 2}, float[2,1,1] b = {0.5, -1}, float e = {0.25}"
BETWEEN: Final = (
    "p = Transpose <perm: ints = [0, 2, 3, 1]> (x)"
    " n = LayerNormalization <epsilon: float = 0.25> (p, g, b)"
    " y = Transpose <perm: ints = [0, 3, 1, 2]> (n)"
)
SIMPLE: Final = BETWEEN.replace("LayerNorm", "SimplifiedLayerNorm").replace("g, b", "g")


def chain(kind: str, axis: str = "1", behind: str = "w = Mul (q, g) y = Add (w, b)") -> str:
    mean = f"ReduceMean <axes: ints = [{axis}]>"
    body, d = ("", "x") if kind == "rms" else (f"m = {mean} (x) d = Sub (x, m)", "d")
    body += f" p = Mul ({d}, {d}) v = {mean} (p) a = Add (v, e) s = Sqrt (a) q = Div ({d}, s)"
    return f"{body} {behind}"


LN: Final = (
    "y = onnxnorm.ChannelLayerNormalization"
    " <axes: ints = [1], epsilon: float = 0.25, stash_type: int = 1> (x, y_scale, y_bias)"
)
RMS: Final = LN.replace("ChannelLayer", "ChannelRMS").replace(", y_bias", "")
SCALE: Final = "float[2,1,1] y_scale = {1, 2}"
BIAS: Final = "float[2,1,1] y_bias = {0.5, -1}"
# before, its constants, what is written, its constants
GOLDENS: Final[dict[str, tuple[str, str, str, str]]] = {
    "between Transposes": (BETWEEN, FLAT, LN, f"{BIAS}, {SCALE}"),
    "between Transposes, without bias": (
        BETWEEN.replace("g, b", "g"),
        "float[2] g = {1, 2}",
        LN,
        f"float[2,1,1] y_bias = {{0, 0}}, {SCALE}",
    ),
    "written out": (chain("layer"), WIDE, LN, f"{BIAS}, {SCALE}"),
    "an RMS norm written out": (
        chain("rms", behind="y = Mul (q, g)"),
        WIDE.replace("float[2,1,1] b = {0.5, -1}, ", ""),
        RMS,
        SCALE,
    ),
    "an RMS norm between Transposes": (SIMPLE, "float[2] g = {1, 2}", RMS, SCALE),
}


def holds(name: str) -> bool:
    body, constants, after, after_constants = GOLDENS[name]
    try:
        # Outputs behind onnxruntime's own operator have no shape for onnx's checker.
        assert_rewrites(
            graph(body, constants=constants),
            graph(after, constants=after_constants, ours=True),
            RULE,
        )
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    body, constants, after, after_constants = GOLDENS[name]
    done = assert_rewrites(
        graph(body, constants=constants), graph(after, constants=after_constants, ours=True), RULE
    )
    assert [f.name for f in done.stored.proto.functions] == [done.applied[0].into]


def test_nothing_at_all_unless_it_is_asked_for() -> None:
    before = graph(BETWEEN, constants=FLAT)
    for rule in (LowerChannelNorm(), LowerChannelNorm("ort-cpu"), LowerChannelNorm("onnx", True)):
        assert not assert_refuses(before, rule).remarks


REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "few columns": (graph(BETWEEN, "1,2,6,8", FLAT), "faster than the operator between Transposes"),
    "unknown columns": (graph(BETWEEN, "1,2,H,W", FLAT), "with 1 columns or more"),
    "another type": (
        graph(BETWEEN, constants=FLAT.replace("float", "double"), dtype="double"),
        "measured in float32 only",
    ),
    "factors at run time": (
        graph(BETWEEN, constants="float[2] b = {0.5, -1}", inputs=", float[2] g"),
        "its factors are computed at run time",
    ),
    "an RMS norm with a bias": (graph(chain("rms"), constants=WIDE), "adds nothing to its result"),
    "an old IR version": (graph(BETWEEN, constants=FLAT, ir=7), "came with IR version 8"),
    "an old opset": (graph(chain("layer"), constants=WIDE, opset=13), "needs opset 15"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    before, reason = REFUSALS[name]
    assert_refuses(before, RULE, reason)


OTHERS: Final = {
    "no inverse": graph(BETWEEN.replace("[0, 3, 1, 2]", "[0, 3, 2, 1]"), "1,2,16,16", FLAT),
    "the operator alone": graph("y = LayerNormalization (x, g, b)", "1,300,2", FLAT),
    "others read the norm": graph(
        BETWEEN.replace("y = T", "k = Neg (n) z = ReduceSum (k) u = T").replace("(n)\n", "(n)")
        + " y = Add (u, z)",
        constants=FLAT,
    ),
    "the last axis": graph(chain("layer", "-1"), "1,256,2", WIDE.replace("[2,1,1]", "[2]")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none_of_its_business(name: str) -> None:
    assert not assert_refuses(OTHERS[name], RULE).remarks


@given(
    st.lists(st.integers(1, 5), min_size=3, max_size=4),
    st.integers(0, 9),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_size_agrees(dims: list[int], seed: int, epsilon: float, biased: bool) -> None:
    rank, channels = len(dims), dims[1]
    there = [0, *range(2, rank), 1]
    back = [there.index(a) for a in range(rank)]
    rng = np.random.default_rng(seed)
    listed = [", ".join(f"{v:.3f}" for v in rng.uniform(-2, 2, channels)) for _ in "gb"]
    names = "g, b" if biased else "g"
    before = graph(
        f"p = Transpose <perm: ints = {there}> (x)"
        f" n = LayerNormalization <epsilon: float = {epsilon:.7f}> (p, {names})"
        f" y = Transpose <perm: ints = {back}> (n)",
        ",".join(map(str, dims)),
        f"float[{channels}] g = {{{listed[0]}}}, float[{channels}] b = {{{listed[1]}}}",
    )
    with pytest.MonkeyPatch.context() as patch:  # everything pays
        patch.setattr(costs, "channel_norm", lambda *_: None)
        done = run(before, RULE)
        assert len(done.applied) == 1
        assert_sound(before, done, RULE)
        assert_parity(before, done.stored.complete())
    x = rng.standard_normal(dims).astype(np.float32)
    (wanted,) = ReferenceEvaluator(parser.parse_model(before)).run(None, {"x": x})
    (found,) = ReferenceEvaluator(done.stored.complete()).run(None, {"x": x})
    factors = [np.array(v.split(","), np.float32).reshape(-1, *[1] * (rank - 2)) for v in listed]
    inputs = [x, factors[0], factors[1] if biased else np.zeros(1, np.float32)]
    for result in (found, wanted):  # both by the standard operators of a body or of the original
        assert_expected(
            np.asarray(result),
            "ChannelLayerNormalization",
            inputs,
            {"axes": [1], "epsilon": epsilon},
            corrected=False,
        )


MUTANTS: Final[dict[str, tuple[str, str, str]]] = {
    "axis": ('"axes": [place.axis]', '"axes": [place.axis + 1]', "between Transposes"),
    "epsilon": ('"epsilon": epsilon', '"epsilon": 2 * epsilon', "written out"),
    "scale and bias": ('("scale", norm.gamma, 1.0)', '("scale", norm.beta, 1.0)', "written out"),
    "no bias": ('("bias", norm.beta, 0.0)', '("bias", None, 0.0)', "between Transposes"),
    "neutral bias": ("norm.beta, 0.0", "norm.beta, 1.0", "between Transposes, without bias"),
    "kind": ('norm.kind == "layer_norm"', 'norm.kind != "rms"', "an RMS norm written out"),
    "input": ("_Place(before.inputs[0]", "_Place(norm.input", "between Transposes"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, golden = MUTANTS[name]
    mutant = mutated(lower_channel_norm, old, new)["LowerChannelNorm"]("ort-cpu", True)
    monkeypatch.setattr(f"{__name__}.RULE", mutant)
    assert not holds(golden)
