"""The table of spellings: which one is chosen for a norm, and why another one is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import pytest
from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.lowering import TARGETS, choose
from onnxnorm.module import Module
from onnxnorm.norms import Norm, find_norms
from onnxnorm.site import Site

TEXT: Final = """
<ir_version: 8, opset_import: ["" : {opset}]>
main ({dtype}[{dims}] x{inputs}) => ({result}[{out}] y)
<{wide} two = {{2}}, {wide} e = {{0.05}}, {wide}[4] g = {{1, 2, 0.5, 3}},
 {wide}[4] b = {{0.25, -0.5, 1, 0}}, {wide}[4,1,1] gc = {{1, 2, 0.5, 3}}, int64[1] la = {{-1}},
 {wide}[4,1,1] bc = {{0.25, -0.5, 1, 0}}, int64[1] c = {{1}}, int64[2] hw = {{2, 3}},
 {wide}[2] two2 = {{1, 1}}, {wide}[2] zero2 = {{0, 0}}, int64[3] gs = {{0, 2, -1}},
 int64[4] back = {{0, 4, 6, 6}}, {wide}[3,4] heads = {{1,2,3,4,5,6,7,8,9,10,11,12}}>
{{ {body} }}
"""


def mean(out: str, of: str, axes: str, opset: int) -> str:
    given = {"la": "[-1]", "c": "[1]", "hw": "[2, 3]"}[axes]
    if opset < 18:
        return f"{out} = ReduceMean <axes = {given}> ({of}) "
    return f"{out} = ReduceMean ({of}, {axes}) "


def chain(kind: str, axes: str, opset: int, affine: str) -> str:
    """A decomposed norm of x."""
    d = "x"
    text = ""
    if kind == "layer":
        text += mean("m", "x", axes, opset) + "d = Sub (x, m) "
        d = "d"
    text += f"p = Mul ({d}, {d}) " + mean("v", "p", axes, opset) + "a = Add (v, e) s = Sqrt (a) "
    return text + f"q = Div ({d}, s) " + affine


AFFINE: Final = "w = Mul (q, g) y = Add (w, b)"
CHANNEL: Final = "w = Mul (q, gc) y = Add (w, bc)"
BARE: Final = "y = Identity (q)"


def site(body: str, **where: Any) -> tuple[Norm, Facts]:
    dtype = where.pop("dtype", "float")
    filled = {"opset": 17, "dims": "2,3,4", "dtype": dtype, "wide": dtype, "inputs": ""} | where
    filled.setdefault("result", dtype)
    out = ",".join("?" * (filled["dims"].count(",") + 1))
    text = TEXT.format(body=body, out=filled.pop("out", out), **filled)
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    norm = next(n for n in find_norms(facts) if n.recognised and n.kind != "channel_affine")
    return norm, facts


def chosen(norm: Norm, facts: Facts, target: str = "onnx") -> str:
    made = choose(norm, facts, target)
    return made if isinstance(made, str) else made[0].name


LN, SIMPLE, RMS = "LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"
LN_CHAIN: Final = "the chain that onnxruntime fuses to LayerNormalization"
RMS_CHAIN: Final = "the chain that onnxruntime fuses to an RMS norm"
BETWEEN: Final = " between Transposes"
NCHW: Final = "2,4,6,6"


@pytest.mark.parametrize(
    ("kind", "axes", "affine", "dims", "opset", "onnx", "ort"),
    [
        ("layer", "la", AFFINE, "2,3,4", 17, LN, LN),
        ("layer", "la", AFFINE, "2,3,4", 18, LN, LN),
        ("layer", "la", AFFINE, "2,3,4", 13, LN_CHAIN, LN),
        ("layer", "la", AFFINE, "N,T,4", 17, LN, LN),
        ("layer", "c", CHANNEL, NCHW, 17, LN + BETWEEN, LN + BETWEEN),
        ("layer", "c", CHANNEL, NCHW, 13, None, LN + BETWEEN),
        ("rms", "la", "y = Mul (q, g)", "2,3,4", 23, RMS, SIMPLE),
        ("rms", "la", "y = Mul (q, g)", "2,3,4", 17, RMS_CHAIN, SIMPLE),
        ("rms", "la", "y = Mul (q, g)", "2,3,4", 13, RMS_CHAIN, SIMPLE),
        ("rms", "c", "y = Mul (q, gc)", NCHW, 23, RMS + BETWEEN, SIMPLE + BETWEEN),
        ("rms", "c", "y = Mul (q, gc)", NCHW, 17, None, SIMPLE + BETWEEN),
        ("layer", "hw", CHANNEL, NCHW, 17, "InstanceNormalization", "InstanceNormalization"),
        ("layer", "hw", CHANNEL, NCHW, 9, "InstanceNormalization", "InstanceNormalization"),
    ],
)
def test_each_row_of_the_table(
    kind: str, axes: str, affine: str, dims: str, opset: int, onnx: str | None, ort: str
) -> None:
    norm, facts = site(chain(kind, axes, opset, affine), dims=dims, opset=opset)
    if onnx is None:
        assert "it needs opset" in chosen(norm, facts)
    else:
        assert chosen(norm, facts) == onnx
    assert chosen(norm, facts, "ort-cpu") == chosen(norm, facts, "ort-cuda") == ort


def test_a_group_norm_of_reductions_is_an_instance_norm_between_reshapes() -> None:
    body = (
        "r = Reshape (x, gs) m = ReduceMean <axes = [-1]> (r) d = Sub (r, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) k = Div (d, s)"
        " q = Reshape (k, back) " + CHANNEL
    )
    norm, facts = site(body, dims=NCHW)
    assert norm.kind == "group_norm"
    for target in TARGETS:
        assert chosen(norm, facts, target) == "InstanceNormalization between Reshapes"


@pytest.mark.parametrize("opset", [11, 13])
def test_softmax_and_log_softmax(opset: int) -> None:
    total = "t = ReduceSum <axes = [-1]> (f) " if opset < 13 else "t = ReduceSum (f, la) "
    soft = "m = ReduceMax <axes = [-1]> (x) d = Sub (x, m) f = Exp (d) " + total
    assert chosen(*site(soft + "y = Div (f, t)", opset=opset)) == "Softmax"
    assert chosen(*site(soft + "l = Log (t) y = Sub (d, l)", opset=opset)) == "LogSoftmax"


# ** reasons **

ALREADY: Final = (
    mean("m", "x", "la", 13)
    + "d = Sub (x, m) p = Pow (d, two) "
    + mean("v", "p", "la", 13)
    + "a = Add (v, e) s = Sqrt (a) q = Div (d, s) w = Mul (q, g) y = Add (w, b)"
)


WIDE: Final = "h = Cast <to = 1> (x) "


@pytest.mark.parametrize(
    ("body", "where", "target", "reason"),
    [
        ("y = LayerNormalization (x, g)", {}, "onnx", "it is one operator already"),
        (ALREADY, {"opset": 13}, "onnx", f"it is written as {LN_CHAIN} already"),
        (chain("layer", "c", 13, CHANNEL), {"opset": 13, "dims": NCHW}, "onnx", "needs opset 17"),
        (
            chain("layer", "c", 13, CHANNEL),
            {"opset": 13, "dims": NCHW},
            "onnx",
            "axes [1] are not the last ones",
        ),
        (
            chain("layer", "la", 17, AFFINE),
            {"dtype": "double"},
            "onnx",
            "epsilon in float32, which is not exact for double",
        ),
        (
            WIDE + chain("layer", "la", 17, AFFINE).replace("(x", "(h"),
            {"dtype": "bfloat16", "wide": "float"},
            "ort-cpu",
            "no kernel in bfloat16",
        ),
        (
            chain("layer", "la", 17, BARE),
            {"dims": "N,T,D"},
            "onnx",
            "the sizes of the normalized axes are not known",
        ),
        (
            chain("layer", "la", 17, "y = Mul (q, heads)"),
            {"dims": "2,3,4"},
            "onnx",
            "its factors vary along other axes too",
        ),
        (
            chain("rms", "la", 17, BARE).replace("[-1]", "[0]"),
            {"dims": "3,4"},
            "ort-cpu",
            "a matrix is not worth transposing",
        ),
        (
            WIDE + chain("layer", "hw", 17, CHANNEL).replace("(x", "(h"),
            {"dims": NCHW, "dtype": "float16", "wide": "float"},
            "onnx",
            "InstanceNormalization is for float32",
        ),
        (
            chain("layer", "hw", 17, BARE),
            {"dims": "N,C,6,6"},
            "onnx",
            "the number of channels is not known",
        ),
        (
            chain("rms", "hw", 17, "y = Mul (q, gc)"),
            {"dims": NCHW},
            "onnx",
            "no cheaper spelling of a filter response norm is known",
        ),
        (
            (
                "p = Mul (x, x) v = ReduceSum <keepdims = 1> (p, la) a = Add (v, e) s = Sqrt (a)"
                " y = Div (x, s)"
            ),
            {},
            "onnx",
            "no cheaper spelling of an L2 norm is known",
        ),
        (
            (
                "m = ReduceMax <axes = [-2, -1]> (x) d = Sub (x, m) f = Exp (d)"
                " t = ReduceSum <axes = [-2, -1]> (f) y = Div (f, t)"
            ),
            {"opset": 11},
            "onnx",
            "it is over several axes",
        ),
        (
            (
                "m = ReduceMax <axes = [1]> (x) d = Sub (x, m) f = Exp (d)"
                " t = ReduceSum <axes = [1]> (f) y = Div (f, t)"
            ),
            {"opset": 11},
            "onnx",
            "takes all axes from one on together",
        ),
        (
            chain("layer", "la", 13, "y = Mul (q, heads)").replace("[-1]", "[-2, -1]"),
            {"opset": 13},
            "onnx",
            "onnxruntime fuses it over the last axis only",
        ),
    ],
)
def test_each_reason(body: str, where: dict[str, Any], target: str, reason: str) -> None:
    norm, facts = site(body, **where)
    made = choose(norm, facts, target)
    assert isinstance(made, str), made[0].name
    assert reason in made


def test_behind_a_difference_the_chain_of_an_rms_norm_would_be_taken_for_a_layer_norm() -> None:
    body = (
        "m = ReduceMean <axes = [-1]> (z) d = Sub (x, m) p = Mul (d, d)"
        " v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) q = Div (d, s)"
        " y = Mul (q, g)"
    )
    norm, facts = site(body, inputs=", float[2,3,4] z")
    assert (norm.kind, norm.input.name) == ("rms_norm", "d")
    assert Site.of(norm, facts, "onnx").centred
    assert "would take it for a layer norm" in chosen(norm, facts)
    assert chosen(norm, facts, "ort-cpu") == SIMPLE


def test_in_front_of_a_factor_that_expands_there_is_no_chain() -> None:
    norm, facts = site(chain("rms", "la", 17, "y = Mul (q, g)"), dims="2,3,1")
    assert norm.output.name == "q"
    assert "fuse it with the factor behind it" in chosen(norm, facts)


def test_factors_at_run_time_keep_the_nodes() -> None:
    norm, facts = site(chain("layer", "la", 17, AFFINE))
    assert "computed at run time" in chosen(replace(norm, gamma=norm.input), facts)


def test_without_a_type_nothing_is_written() -> None:
    norm, facts = site(chain("layer", "la", 17, AFFINE))
    facts.types.clear()
    assert "the type of 'x' is not known" in chosen(norm, facts)


@pytest.mark.parametrize(("result", "wanted"), [("float16", 10), ("float", 1)])
def test_the_wider_type_is_computed_in(result: str, wanted: int) -> None:
    back = f"w = Mul (q, g) o = Add (w, b) y = Cast <to = {wanted}> (o)"
    body = WIDE + chain("layer", "la", 17, back).replace("(x", "(h")
    norm, facts = site(body, dtype="float16", wide="float", result=result)
    made = Site.of(norm, facts, "onnx")
    assert (norm.input.name, made.given, made.wanted, made.wide) == ("x", 10, wanted, wanted)
    assert (made.rank, made.features, made.trailing) == (3, (4,), True)


def test_a_rank_that_shape_inference_loses_is_derived_behind_computed_shapes() -> None:
    """As TorchScript writes position embeddings; Whisper's decoder kept its chains for it."""
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[B,T,4] x, int64[1,T] ids, float[9,4] table) => (float y)
    <float two = {2}, float e = {0.25}, float[4] g = {1, 2, 0.5, 3}, int64[1] once = {1}>
    {
        batch = Shape <start = 0, end = 1> (x)
        repeats = Concat <axis = 0> (batch, once)
        long = Shape (repeats)
        ones = ConstantOfShape <value = int64[1] {1}> (long)
        spread = Expand (ids, ones)
        places = Tile (spread, repeats)
        rows = Gather (table, places)
        p = Pow (rows, two)
        m = ReduceMean <axes = [-1]> (p)
        v = Add (m, e)
        s = Sqrt (v)
        q = Div (rows, s)
        y = Mul (q, g)
    }
    """
    model = parser.parse_model(text)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    facts = Facts(Module(storage.from_proto(model)))
    norm = next(n for n in find_norms(facts) if n.kind == "rms_norm")
    found = Site.of(norm, facts, "ort-cpu")
    assert (found.rank, found.features) == (3, (4,))
    assert chosen(norm, facts, "ort-cpu") == SIMPLE
