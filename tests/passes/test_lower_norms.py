"""Write norms as the operators of the target. Dyadic constants make goldens exact."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxnorm import lowering, reference, spellings
from onnxnorm.errors import VerificationError
from onnxnorm.lowering import TARGETS
from onnxnorm.passes import lower_norms
from onnxnorm.passes.lower_norms import LowerNorms
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, assert_sound, run
from tests.mutants import mutated

LAST: Final = "float eps = {0.25}, float[2] g = {1, 2}, float[2] b = {0.5, -1}"
CHANNEL: Final = "float eps = {0.25}, float[2,1,1] g = {1, 2}, float[2,1,1] b = {0.5, -1}"
NCHW: Final = "N,2,3,3"


def graph(
    body: str, constants: str = "", opset: int = 17, dims: str = "N,3,2", dtype: str = "float"
) -> str:
    listed = f"<{constants}>" if constants else ""
    return f"""
    <ir_version: {11 if opset > 20 else 8}, opset_import: ["" : {opset}]>
    main ({dtype}[{dims}] x) => ({dtype}[{dims}] y) {listed} {{ {body} }}
    """


def mean(out: str, of: str, axes: str, opset: int) -> str:
    if opset < 18:
        return f"{out} = ReduceMean <axes: ints = [{axes}]> ({of})\n"
    return f"{out} = ReduceMean ({of}, axes)\n"


def norm(
    kind: str,
    axes: str = "-1",
    opset: int = 17,
    affine: str = "w = Mul (q, g) y = Add (w, b)",
    constants: str = LAST,
    **where: Any,
) -> str:
    """A model with a norm that no exporter writes quite so."""
    d = "x"
    body = ""
    if kind == "layer":
        d = "d"
        body = mean("m", "x", axes, opset) + "d = Sub (x, m)\n"
    body += f"p = Mul ({d}, {d})\n" + mean("v", "p", axes, opset)
    body += f"a = Add (v, eps) s = Sqrt (a) q = Div ({d}, s) {affine}"
    if opset >= 18:
        constants += f", int64[1] axes = {{{axes}}}"
    return graph(body, constants, opset, **where)


RMS: Final = "y = Mul (q, g)"
GROUPED: Final = (
    "r = Reshape (x, gs) m = ReduceMean <axes: ints = [-1]> (r) d = Sub (r, m) p = Mul (d, d)"
    " v = ReduceMean <axes: ints = [-1]> (p) a = Add (v, eps) s = Sqrt (a) q = Div (d, s)"
    " u = Reshape (q, back) w = Mul (u, g) y = Add (w, b)"
)
GROUP_CONSTANTS: Final = (
    "float eps = {0.25}, float[4,1,1] g = {1, 2, 4, 8}, float[4,1,1] b = {0.5, -1, 0, 1},"
    " int64[3] gs = {0, 2, -1}, int64[4] back = {0, 4, 3, 3}"
)
SOFT: Final = (
    "m = ReduceMax <axes: ints = [-1]> (x) d = Sub (x, m) e = Exp (d) t = ReduceSum (e, last) "
)
LAST_AXIS: Final = "int64[1] last = {-1}"
SCALE: Final = "float[2] y_scale = {1, 2}"
SCALE_BIAS: Final = "float[2] y_bias = {0.5, -1}, float[2] y_scale = {1, 2}"
UNUSED: Final = "float[2] b = {0.5, -1}, "
CHAIN: Final = (
    "[y_shifted] y_shifted = Add (y_variance, y_epsilon)"
    " [y_deviation] y_deviation = Sqrt (y_shifted)"
)
MEAN: Final = "ReduceMean <axes: ints = [-1], keepdims: int = 1>"
LN: Final = "y = LayerNormalization <axis: int = -1, epsilon: float = 0.25> (x, y_scale, y_bias)"

GOLDENS: Final[dict[str, tuple[str, str, str]]] = {
    "LayerNormalization at 17": ("onnx", norm("layer"), graph(LN, SCALE_BIAS)),
    "LayerNormalization at 18": ("onnx", norm("layer", opset=18), graph(LN, SCALE_BIAS, 18)),
    "LayerNormalization below 17 for onnxruntime": (
        "ort-cpu",
        norm("layer", opset=13),
        graph(LN, SCALE_BIAS, 13),
    ),
    "LayerNormalization without a bias": (
        "onnx",
        norm("layer", affine=RMS).replace(UNUSED[:-2], "float k = {1}"),
        graph(LN.replace(", y_bias", ""), "float k = {1}, " + SCALE),
    ),
    "the chain below 17": (
        "onnx",
        norm("layer", opset=13),
        graph(
            f"[y_mean] y_mean = {MEAN} (x) [y_centred] y_centred = Sub (x, y_mean)"
            " [y_square] y_square = Pow (y_centred, y_two)"
            f" [y_variance] y_variance = {MEAN} (y_square) {CHAIN}"
            " [y_normalized] y_normalized = Div (y_centred, y_deviation)"
            " [y_scaled] y_scaled = Mul (y_normalized, y_scale) y = Add (y_scaled, y_bias)",
            "float[2] y_bias = {0.5, -1}, float y_epsilon = {0.25}, float[2] y_scale = {1, 2},"
            " float y_two = {2}",
            13,
        ),
    ),
    "between Transposes": (
        "onnx",
        norm("layer", "1", constants=CHANNEL, dims=NCHW),
        graph(
            "[y_moved] y_moved = Transpose <perm: ints = [0, 2, 3, 1]> (x)"
            " [y_normalized] y_normalized = LayerNormalization <axis: int = -1,"
            " epsilon: float = 0.25> (y_moved, y_scale, y_bias)"
            " y = Transpose <perm: ints = [0, 3, 1, 2]> (y_normalized)",
            SCALE_BIAS,
            dims=NCHW,
        ),
    ),
    "RMSNormalization": (
        "onnx",
        norm("rms", opset=23, affine=RMS),
        graph(
            "y = RMSNormalization <axis: int = -1, epsilon: float = 0.25> (x, y_scale)",
            UNUSED + SCALE,
            23,
        ),
    ),
    "SimplifiedLayerNormalization": (
        "ort-cpu",
        norm("rms", affine=RMS),
        graph(
            "y = SimplifiedLayerNormalization <axis: int = -1, epsilon: float = 0.25>"
            " (x, y_scale)",
            UNUSED + SCALE,
        ),
    ),
    "the chain of an RMS norm at 17": (
        "onnx",
        norm("rms", affine=RMS),
        graph(
            f"[y_square] y_square = Pow (x, y_two) [y_variance] y_variance = {MEAN} (y_square)"
            f" {CHAIN} [y_normalized] y_normalized = Div (x, y_deviation)"
            " y = Mul (y_normalized, y_scale)",
            UNUSED + "float y_epsilon = {0.25}, float[2] y_scale = {1, 2}, float y_two = {2}",
        ),
    ),
    "the chain of an RMS norm at 18": (
        "onnx",
        norm("rms", opset=18, affine=RMS),
        graph(
            "[y_square] y_square = Pow (x, y_two)"
            " [y_variance] y_variance = ReduceMean <keepdims: int = 1> (y_square, y_variance_axes)"
            f" {CHAIN} [y_normalized] y_normalized = Div (x, y_deviation)"
            " y = Mul (y_normalized, y_scale)",
            UNUSED + "float y_epsilon = {0.25}, float[2] y_scale = {1, 2}, float y_two = {2},"
            " int64[1] y_variance_axes = {-1}",
            18,
        ),
    ),
    "InstanceNormalization": (
        "onnx",
        norm("layer", "2, 3", constants=CHANNEL, dims=NCHW),
        graph(
            "y = InstanceNormalization <epsilon: float = 0.25> (x, y_scale, y_bias)",
            SCALE_BIAS,
            dims=NCHW,
        ),
    ),
    "a group norm": (
        "onnx",
        graph(GROUPED, GROUP_CONSTANTS, dims="N,4,3,3"),
        graph(
            "[y_grouped] y_grouped = Reshape (x, y_groups)"
            " [y_normalized] y_normalized = InstanceNormalization <epsilon: float = 0.25>"
            " (y_grouped, y_ones, y_zeros) [y_shape] y_shape = Shape (x)"
            " [y_ungrouped] y_ungrouped = Reshape (y_normalized, y_shape)"
            " [y_scaled] y_scaled = Mul (y_ungrouped, y_scale) y = Add (y_scaled, y_bias)",
            "float[4,1,1] y_bias = {0.5, -1, 0, 1}, int64[3] y_groups = {0, 2, -1},"
            " float[2] y_ones = {1, 1}, float[4,1,1] y_scale = {1, 2, 4, 8},"
            " float[2] y_zeros = {0, 0}",
            dims="N,4,3,3",
        ),
    ),
    "Softmax": (
        "onnx",
        graph(SOFT + "y = Div (e, t)", LAST_AXIS, 13),
        graph("y = Softmax <axis: int = 2> (x)", "", 13),
    ),
    "LogSoftmax": (
        "onnx",
        graph(SOFT + "l = Log (t) y = Sub (d, l)", LAST_AXIS, 13),
        graph("y = LogSoftmax <axis: int = 2> (x)", "", 13),
    ),
    "float16 with its statistics in float32": (
        "onnx",
        norm("layer", affine="w = Mul (q, g) o = Add (w, b) y = Cast <to: int = 10> (o)",
             dtype="float16").replace("m = R", "h = Cast <to: int = 1> (x) m = R")
        .replace("(x)\n", "(h)\n").replace("Sub (x", "Sub (h"),
        graph(LN, "float16[2] y_bias = {14336, 48128}, float16[2] y_scale = {15360, 16384}",
              dtype="float16"),
    ),
    "float16 that goes on in float32": (
        "onnx",
        norm("layer", dtype="float16").replace("m = R", "h = Cast <to: int = 1> (x) m = R")
        .replace("(x)\n", "(h)\n").replace("Sub (x", "Sub (h")
        .replace("float16[N,3,2] y", "float[N,3,2] y"),
        graph("[y_wide] y_wide = Cast <to: int = 1> (x) " + LN.replace("(x,", "(y_wide,"),
              SCALE_BIAS, dtype="float16").replace("float16[N,3,2] y", "float[N,3,2] y"),
    ),
    "a near miss that onnxruntime would fuse": (
        "onnx",
        norm("layer", constants="float four = {4}, " + LAST).replace("Mul (d, d)", "Pow (d, four)"),
        norm("layer", constants="float four = {4}, " + LAST).replace("Mul (d, d)", "Pow (d, four)")
        .replace("q = Div (d, s)", "[q_inverse] q_inverse = Reciprocal (s) q = Mul (d, q_inverse)"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_goldens(name: str) -> None:
    target, before, after = GOLDENS[name]
    done = assert_rewrites(before, after, LowerNorms(target))
    assert len(done.applied) == 1
    assert done.applied[0].site.startswith("lower-norms:")


# ** what stays, and why **


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (norm("layer").replace("y) <", "y, float[N,3,1] m) <"), "its result 'm' is"),
        (
            norm("layer").replace("y) <", "y, float[N,3,1] k) <").replace("q =", "k = Cos (m) q ="),
            "is also read by node 'k'",
        ),
        (norm("layer", dtype="double", constants=LAST.replace("float", "double")), "for double"),
        (
            norm("layer", affine="y = Identity (q)", constants="float eps = {0.25}", dims="N,T,D"),
            "the sizes of the normalized axes are not known",
        ),
        (
            norm("layer", "2, 3", 13, "y = Identity (q)", "float eps = {0.25}", dims="N,2,1,1"),
            "it normalizes single values",
        ),
        (norm("layer", "1", 13, constants=CHANNEL, dims=NCHW), "it needs opset 17"),
        (norm("rms", "1", 17, RMS, CHANNEL, dims=NCHW), "it needs opset 23"),
        (
            graph("y = LayerNormalization (x, g, b)", LAST),
            "",
        ),
        (GOLDENS["the chain below 17"][2], "fuses to LayerNormalization already"),
        (GOLDENS["the chain of an RMS norm at 17"][2], "fuses to an RMS norm already"),
        (GOLDENS["a group norm"][2], "it is written as InstanceNormalization between Reshapes"),
        (
            graph("s = ReduceL2 <axes = [-1]> (x) a = Max (s, eps) y = Div (x, a)", LAST, 13),
            "no cheaper spelling of an L2 norm",
        ),
    ],
)  # fmt: skip
def test_refusals(before: str, reason: str) -> None:
    assert_refuses(before, LowerNorms(), *([reason] if reason else []))


def test_a_refusal_names_the_node_and_gives_advice() -> None:
    before = norm("layer").replace("y) <", "y, float[N,3,1] m) <")
    (remark,) = assert_refuses(before, LowerNorms()).remarks
    assert (remark.outcome, remark.at) == ("refused", "m")
    assert "Leave that value out" in remark.advice


def test_what_could_not_be_confirmed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_norms, "confirm", lambda norm, facts: "it is Tuesday")
    assert_refuses(norm("layer"), LowerNorms(), "could not be confirmed on random inputs: it is")


def test_what_is_confirmed_to_be_wrong_is_never_committed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(reference, "canonical", lambda norm, x: x)
    with pytest.raises(VerificationError, match="do not agree with the layer_norm"):
        run(norm("layer"), LowerNorms())
    assert list(tmp_path.glob("*/nodes.onnx"))


def test_other_kinds_are_for_other_passes() -> None:
    before = graph(
        "c = Conv (x, w) k = Mul (c, g) y = Add (k, b)",
        CHANNEL + ", float[2,2,1,1] w = {1, 2, 3, 4}",
        dims=NCHW,
    )
    assert not assert_refuses(before, LowerNorms()).remarks


# ** where it stands **


def test_in_the_bodies_of_control_flow() -> None:
    inner = norm("layer", opset=17)
    body = inner[inner.index("{ m =") + 1 : inner.rindex("}")]
    looped = re.sub(r"\bx\b", "state", body)
    before = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (bool flag, int64 n, float[N,3,2] x) => (float[N,3,2] out, float[N,3,2] loops) <{LAST}>
    {{
      out = If (flag) <then_branch = then () => (float[N,3,2] y) {{ {body} }},
                       else_branch = other () => (float[N,3,2] z) {{ z = Neg (x) }}>
      loops = Loop (n, flag, x) <body = trip (int64 i, bool k, float[N,3,2] state)
        => (bool go, float[N,3,2] y) {{ go = Identity (k) {looped} }}>
    }}
    """
    done = run(before, LowerNorms())
    assert sorted(r.site for r in done.applied) == [
        "lower-norms:loops/body/y",
        "lower-norms:out/then_branch/y",
    ]
    bodies = [a.g for n in done.stored.proto.graph.node for a in n.attribute if a.HasField("g")]
    ops = sorted([n.op_type for n in b.node] for b in bodies)
    assert ops == [["Identity", "LayerNormalization"], ["LayerNormalization"], ["Neg"]]
    assert_sound(before, done, LowerNorms())
    assert_parity(before, done.stored.complete())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [13, 17])
