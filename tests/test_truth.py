"""The float64 evaluator: scopes, functions, control flow, weights, precision, cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from onnxnorm import storage, truth
from onnxnorm.errors import ModelError
from onnxnorm.session import open_session
from onnxnorm.truth import Evaluator, OutOfTime, Unevaluable

RNG = np.random.default_rng(11)


def stored(text: str) -> storage.Stored:
    return storage.from_proto(parser.parse_model(text))


def evaluate(text: str, **feeds: Any) -> dict[str, Any]:
    return Evaluator(stored(text)).run(feeds)


def agrees_with_onnxruntime(text: str, folder: Path, **feeds: Any) -> None:
    """Compare to float32 runs by half of float32's digits, which tell a rounding from a mistake."""
    path = folder / "model.onnx"
    onnx.save(parser.parse_model(text), path)
    with open_session(path, optimize=False) as session:
        expected = session.run(feeds)
    found = Evaluator(storage.load(path)).run(feeds)
    for name, want in expected.items():
        assert found[name].shape == want.shape
        scale = np.max(np.abs(want), initial=0.0)
        room = np.sqrt(np.finfo(np.float32).eps) * scale
        np.testing.assert_allclose(found[name], want, rtol=0, atol=room)


HEAD = '<ir_version: 9, opset_import: ["" : 18]>'


def test_values_are_float64_and_exact_where_float32_is_not() -> None:
    x = np.array([1.0, 3.0], np.float32)
    (y,) = evaluate(HEAD + "g (float[2] x) => (float[2] y) { y = Reciprocal (x) }", x=x).values()
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [1.0, 1.0 / 3.0])


def test_nodes_need_not_be_sorted() -> None:
    proto = parser.parse_model(
        HEAD + "g (float[2] x, bool c) => (float[2] y)"
        "{ y = Add (b, a)"
        "  b = If (c) <then_branch = t () => (float[2] u) { u = Neg (a) },"
        "             else_branch = e () => (float[2] v) { v = Abs (a) }>"
        "  a = Exp (x) }"
    )
    x = np.array([0.0, 1.0], np.float32)
    found = Evaluator(storage.from_proto(proto)).run({"x": x, "c": np.array(False)})
    np.testing.assert_allclose(found["y"], 2 * np.exp([0.0, 1.0]))


def test_an_attribute_keeps_the_value_of_the_file() -> None:
    text = HEAD + (
        "g (float[1,1,1] x, float[1] s, float[1] b, float[1] m, float[1] v) => (float[1,1,1] y)"
        "{ y = BatchNormalization <epsilon: float = 1e-5> (x, s, b, m, v) }"
    )
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    (y,) = evaluate(text, x=np.ones((1, 1, 1), np.float32), s=one, b=zero, m=zero, v=zero).values()
    assert y.item() == 1.0 / np.sqrt(np.float64(np.float32(1e-5)))


