"""Group norms, with a SiLU behind them, as calls of our operators, and that both agree."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from onnx.reference import ReferenceEvaluator

from onnxnorm.ops import costs
from onnxnorm.passes import lower_group_norm
from onnxnorm.passes.lower_group_norm import LowerGroupNorm
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated
from tests.ops.calls import assert_expected, needs_library

pytestmark = needs_library
RULE: Final = LowerGroupNorm("ort-cpu", True)
IMAGE: Final = "2,4,32,32"
FLAT: Final = "float[4] g = {1, 2, 4, 8}, float[4] b = {0.5, -1, 0, 1}"


def graph(body: str, dims: str = IMAGE, constants: str = FLAT, **given: Any) -> str:
    dtype, opset = given.get("dtype", "float"), given.get("opset", 21)
    imports = f'"" : {opset}' + (', "onnxnorm" : 1' if given.get("ours") else "")
    return f"""
    <ir_version: {given.get("ir", 10)}, opset_import: [{imports}]>
    main ({dtype}[{dims}] x{given.get("inputs", "")}) => ({dtype}[{dims}] y)
    <{constants}> {{ {body} }}
    """


OPERATOR: Final = "y = GroupNormalization <epsilon: float = 0.25, num_groups: int = 2> (x, g, b)"
NAMED: Final = OPERATOR.replace("y =", "n =")
INSTANCES: Final = (
    "r = Reshape (x, sh) i = InstanceNormalization <epsilon: float = 0.25> (r, one, nil)"
    " f = Shape (x) j = Reshape (i, f) w = Mul (j, g) n = Add (w, b)"
)
INSTANCE_CONSTANTS: Final = (
    "float[4,1,1] g = {1, 2, 4, 8}, float[4,1,1] b = {0.5, -1, 0, 1}, int64[3] sh = {0, 2, -1},"
    " float[2] one = {1, 1}, float[2] nil = {0, 0}"
)
PRIMITIVES: Final = (
    "r = Reshape (x, sh) m = ReduceMean (r, last) d = Sub (r, m) p = Mul (d, d)"
    " v = ReduceMean (p, last) a = Add (v, e) s = Sqrt (a) q = Div (d, s) f = Shape (x)"
    " j = Reshape (q, f) w = Mul (j, g) y = Add (w, b)"
)
GATED: Final = " t = Sigmoid (n) y = Mul (n, t)"
ATTRS: Final = "<epsilon: float = 0.25, num_groups: int = 2, stash_type: int = 1>"
OURS: Final = f"y = onnxnorm.GroupNormalization {ATTRS} (x, y_scale, y_bias)"
SILU: Final = OURS.replace("GroupNormalization", "GroupNormalizationSilu")
WRITTEN: Final = "float[4] y_bias = {0.5, -1, 0, 1}, float[4] y_scale = {1, 2, 4, 8}"

# before, its constants, dims, opset, what is written, its constants
GOLDENS: Final[dict[str, tuple[str, str, str, int, str, str]]] = {
    "the operator": (OPERATOR, FLAT, IMAGE, 21, OURS, WRITTEN),
    "the operator with factors for groups": (
        OPERATOR,
        "float[2] g = {1, 2}, float[2] b = {0.5, -1}",
        IMAGE,
        18,
        OURS,
        "float[4] y_bias = {0.5, 0.5, -1, -1}, float[4] y_scale = {1, 1, 2, 2}",
    ),
    "with a SiLU": (NAMED + GATED, FLAT, "N,4,H,W", 21, SILU, WRITTEN),
    "with a SiLU, the gate first": (
        NAMED + GATED.replace("(n, t)", "(t, n)"),
        FLAT,
        IMAGE,
        21,
        SILU,
        WRITTEN,
    ),
    "InstanceNormalization between Reshapes": (
        INSTANCES.replace("n = Add", "y = Add"),
        INSTANCE_CONSTANTS,
        IMAGE,
        17,
        OURS,
        WRITTEN,
    ),
    "the same with a SiLU": (INSTANCES + GATED, INSTANCE_CONSTANTS, IMAGE, 17, SILU, WRITTEN),
    "written out": (
        PRIMITIVES,
        (
            "float[4,1,1] g = {1, 2, 4, 8}, float[4,1,1] b = {0.5, -1, 0, 1}, float e = {0.25},"
            " int64[3] sh = {0, 2, -1}, int64[1] last = {-1}"
        ),
        IMAGE,
        18,
        OURS,
        WRITTEN,
    ),
    "a gate that others read": (
        NAMED + GATED.replace("y =", "u =") + " y = Add (u, t)",
        FLAT,
        IMAGE,
        21,
        (
            OURS.replace("y = ", "n = ").replace("y_", "n_")
            + GATED.replace("y =", "u =")
            + " y = Add (u, t)"
        ),
        WRITTEN.replace("y_", "n_"),
    ),
}


def both(name: str) -> tuple[str, str]:
    body, constants, dims, opset, after, after_constants = GOLDENS[name]
    return (
        graph(body, dims, constants, opset=opset),
        graph(after, dims, after_constants, opset=opset, ours=True),
    )


def holds(name: str) -> bool:
    try:
        assert_rewrites(*both(name), RULE)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    done = assert_rewrites(*both(name), RULE)
    assert [f.name for f in done.stored.proto.functions] == [done.applied[0].into]


def test_nothing_at_all_unless_it_is_asked_for() -> None:
    before = graph(OPERATOR)
    for rule in (LowerGroupNorm(), LowerGroupNorm("ort-cpu"), LowerGroupNorm("onnx", True)):
        assert not assert_refuses(before, rule).remarks


REFUSALS: Final[dict[str, tuple[str, str]]] = {
    "few elements": (graph(OPERATOR, "2,4,8,8"), "fewer than 2048 elements"),
    "one unknown dim": (graph(OPERATOR, "2,4,8,N"), "fewer than 2048 elements"),
    "unknown channels": (graph(OPERATOR, "2,C,32,32"), "the number of channels is not known"),
    "another type": (
        graph(OPERATOR, constants=FLAT.replace("float", "double"), dtype="double"),
        "measured in float32 only",
    ),
    "factors at run time": (
        graph(OPERATOR, constants="float[4] b = {0, 1, 2, 3}", inputs=", float[4] g"),
        "its factors are computed at run time",
    ),
    "another precision inside": (
        graph(OPERATOR.replace("num_g", "stash_type: int = 11, num_g")),
        "it is not computed in float32",
    ),
    "an old IR version": (
        graph(INSTANCES.replace("n =", "y ="), IMAGE, INSTANCE_CONSTANTS, ir=7, opset=17),
        "came with IR version 8",
    ),
    "an old opset": (
        graph(INSTANCES.replace("n =", "y ="), IMAGE, INSTANCE_CONSTANTS, opset=13),
        "needs opset 15",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    before, reason = REFUSALS[name]
    assert_refuses(before, RULE, reason)


@given(
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([1e-6, 1e-5, 0.1]),
    st.integers(0, 9),
    st.booleans(),
)
@settings(max_examples=20, deadline=None)
def test_any_size_agrees(
    batch: int,
    groups: int,
    each: int,
    spatial: list[int],
    epsilon: float,
    seed: int,
    gated: bool,
) -> None:
    dims, channels = [batch, groups * each, *spatial], groups * each
    rng = np.random.default_rng(seed)
    listed = [", ".join(f"{v:.3f}" for v in rng.uniform(-2, 2, channels)) for _ in "gb"]
    body = NAMED.replace("0.25", f"{epsilon:.7f}").replace("int = 2", f"int = {groups}")
    before = graph(
        body + GATED if gated else body.replace("n =", "y ="),
        ",".join(map(str, dims)),
        f"float[{channels}] g = {{{listed[0]}}}, float[{channels}] b = {{{listed[1]}}}",
    )
    with pytest.MonkeyPatch.context() as patch:  # everything pays
        patch.setattr(costs, "group_norm", lambda *_: None)
        done = run(before, RULE)
        assert [r.into for r in done.applied] == [f"GroupNormalization{'Silu' if gated else ''}"]
        assert_sound(before, done, RULE)
        assert_parity(before, done.stored.complete())
    x = rng.standard_normal(dims).astype(np.float32)
    (wanted,) = ReferenceEvaluator(parser.parse_model(before)).run(None, {"x": x})
    (found,) = ReferenceEvaluator(done.stored.complete()).run(None, {"x": x})
    factors = [np.array(v.split(","), np.float32) for v in listed]
    for result in (found, wanted):  # both by the standard operators of a body or of the original
        assert_expected(
            np.asarray(result),
            f"GroupNormalization{'Silu' if gated else ''}",
            [x, *factors],
            {"num_groups": groups, "epsilon": epsilon},
            corrected=False,
        )


MUTANTS: Final[dict[str, tuple[str, str, str]]] = {
    "groups": ('"num_groups": norm.groups', '"num_groups": 4', "the operator"),
    "epsilon": (
        '"epsilon": float(norm.epsilon',
        '"epsilon": 2 * float(norm.epsilon',
        "written out",
    ),
    "scale and bias": ('("scale", norm.gamma, 1.0)', '("scale", norm.beta, 1.0)', "the operator"),
    "no bias": ('("bias", norm.beta, 0.0)', '("bias", None, 0.0)', "written out"),
    "order of factors": (
        "np.repeat(known,",
        "np.tile(known,",
        "the operator with factors for groups",
    ),
    "which one is gated": ("root = gate[-1]", "root = gate[0]", "with a SiLU"),
    "no gate": ("gate = _silu(norm, facts)", "gate = ()", "with a SiLU"),
    "other readers of the gate": (
        "return (sigmoid, mul) if only_read_by(gated, (mul,), facts) else ()",
        "return (sigmoid, mul)",
        "a gate that others read",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, golden = MUTANTS[name]
    mutant = mutated(lower_group_norm, old, new)["LowerGroupNorm"]("ort-cpu", True)
    monkeypatch.setattr(f"{__name__}.RULE", mutant)
    assert not holds(golden)