def test_the_runtimes_own_operators_are_not_for_functions(target: str, opset: int) -> None:
    # onnxruntime ends with a segmentation fault where a function has them.
    for kind, affine in (("layer", "w = Mul (q, g) y = Add (w, b)"), ("rms", RMS)):
        inner = norm(kind, opset=opset, affine=affine)
        body = inner[inner.index(" { p =" if kind == "rms" else " { m =") + 2 : inner.rindex("}")]
        before = f"""
        <ir_version: 9, opset_import: ["" : {opset}, "local" : 1]>
        main (float[N,3,2] x) => (float[N,3,2] z) {{ z = local.Norm (x) }}
        <domain: "local", opset_import: ["" : {opset}]> Norm (x) => (y)
        {{ eps = Constant <value_float = 0.25> () g = Constant <value_floats = [1.0, 2.0]> ()
           b = Constant <value_floats = [0.5, -1.0]> () {body} }}
        """
        done = run(before, LowerNorms(target))
        (function,) = done.stored.proto.functions
        ops = {n.op_type for n in function.node}
        assert "SimplifiedLayerNormalization" not in ops
        assert ("LayerNormalization" in ops) == (kind == "layer" and opset == 17)
        assert_parity(before, done.stored.complete())


def test_in_a_function() -> None:
    inner = norm("layer", affine="y = Identity (q)")
    body = inner[inner.index("{ m =") + 1 : inner.rindex("}")]
    before = f"""
    <ir_version: 9, opset_import: ["" : 17, "local" : 1]>
    main (float[N,3,2] x) => (float[N,3,2] z) {{ k = local.Norm (x) z = local.Norm (k) }}
    <domain: "local", opset_import: ["" : 17]> Norm (x) => (y)
    {{ eps = Constant <value_float = 0.25> () {body} }}
    """
    done = run(before, LowerNorms())
    assert [r.site for r in done.applied] == ["lower-norms:local.Norm/q"]
    (function,) = done.stored.proto.functions
    assert "LayerNormalization" in [n.op_type for n in function.node]
    assert_sound(before, done, LowerNorms())
    assert_parity(before, done.stored.complete())