def test_constants_and_casts_that_would_be_floats_are_float64() -> None:
    text = (
        HEAD
        + """g (int64[2] x, float16[2] h) => (float a, float b, float16 c, float d, int64 e)
    {
      one = Constant <value_float: float = 0.1> ()
      shape = Constant <value_ints: ints = [2]> ()
      zeros = ConstantOfShape (shape)
      f = Cast <to: int = 10> (x)
      a = Add (one, zeros)
      b = Cast <to: int = 1> (f)
      c = Mul (h, h)
      d = CastLike (x, one)
      e = Cast <to: int = 7> (h)
    }"""
    )
    out = evaluate(text, x=np.array([2, 70001]), h=np.array([0.1, -1.5], np.float16))
    assert [out[k].dtype for k in "abcd"] == [np.float64] * 4
    np.testing.assert_array_equal(out["a"], np.full(2, np.float64(np.float32(0.1))))
    np.testing.assert_array_equal(out["b"], [2.0, 70001.0])  # not rounded to float16 on the way
    np.testing.assert_array_equal(out["c"], np.array([0.1, -1.5], np.float16).astype(float) ** 2)
    assert out["e"].tolist() == [0, -1]


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
def test_narrow_weights_are_widened_exactly(name: str) -> None:
    weight = np.arange(6).astype(getattr(ml_dtypes, name))
    to = helper.np_dtype_to_tensor_dtype(weight.dtype)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])],
        [helper.make_tensor("w", to, [6], weight.astype(np.float32).tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    y = Evaluator(storage.from_proto(model)).run({})["y"]
    assert y.dtype == np.float64
    np.testing.assert_array_equal(y, [float(v) for v in weight])


IF = (
    HEAD
    + """g (float[N] x, bool c) => (float[N] y)
<float[1] w = {3.0}>
{
  z = Mul (x, w)
  y = If (c) <
    then_branch = t () => (float[N] a) { a = Add (z, x) },
    else_branch = e () => (float[N] b) <float[1] k = {5.0}> { b = Mul (z, k) }
  >
}"""
)


@pytest.mark.parametrize("condition", [True, False])
def test_branches_read_the_outer_scope(condition: bool, tmp_path: Path) -> None:
    x = RNG.standard_normal(4).astype(np.float32)
    agrees_with_onnxruntime(IF, tmp_path, x=x, c=np.array(condition))


LOOP = (
    HEAD
    + """g (float[2] x, int64 n, bool c) => (float[2] y, float[S,2] all)
{
  y, all = Loop (n, c, x) <body = b (int64 i, bool go, float[2] s)
      => (bool again, float[2] t, float[2] out)
  {
    f = Cast <to: int = 1> (i)
    u = Mul (s, x)
    t = Add (u, f)
    out = Neg (t)
    limit = Constant <value_float: float = 40.0> ()
    m = ReduceMax <keepdims: int = 0> (t)
    again = Less (m, limit)
  }>
}"""
)


@pytest.mark.parametrize("trips", [0, 1, 5, 50])
def test_loops_carry_stack_and_stop(trips: int, tmp_path: Path) -> None:
    x = np.array([1.5, 0.5], np.float32)
    agrees_with_onnxruntime(LOOP, tmp_path, x=x, n=np.array(trips), c=np.array(True))


def test_scan_reads_axes_and_directions(tmp_path: Path) -> None:
    text = (
        HEAD
        + """g (float[2] s, float[2,3] xs) => (float[2] t, float[2,3] ys)
    {
      t, ys = Scan <num_scan_inputs: int = 1, scan_input_axes: ints = [1],
                    scan_input_directions: ints = [1], scan_output_axes: ints = [1],
                    body = b (float[2] a, float[2] x) => (float[2] c, float[2] d)
                    { c = Add (a, x)  d = Mul (c, x) }> (s, xs)
    }"""
    )
    feeds = {"s": RNG.standard_normal(2), "xs": RNG.standard_normal((2, 3))}
    agrees_with_onnxruntime(text, tmp_path, **{k: v.astype(np.float32) for k, v in feeds.items()})


FUNCTION = """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
g (float[N] x) => (float[N] y)
{ a = local.scaled <factor: float = 3.0> (x)  b = local.scaled (a)  y = local.nested (b) }
<domain: "local", opset_import: ["" : 18]> scaled <factor: float = 2.0> (v) => (w)
{ k = Constant <value_float: float = @factor> ()  w = Mul (v, k) }
<domain: "local", opset_import: ["" : 18, "local" : 1]> nested (v) => (w)
{ u = local.scaled <factor: float = 0.5> (v)  w = Sqrt (u) }
"""


def test_functions_see_their_attributes_and_defaults(tmp_path: Path) -> None:
    x = np.array([1.0, 2.0], np.float32)
    agrees_with_onnxruntime(FUNCTION, tmp_path, x=x)


def test_an_overload_is_chosen_by_the_node() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 18, "local" : 1]>
        g (float[N] x) => (float[N] y, float[N] z) { y = local.f (x)  z = local.f (x) }
        <domain: "local", opset_import: ["" : 18]> f (v) => (w) { w = Neg (v) }
        <domain: "local", opset_import: ["" : 18]> f (v) => (w) { w = Exp (v) }"""
    )
    model.functions[1].overload = model.graph.node[1].overload = "exp"
    out = Evaluator(storage.from_proto(model)).run({"x": np.zeros(1, np.float32)})
    assert (out["y"].item(), out["z"].item()) == (0.0, 1.0)


def test_sparse_initializers_are_dense_values() -> None:
    model = parser.parse_model(HEAD + "g (float[3] x) => (float[3] y) { y = Add (x, s) }")
    values = numpy_helper.from_array(np.array([5.0], np.float32), "s")
    indices = numpy_helper.from_array(np.array([1], np.int64), "s_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [3]))
    out = Evaluator(storage.from_proto(model)).run({"x": np.zeros(3, np.float32)})
    np.testing.assert_array_equal(out["y"], [0.0, 5.0, 0.0])


def test_sequences_and_optionals_pass_through() -> None:
    text = (
        HEAD
        + """g (float[2] x) => (float[2] y, int64 n)
    { e = Exp (x)  s = SequenceConstruct (x, e)  i = Constant <value_int: int = 1> ()
      y = SequenceAt (s, i)  n = SequenceLength (s) }"""
    )
    out = evaluate(text, x=np.zeros(2, np.float32))
    np.testing.assert_array_equal(out["y"], [1.0, 1.0])
    assert out["n"].item() == 2


CONTRIB = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[2,3] x, float[4,3] w) => (float[2,4] y)
{ d = com.microsoft.CDist <metric: string = "euclidean"> (x, w)  y = Exp (d) }"""


def test_what_nobody_else_knows_runs_in_float32_and_says_so(tmp_path: Path) -> None:
    feeds = {"x": (2, 3), "w": (4, 3)}
    given = {k: RNG.standard_normal(v).astype(np.float32) for k, v in feeds.items()}
    agrees_with_onnxruntime(CONTRIB, tmp_path, **given)
    with Evaluator(stored(CONTRIB)) as evaluator:
        evaluator.run(given)
        evaluator.run(given)
        narrow = "float64 except 1 node in float32: com.microsoft.CDist (1)"
        assert evaluator.precision == narrow


def test_what_the_runtime_rejects_is_named_by_its_node() -> None:
    given = {"x": np.zeros((2, 3), np.float32), "w": np.zeros((4, 3), np.float32)}
    broken = stored(CONTRIB.replace("CDist <", "CDist <unknown: int = 1, "))
    with pytest.raises(Unevaluable, match=r"CDist 'd' .* onnxruntime cannot load it"):
        Evaluator(broken).run(given)


@pytest.mark.parametrize("saturate", [1, 0])
@pytest.mark.parametrize("kind", ["e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz"])
def test_quantization_to_8_bit_floats(kind: str, saturate: int, tmp_path: Path) -> None:
    narrow = getattr(ml_dtypes, f"float8_{kind}")
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(narrow))
    zero = helper.make_tensor("z", elem_type, [], np.zeros((), narrow).tobytes(), raw=True)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], saturate=saturate),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in "xy")
    scale = numpy_helper.from_array(np.array(0.25, np.float32), "s")
    graph = helper.make_graph(nodes, "g", [x], [y], [scale, zero])
    opset = helper.make_opsetid("", 19)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, ir_version=9, opset_imports=[opset]), path)
    finfo: Any = ml_dtypes.finfo
    largest = float(finfo(narrow).max) * 0.25
    values = np.concatenate([np.linspace(-3, 3, 4001), [largest, -largest, 8 * largest, 0.0]])
    with open_session(path, optimize=False) as session:
        want = session.run({"x": values.astype(np.float32)})["y"]
    with Evaluator(storage.load(path)) as evaluator:
        found = evaluator.run({"x": values.astype(np.float32)})["y"]
        assert evaluator.precision == "float64"
    np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize(
    "call",
    [
        "Softplus (x)",
        "MeanVarianceNormalization <axes: ints = [0]> (x)",
        "LayerNormalization (x, x)",
        "Celu <alpha: float = 0.7> (x)",
    ],
)
def test_a_schemas_function_body_stands_in_for_an_operator(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truth, "OPERATORS", {})
    text = HEAD + f"g (float[5] x) => (float[5] y) {{ y = {call} }}"
    bodies: list[str] = []
    body = Evaluator._schema_body

    def only_bodies(self: Evaluator, node: Any, domain: str, version: int, given: Any) -> Any:
        bodies.append(node.op_type)
        return body(self, node, domain, version, given)

    name = call.split(" ", maxsplit=1)[0]
    reference = Evaluator._reference_operator

    def no_reference(self: Evaluator, node: Any, *rest: Any) -> Any:
        return None if node.op_type == name else reference(self, node, *rest)

    monkeypatch.setattr(Evaluator, "_schema_body", only_bodies)
    monkeypatch.setattr(Evaluator, "_reference_operator", no_reference)
    agrees_with_onnxruntime(text, tmp_path, x=RNG.standard_normal(5).astype(np.float32))
    assert bodies == [name]


