"""The algebra of moments: what a reading says of a value is what the nodes compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.moment_rules import Moments
from onnxnorm.moments import Form, Reading
from onnxnorm.norms import Norm, find_norms
from onnxnorm.reference import confirm
from onnxnorm.statics import Statics

Array = NDArray[np.float64]


def read(model: onnx.ModelProto) -> dict[str, tuple[Reading, ...]]:
    """The readings of every value of the main graph."""
    facts = Facts(Module(storage.from_proto(model)))
    scope = facts.module.main
    moments = Moments(facts, scope, Statics(facts))
    for node in scope.nodes:
        moments.visit(node)
    return {value.name: moments.readings(value) for node in scope.nodes for value in node.outputs}


HEAD: Final = """
<ir_version: 8, opset_import: ["" : {opset}]>
main ({dtype}[{dims}] x, float[2,3,4] z) => ({dtype}[?,?,?] y)
<float two = {{2}}, float one = {{1}}, float half = {{0.5}}, float minus = {{-1}},
 float e = {{0.01}}, float n = {{4}}, float[4] g = {{1, 2, 0.5, 3}},
 float[4] b = {{0.25, -0.5, 1, 0}}, int64[1] last = {{-1}}, int64[1] middle = {{1}}>
{{ {body} }}
"""
MEAN: Final = "m = ReduceMean <axes = [-1]> (x) "
CENTRED: Final = MEAN + "d = Sub (x, m) "
VARIANCE: Final = CENTRED + "p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) "
ROOT: Final = VARIANCE + "a = Add (v, e) s = Sqrt (a) "
SQUARES: Final = "p = Pow (x, two) v = ReduceMean <axes = [-1]> (p) "
SUM: Final = "p = Mul (x, x) v = ReduceSum <axes = [-1]> (p) "


def model(body: str, opset: int = 12, dims: str = "2,3,4", dtype: str = "float") -> onnx.ModelProto:
    return parser.parse_model(HEAD.format(body=body, opset=opset, dims=dims, dtype=dtype))


def norms(body: str, **where: Any) -> tuple[list[Norm], Facts]:
    facts = Facts(Module(storage.from_proto(model(body, **where))))
    return find_norms(facts), facts


# ** one value, many spellings **

LAYER: Final = {
    "as exporters write it": ROOT + "q = Div (d, s) w = Mul (q, g) y = Add (w, b)",
    "a reciprocal": ROOT + "i = Reciprocal (s) q = Mul (d, i) w = Mul (g, q) y = Add (b, w)",
    "one over": ROOT + "i = Div (one, s) q = Mul (i, d) w = Mul (q, g) y = Add (w, b)",
    "a power": VARIANCE
    + "h = Neg (half) a = Add (e, v) i = Pow (a, h) q = Mul (d, i) w = Mul (q, g) y = Add (w, b)",
    "a gamma first": ROOT + "i = Div (g, s) w = Mul (d, i) y = Add (w, b)",
    "Keras": ROOT + "i = Div (g, s) k = Mul (x, i) o = Mul (m, i) t = Sub (b, o) y = Add (k, t)",
    "moments": MEAN
    + "d = Sub (x, m) c = Mul (x, x) k = ReduceMean <axes = [-1]> (c) o = Mul (m, m)"
    " v = Sub (k, o) a = Add (v, e) s = Sqrt (a) q = Div (d, s) w = Mul (q, g) y = Add (w, b)",
    "x times what is centred": CENTRED
    + "p = Mul (x, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
    " q = Div (d, s) w = Mul (q, g) y = Add (w, b)",
    "sums": "t = ReduceSum <axes = [2]> (x) m = Div (t, n) d = Sub (x, m) p = Pow (d, two)"
    " u = ReduceSum <axes = [-1]> (p) v = Div (u, n) a = Add (v, e) s = Sqrt (a)"
    " q = Div (d, s) w = Mul (q, g) y = Add (w, b)",
    "a sum of squares": MEAN
    + "d = Sub (x, m) u = ReduceSumSquare <axes = [-1]> (d) v = Div (u, n) a = Add (v, e)"
    " s = Sqrt (a) q = Div (d, s) w = Mul (q, g) y = Add (w, b)",
    "without keepdims": "k = ReduceMean <axes = [-1], keepdims = 0> (x) m = Unsqueeze <axes = [2]>"
    " (k) d = Sub (x, m) p = Mul (d, d) u = ReduceMean <axes = [-1], keepdims = 0> (p)"
    " v = Unsqueeze <axes = [-1]> (u) a = Add (v, e) s = Sqrt (a) q = Div (d, s) w = Mul (q, g)"
    " y = Add (w, b)",
    "the mean minus x": MEAN
    + "d = Sub (m, x) p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
    " q = Div (d, s) o = Neg (q) w = Mul (o, g) y = Add (w, b)",
}


@pytest.mark.parametrize("spelling", LAYER)
def test_a_layer_norm_is_one_value(spelling: str) -> None:
    (norm,), facts = norms(LAYER[spelling])
    assert (norm.kind, norm.axes, norm.meant, norm.recognised) == ("layer_norm", (2,), 0.01, True)
    assert (norm.input.name, norm.output.name, norm.obstacle) == ("x", "y", "")
    assert np.asarray(norm.gamma).tolist() == [1, 2, 0.5, 3]
    assert np.asarray(norm.beta).tolist() == [0.25, -0.5, 1, 0]
    assert confirm(norm, facts) is None


@pytest.mark.parametrize(
    ("body", "kind", "epsilon", "rule"),
    [
        (SQUARES + "a = Add (v, e) s = Sqrt (a) y = Div (x, s)", "rms_norm", 0.01, "inside"),
        (SUM + "k = Div (v, n) a = Add (k, e) s = Sqrt (a) y = Div (x, s)", "rms_norm", 0.01, None),
        (SUM + "a = Add (v, e) s = Sqrt (a) y = Div (x, s)", "l2_norm", 0.01, "inside"),
        (SUM + "s = Sqrt (v) a = Add (s, e) y = Div (x, a)", "l2_norm", 0.01, "outside"),
        (SUM + "s = Sqrt (v) a = Max (s, e) y = Div (x, a)", "l2_norm", 0.01, "maximum"),
        (SUM + "a = Max (v, e) s = Sqrt (a) y = Div (x, s)", "l2_norm", 0.01, "clamped"),
        ("s = ReduceL2 <axes = [-1]> (x) a = Clip (s, e) y = Div (x, a)", "l2_norm", 0.01, None),
        (SUM + "r = Sqrt (n) s = Sqrt (v) k = Div (x, s) y = Mul (k, r)", "rms_norm", 0.0, None),
    ],
)
def test_each_kind_keeps_its_own_rule(
    body: str, kind: str, epsilon: float, rule: str | None
) -> None:
    (norm,), facts = norms(body)
    assert (norm.kind, norm.meant, norm.recognised) == (kind, epsilon, True)
    assert norm.rule == rule or rule is None
    assert confirm(norm, facts) is None


def test_without_bias_it_is_a_layer_norm_with_another_epsilon_and_a_gain() -> None:
    body = CENTRED + (
        "p = Mul (d, d) u = ReduceSum <axes = [-1]> (p) f = Sub (n, one) v = Div (u, f)"
        " a = Add (v, e) s = Sqrt (a) y = Div (d, s)"
    )
    (norm,), facts = norms(body)
    assert norm.kind == "layer_norm"
    assert norm.epsilon == pytest.approx(0.01 * 3 / 4)
    assert isinstance(norm.gamma, np.ndarray)
    assert float(norm.gamma) == pytest.approx(np.sqrt(3 / 4))
    assert confirm(norm, facts) is None


def test_casts_identity_and_dropout_are_copies() -> None:
    body = (
        "k = Cast <to = 1> (x) m = ReduceMean <axes = [-1]> (k) d = Sub (k, m) c = Identity (d)"
        " p = Mul (c, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
        " o = Dropout (s) q = Div (d, o) y = Cast <to = 10> (q)"
    )
    (norm,), _ = norms(body, dtype="float16")
    assert (norm.kind, norm.input.name, norm.output.name) == ("layer_norm", "x", "y")


# ** what is none, and why **


@pytest.mark.parametrize(
    ("body", "kind", "reason", "at"),
    [
        (
            CENTRED + "p = Pow (d, n) v = ReduceMean <axes = [-1]> (p) a = Add (v, e)"
            " s = Sqrt (a) y = Div (d, s)",
            "layer_norm",
            "the exponent is 4, where a variance has 2",
            "p",
        ),
        (VARIANCE + "s = Sqrt (v) a = Add (s, e) y = Div (d, a)", "layer_norm", "outside", "a"),
        (ROOT + "y = Div (x, s)", "layer_norm", "is not centred", "y"),
        (VARIANCE + "a = Add (v, e) y = Div (d, a)", "layer_norm", "the variance itself", "y"),
        (
            CENTRED + "p = Abs (d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
            " y = Div (d, s)",
            "layer_norm",
            "absolute values are averaged",
            "v",
        ),
        (VARIANCE + "a = Sub (v, e) s = Sqrt (a) y = Div (d, s)", "layer_norm", "negative", "s"),
        (
            VARIANCE + "k = Mul (half, half) a = Add (v, e) s = Pow (a, k) y = Div (d, s)",
            "layer_norm",
            "the exponent is 0.25",
            "s",
        ),
        (
            CENTRED + "c = Mul (x, x) k = ReduceMean <axes = [-1]> (c) v = Sub (k, m)"
            " a = Add (v, e) s = Sqrt (a) y = Div (d, s)",
            "layer_norm",
            "where its square should be",
            "s",
        ),
        (
            CENTRED + "p = Mul (d, d) v = ReduceMean <axes = [-1], keepdims = 0> (p)"
            " a = Add (v, e) s = Sqrt (a) y = Div (d, s)",
            "layer_norm",
            "without keepdims broadcasts along another axis",
            "y",
        ),
        (
            (
                "p = Mul (x, x) u = ReduceSum <axes = [-1]> (p) f = Add (n, one) v = Div (u, f)"
                " a = Add (v, e) s = Sqrt (a) y = Div (x, s)"
            ),
            "rms_norm",
            "divides by 5, and there are 4 elements",
            "y",
        ),
        (
            SQUARES + "a = Add (v, e) s = Sqrt (a) y = Div (z, s)",
            "rms_norm",
            "what is divided is 'z', another value",
            "y",
        ),
    ],
)
def test_a_near_miss_has_its_first_reason(body: str, kind: str, reason: str, at: str) -> None:
    dims = "4,4,4" if "keepdims = 0" in body else "2,3,4"
    found, _ = norms(body, dims=dims)
    misses = [n for n in found if not n.recognised]
    assert [n.kind for n in misses] == [kind], [(n.kind, n.input.name) for n in found]
    assert reason in misses[0].reason
    assert misses[0].at is not None
    assert misses[0].at.outputs[0].name == at
    assert not any(n.recognised and n.input.name == "x" for n in found)


def test_a_part_that_is_a_norm_is_raised_as_what_it_is() -> None:
    body = (
        "m = ReduceMean <axes = [-1]> (z) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) y = Div (d, s)"
    )
    (norm,), facts = norms(body)
    assert (norm.kind, norm.input.name, norm.recognised) == ("rms_norm", "d", True)
    assert confirm(norm, facts) is None


@pytest.mark.parametrize(
    ("perm", "axis", "told"), [("0, 2, 1", 1, True), ("0, 2, 1", 2, False), ("0, 1, 2", 2, False)]
)
def test_what_is_centred_in_front_of_a_transpose(perm: str, axis: int, told: bool) -> None:
    """So onnxruntime saves a layer norm behind a Transpose. As an RMS norm of d it is exact."""
    body = (
        f"m = ReduceMean <axes = [{axis}]> (x) c = Sub (x, m) d = Transpose <perm = [{perm}]> (c)"
        " p = Mul (d, d) v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a)"
        " y = Div (d, s)"
    )
    found, facts = norms(body)
    norm = found[-1]
    straight = perm == "0, 1, 2"
    assert norm.kind == ("layer_norm" if straight else "rms_norm")
    assert [n for n in norm.notes if "centred" in n] == (
        ["'x' is centred in front of a Transpose: a layer norm of it"] if told else []
    )
    assert confirm(norm, facts) is None


def test_a_factor_that_expands_stays_outside() -> None:
    (norm, *_), _ = norms(ROOT + "q = Div (d, s) y = Mul (q, g)", dims="2,3,1")
    assert (norm.kind, norm.input.name, norm.output.name) == ("layer_norm", "x", "q")


@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ("2,4,3", "a factor of shape [1, 1, 4] has its axes in another order than 'x'"),
        ("2,5,3", "a factor of shape [1, 1, 4] would expand 'x'"),
    ],
)
def test_factors_behind_a_transpose_of_the_value(dims: str, reason: str) -> None:
    """Keras by tf2onnx: statistics of NCHW, factors of NHWC."""
    body = ROOT.replace("[-1]", "[1, 2]") + (
        "h = Unsqueeze <axes = [0, 1]> (g) i = Reciprocal (s) k = Mul (i, h) c = Neg (m)"
        " q = Mul (c, k) t = Transpose <perm = [0, 2, 1]> (x) r = Mul (t, k) y = Add (r, q)"
    )
    (miss,) = (n for n in norms(body, dims=dims)[0] if not n.recognised)
    assert (miss.kind, miss.input.name) == ("layer_norm", "x")
    assert miss.reason.startswith(reason)


def test_integers_have_no_mean() -> None:
    body = (
        "m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) y = Div (d, v)"
    )
    assert not any(n.recognised for n in norms(body, dtype="int32")[0])


def test_two_norms_of_one_tensor_share_their_statistics() -> None:
    body = ROOT + "q = Div (d, s) w = Mul (q, g) k = Div (d, s) o = Mul (k, b) y = Max (w, o)"
    found, facts = norms(body)
    assert [(n.kind, n.output.name, n.obstacle) for n in found] == [
        ("layer_norm", "w", ""),
        ("layer_norm", "o", ""),
    ]
    assert all("shares its statistics" in n.notes[0] for n in found)
    assert [confirm(n, facts) for n in found] == [None, None]


@pytest.mark.parametrize(("op", "recognised"), [("Add", True), ("Sub", False)])
def test_a_length_less_a_number_may_be_negative(op: str, recognised: bool) -> None:
    """Where |x| < e, x / (|x| - e) turns x around, and x / sqrt((|x| - e)^2) does not."""
    body = f"l = ReduceL2 <axes = [-1]> (x) a = {op} (l, e) y = Div (x, a)"
    assert [n.recognised for n in norms(body)[0]] == [recognised]


# ** the algebra **


def evaluated(form: Form, x: Array) -> Array:
    """The polynomial of a form on x."""
    assert form.statistic is None or form.statistic.groups == 0
    axes = form.statistic.axes if form.statistic is not None else ()
    n = np.prod([x.shape[a] for a in axes]) if axes else 1.0
    m, q = x.mean(axes, keepdims=True), (x * x).mean(axes, keepdims=True)
    r = np.ones(())
    if form.root is not None:
        root = form.root
        factor = root.factor * n ** (root.halves / 2)
        length = np.sqrt(n * q)
        r = {
            "variance": factor * (q - m * m) + root.epsilon,
            "square": factor * q + root.epsilon,
            "maximum": np.maximum(length, root.epsilon) ** 2,
            "sum": (length + root.epsilon) ** 2,
            "clamped": np.maximum(n * q, root.epsilon),
        }[root.kind]
    total = np.zeros(())
    for (a, b, c, d, e), coefficient in form.terms.items():
        power = x**a if a else np.ones(())
        total = total + coefficient * power * m**b * q**c * r ** (d / 2) * float(n) ** (e / 2)
    return np.asarray(total)


class Drawn:
    """A random graph of the operators that have a rule."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.values = ["x"]
        for name, array in (
            ("two", 2.0), ("eps", 0.5), ("n", 4.0), ("third", 1 / 3), ("minus", -1.0),
            ("row", [1.0, 2.0, 0.5, 3.0]), ("column", [[1.0], [2.0], [3.0]]),
        ):  # fmt: skip
            self.weights.append(numpy_helper.from_array(np.asarray(array), name))

    def pick(self, options: Sequence[str]) -> str:
        return str(self.draw(st.sampled_from(list(options))))

    def step(self) -> None:
        late = self.values[-3:]
        op = self.pick(
            ["Add", "Sub", "Mul", "Div", "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2",
             "Sqrt", "Reciprocal", "Neg", "Pow", "Max", "Identity", "Scale", "Shift"]
        )  # fmt: skip
        out = f"v{len(self.values)}"
        attributes: dict[str, Any] = {}
        inputs = [self.pick(late)]
        if op in ("Add", "Sub", "Mul", "Div"):
            inputs.append(self.pick(self.values))
            inputs = inputs[:: self.draw(st.sampled_from([1, -1]))]
        elif op.startswith("Reduce"):
            attributes = {"axes": self.draw(st.sampled_from([[-1], [-1], [1, 2], [1]]))}
        elif op == "Pow":
            inputs.append("two")
        elif op == "Max":
            inputs.append("eps")
        elif op == "Scale":
            op = "Mul"
            inputs.append(self.pick(["n", "third", "minus", "row", "column"]))
        elif op == "Shift":
            op = self.pick(["Add", "Sub"])
            inputs.append(self.pick(["eps", "row"]))
        self.nodes.append(helper.make_node(op, inputs, [out], **attributes))
        self.values.append(out)

    def model(self) -> onnx.ModelProto:
        shape = [2, 3, 4]
        given = [helper.make_tensor_value_info("x", TensorProto.DOUBLE, shape)]
        out = [helper.make_tensor_value_info(self.values[-1], TensorProto.DOUBLE, None)]
        graph = helper.make_graph(self.nodes, "g", given, out, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 12)])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_form_is_what_its_nodes_compute(data: st.DataObject) -> None:
    drawn = Drawn(data.draw)
    for _ in range(data.draw(st.integers(2, 10))):
        drawn.step()
    made = drawn.model()
    x = np.random.default_rng(data.draw(st.integers(0, 9))).standard_normal((2, 3, 4)) + 0.3
    with np.errstate(all="ignore"):
        values = ReferenceEvaluator(made).run(None, {"x": x}, intermediate=True)
        assert isinstance(values, dict)
        for name, readings in read(made).items():
            for reading in readings:
                if not isinstance(reading, Form) or reading.layout is not None:
                    continue
                base = values[reading.base.name]
                if not np.isfinite(base).all():
                    continue
                wanted, got = values[name], evaluated(reading, base)
                fine = np.isfinite(wanted) & np.isfinite(np.broadcast_to(got, wanted.shape))
                close = np.isclose(wanted, got, rtol=1e-6, atol=1e-6 * (1 + np.abs(wanted)))
                assert close[fine].all(), (name, reading, onnx.printer.to_text(made))


def test_a_reading_names_the_base_that_it_is_over() -> None:
    readings = read(model(VARIANCE + "a = Add (v, e) s = Sqrt (a) y = Div (d, s)"))
    bases = [r.base.name for r in readings["y"] if isinstance(r, Form)]
    assert bases == ["x", "d"]


def test_statistics_survive_much_arithmetic_on_them() -> None:
    body = VARIANCE + "u = Mul (v, n) w = Div (u, n) k = Mul (w, n) l = Div (k, n) o = Mul (l, n)"
    body += " f = Div (o, n) a = Add (f, e) s = Sqrt (a) y = Div (d, s)"
    (norm,), _ = norms(body)
    assert (norm.kind, norm.input.name) == ("layer_norm", "x")