def test_two_norms_that_share_their_statistics_are_two_operators() -> None:
    affine = "w = Mul (q, g) y = Add (w, b) k = Div (d, s) z = Mul (k, b)"
    before = norm("layer", affine=affine).replace("y) <", "y, float[N,3,2] z) <")
    done = run(before, LowerNorms())
    assert [n.op_type for n in done.stored.proto.graph.node] == ["LayerNormalization"] * 2
    assert_sound(before, done, LowerNorms())
    assert_parity(before, done.stored.complete())


def test_a_norm_behind_a_norm_is_lowered_too() -> None:
    twice = (
        "w = Mul (q, g) y0 = Add (w, b)"
        " m1 = ReduceMean <axes: ints = [-1]> (y0) d1 = Sub (y0, m1) p1 = Mul (d1, d1)"
        " v1 = ReduceMean <axes: ints = [-1]> (p1) a1 = Add (v1, eps) s1 = Sqrt (a1)"
        " y = Div (d1, s1)"
    )
    done = run(norm("layer", affine=twice), LowerNorms())
    assert [n.op_type for n in done.stored.proto.graph.node] == ["LayerNormalization"] * 2
    assert_parity(norm("layer", affine=twice), done.stored.complete())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", GOLDENS)
def test_every_target_passes_the_verifier_and_loads(name: str, target: str) -> None:
    before = GOLDENS[name][1]
    done = run(before, LowerNorms(target))
    assert_sound(before, done, LowerNorms(target))
    onnxruntime.InferenceSession(
        done.stored.complete().SerializeToString(), providers=["CPUExecutionProvider"]
    )