def test_values_beyond_the_memory_it_may_hold_stop_it() -> None:
    model = stored(HEAD + "g (float[64] x) => (float[64] y) { y = Exp (x) }")
    with pytest.raises(MemoryError, match="Exp"):
        Evaluator(model, memory_bytes=100).run({"x": np.zeros(64, np.float32)})


def test_kept_values_survive_their_last_reader() -> None:
    model = stored(HEAD + "g (float[2] x) => (float[2] y) { a = Exp (x)  y = Neg (a) }")
    out = Evaluator(model).run({"x": np.zeros(2, np.float32)}, keep=["a"])
    np.testing.assert_array_equal(out["a"], [1.0, 1.0])


def test_intermediates_are_freed_after_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = " ".join(f"a{i + 1} = Neg (a{i})" for i in range(6))
    model = stored(HEAD + f"g (float[2] a0) => (float[2] a6) {{ {chain} }}")
    alive: list[int] = []
    node = Evaluator._node

    def counting(self: Evaluator, one: Any, scope: Any) -> Any:
        alive.append(sum(isinstance(v, np.ndarray) for v in scope.values.values()))
        return node(self, one, scope)

    monkeypatch.setattr(Evaluator, "_node", counting)
    Evaluator(model).run({"a0": np.zeros(2, np.float32)})
    assert max(alive) == 1