# ** properties **


@dataclass(frozen=True)
class Case:
    """A norm of some tensor.

    Attributes:
        kind: `layer`, `rms`, `softmax` or `log_softmax`.
        shape: Of the input.
        axes: What it is over.
        known: How many dims are said, from the right.
        gamma: The axes along which gamma varies; None for no gamma.
        beta: As of gamma.
        half: Whether input and output are float16, the statistics float32.
        opset: Of the model.
        target: Of the pass.
        seed: Of the constants.
    """

    kind: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    known: int
    gamma: tuple[int, ...] | None
    beta: tuple[int, ...] | None
    half: bool
    opset: int
    target: str
    seed: int

    def model(self) -> onnx.ModelProto:
        rng = np.random.default_rng(self.seed)
        weights: list[onnx.TensorProto] = []
        nodes: list[onnx.NodeProto] = []

        def constant(name: str, values: Any, dtype: Any = np.float32) -> str:
            weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
            return name

        def add(op: str, *inputs: str, **attributes: Any) -> str:
            out = f"v{len(nodes)}"
            nodes.append(helper.make_node(op, inputs, [out], **attributes))
            return out

        def reduce(op: str, of: str, since: int) -> str:
            if self.opset < since:
                return add(op, of, axes=list(self.axes))
            return add(op, of, constant(f"axes{len(nodes)}", self.axes, np.int64))

        x = add("Cast", "x", to=1) if self.half else "x"
        if "softmax" in self.kind:
            d = add("Sub", x, reduce("ReduceMax", x, 18))
            e = add("Exp", d)
            total = reduce("ReduceSum", e, 13)
            y = add("Div", e, total) if self.kind == "softmax" else add("Sub", d, add("Log", total))
        else:
            d = add("Sub", x, reduce("ReduceMean", x, 18)) if self.kind == "layer" else x
            v = reduce("ReduceMean", add("Mul", d, d), 18)
            s = add("Sqrt", add("Add", v, constant("eps", rng.choice([1e-5, 0.1]))))
            y = add("Div", d, s)
            for op, along in (("Mul", self.gamma), ("Add", self.beta)):
                if along is not None:
                    wide = [n if i in along else 1 for i, n in enumerate(self.shape)]
                    first = next((i for i, n in enumerate(wide) if n > 1), len(wide) - 1)
                    y = add(op, y, constant(op, rng.normal(size=wide[first:])))
        y = add("Cast", y, to=10) if self.half else y
        nodes[-1].output[0] = "y"
        dims = [n if len(self.shape) - i <= self.known else f"d{i}"
                for i, n in enumerate(self.shape)]  # fmt: skip
        element = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        given = [helper.make_tensor_value_info("x", element, dims)]
        out = [helper.make_tensor_value_info("y", element, [None] * len(dims))]
        graph = helper.make_graph(nodes, "g", given, out, weights)
        imports = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, ir_version=8 if self.opset < 21 else 11,
                                 opset_imports=imports)  # fmt: skip