def test_a_deadline_that_has_passed_stops_it() -> None:
    model = stored(HEAD + "g (float[2] x) => (float[2] y) { y = Neg (x) }")
    with pytest.raises(OutOfTime):
        Evaluator(model).run({"x": np.zeros(2, np.float32)}, deadline=time.monotonic() - 1)


def test_faults_name_the_node_or_the_value() -> None:
    model = stored(HEAD + "g (float[2] x) => (float[3] y) { y = Add (x, nowhere) }")
    with pytest.raises(ModelError, match="nowhere"):
        Evaluator(model).run({"x": np.zeros(2, np.float32)})
    model = stored(HEAD + "g (float[2] x, float[3] z) => (float[3] y) { y = Add (x, z) }")
    with pytest.raises(Unevaluable, match="Add 'y'"):
        Evaluator(model).run({"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})


def test_cost_counts_products_and_live_memory() -> None:
    model = parser.parse_model(
        HEAD + "g (float[N,8] x) => (float[N,4] y) { h = MatMul (x, a)  y = MatMul (h, b) }"
    )
    for name, shape in (("a", (8, 16)), ("b", (16, 4))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    cost = truth.estimate(storage.from_proto(model), {"x": (2, 8)})
    assert cost.multiply_adds == 2 * 8 * 16 + 2 * 16 * 4
    assert cost.unknown == 0
    assert cost.peak_bytes >= 8 * (8 * 16 + 2 * 16)
    assert cost.seconds() > 0.0


def test_values_of_bodies_and_functions_can_be_watched() -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 18, "f" : 1]>
    g (float[2] x, bool yes, int64 n) => (float[2] y, float[2] z, float[2] l) {
       y = f.twice (x)
       z = If (yes) <then_branch = t () => (float[2] u) { u = Neg (y) },
                     else_branch = e () => (float[2] v) { v = Abs (y) }>
       l = Loop (n, yes, x) <body = b (int64 i, bool c, float[2] k) => (bool d, float[2] w) {
             d = Identity (c)  w = f.twice (k) }>
    }
    <domain: "f", opset_import: ["" : 18]>
    twice (a) => (b) { b = Add (a, a) }
    """
    seen: dict[str, list[float]] = {}
    names = ["f.twice/a", "f.twice/b", "z/then_branch/u", "z/else_branch/v", "l/body/k", "y", "x"]

    def watched(name: str) -> Callable[[Any], None]:
        return lambda value: seen.setdefault(name, []).append(float(value[0]))

    watch = {(n[: n.rfind("/") + 1], n.rpartition("/")[2]): watched(n) for n in names}
    x = np.array([1.0, 2.0], np.float32)
    Evaluator(stored(text), watch=watch).run({"x": x, "yes": np.array(True), "n": np.array(2)})
    assert seen == {
        "x": [1.0],
        "f.twice/a": [1.0, 1.0, 2.0],  # by the graph, and by both turns of the Loop
        "f.twice/b": [2.0, 2.0, 4.0],
        "y": [2.0],
        "z/then_branch/u": [-2.0],
        "l/body/k": [1.0, 2.0],
    }