@st.composite
def norm_cases(draw: Any) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=4)))
    rank = len(shape)
    kind = draw(st.sampled_from(["layer", "layer", "rms", "softmax", "log_softmax"]))
    axes = draw(
        st.sampled_from(
            [(rank - 1,), (rank - 1,), (1,), tuple(range(1, rank)), tuple(range(2, rank)) or (1,)]
        )
    )
    if "softmax" in kind:
        axes = axes[-1:]
    along = st.sampled_from([None, axes, axes, (rank - 1,), (1,)])
    return Case(
        kind,
        shape,
        axes,
        draw(st.integers(0, rank)),
        draw(along),
        draw(along),
        draw(st.booleans()),
        draw(st.sampled_from([13, 17, 18, 23])),
        draw(st.sampled_from(TARGETS)),
        draw(st.integers(0, 2**16)),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(norm_cases())
def test_what_is_written_computes_the_same(case: Case) -> None:
    model = case.model()
    rule = LowerNorms(case.target)
    done = run(model, rule)
    assert_sound(model, done, rule)
    if done.applied:
        assert_parity(model, done.stored.complete(), shapes={"x": case.shape})


# ** mutants: each wrong arithmetic must be caught by the checks above **

HEADS: Final = norm(
    "layer",
    affine="y = Mul (q, heads)",
    constants="float eps = {0.25}, float[3,2] heads = {1, 2, 3, 4, 5, 6}",
)
BARE: Final = norm("rms", affine=RMS, constants=LAST, dims="N,3,1").replace("N,3,1] y", "N,3,2] y")
DIFFERENCE: Final = graph(
    "k = Exp (x) m = ReduceMean <axes: ints = [-1]> (k) d = Sub (m, x) p = Mul (d, d)"
    " v = ReduceMean <axes: ints = [-1]> (p) a = Add (v, eps) s = Sqrt (a) q = Div (d, s)"
    " w = Mul (q, g) y = Add (w, b)",
    LAST,
)
AFTER_LN: Final = '\n    _Last(site, rw)("LayerNormalization"'
ATTRS: Final = 'attrs = {"axis": -len(features), "epsilon": _epsilon(site)}'

MUTANTS: Final[dict[str, tuple[str, str, str]]] = {
    "epsilon": (
        "return float(site.norm.epsilon or 0.0)",
        "return 1e-5",
        "LayerNormalization at 17",
    ),
    "epsilon of the chain": (
        "_epsilon(site), dtype",
        "2 * _epsilon(site), dtype",
        "the chain below 17",
    ),
    "axis": (
        ATTRS + AFTER_LN,
        ATTRS.replace("-len(features)", "1") + AFTER_LN,
        "LayerNormalization at 17",
    ),
    "gamma and beta swapped": (
        'if role == "scale"',
        'if role != "scale"',
        "LayerNormalization at 17",
    ),
    "order of gamma": (
        "np.ascontiguousarray(values)",
        "np.ascontiguousarray(values[::-1])",
        "between Transposes",
    ),
    "beta lost": (
        "if site.norm.beta is not None:\n        inputs.append",
        "if False:\n        inputs.append",
        "LayerNormalization at 17",
    ),
    "beta lost between Transposes": (
        'beta is not None and op == "Lay',
        'beta is None and op == "Lay',
        "between Transposes",
    ),
    "the way there again": ('{"perm": back}', '{"perm": there}', "between Transposes"),
    "exponent": (
        "np.asarray(2, dtype=dtype)",
        "np.asarray(3, dtype=dtype)",
        "the chain of an RMS norm at 17",
    ),
    "the mean stays": (
        'if site.norm.kind == "layer_norm":\n        x =',
        "if False:\n        x =",
        "the chain below 17",
    ),
    "gamma of a group norm": ('"scale", site.norm.gamma)', '"scale", None)', "a group norm"),
    "axis of a softmax": (
        "(site.norm.axes or (-1,))[0]}",
        "(site.norm.axes or (-1,))[0] - 1}",
        "Softmax",
    ),
}
CONDITIONS: Final[dict[str, tuple[str, str, str]]] = {
    "factors of others": ("if not along <= {a % rank for a in axes}:", "if False:", HEADS),
    "a factor behind it": ("if site.scaled:", "if False:", BARE),
    "a difference in front of it": ("if site.centred:", "if False:", DIFFERENCE),
    "double": (
        "if norm.epsilon is not None:",
        "if False:",
        norm(
            "layer",
            dtype="double",
            constants=LAST.replace("float", "double").replace("0.25", "0.1"),
        ),
    ),
    "bodies below 13": (
        "if site.opset < 13 and",
        "if False and",
        graph(
            "m = ReduceMax <axes: ints = [1]> (x) d = Sub (x, m) e = Exp (d)"
            " t = ReduceSum <axes: ints = [1]> (e) y = Div (e, t)",
            "",
            11,
        ),
    ),
}


def holds(before: str, target: str = "onnx") -> bool:
    """Whether what the pass makes of a model is sound and computes the same."""
    rule = LowerNorms(target)
    try:
        done = run(before, rule)
        assert_sound(before, done, rule)
        assert_parity(before, done.stored.complete())
    except Exception:  # whatever finds it
        return False
    return True


def mutate(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the pass a table, or what writes its forms, with one piece of the text replaced."""
    if old in Path(spellings.__file__).read_text(encoding="utf-8"):
        written = ModuleType(spellings.__name__)
        vars(written).update(mutated(spellings, old, new))
        monkeypatch.setitem(sys.modules, spellings.__name__, written)
        old = new = "FORMS: Final"
    monkeypatch.setattr(lower_norms, "choose", mutated(lowering, old, new)["choose"])


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_what_is_written_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, golden = MUTANTS[name]
    target, before, _ = GOLDENS[golden]
    mutate(old, new, monkeypatch)
    assert not holds(before, target)


@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, before = CONDITIONS[name]
    assert holds(before)
    mutate(old, new, monkeypatch)
    assert not holds(before)
