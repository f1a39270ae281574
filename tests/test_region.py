"""Regions: what is between a base and a node, where it starts, who else reads inside."""

from __future__ import annotations

from onnx import parser

from onnxnorm import storage
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.moment_rules import Moments
from onnxnorm.norms import find_norms
from onnxnorm.region import Region, slice_back
from onnxnorm.statics import Statics


def cut(
    body: str, *, root: str = "y", base: str = "x", more: str = "", partly: bool = False
) -> Region | None:
    text = f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,4] x, float[N,4] z) => (float[?,?] y{more})
    <float[4] g = {{1, 2, 3, 4}}, int64[1] a = {{0}}, int64 i = {{0}}, float two = {{2}}>
    {{ {body} }}
    """
    facts = Facts(Module(storage.from_proto(parser.parse_model(text))))
    scope = facts.module.main
    moments = Moments(facts, scope, Statics(facts))
    for node in scope.nodes:
        moments.visit(node)
    made = facts.producer(scope.values[root])
    assert made is not None
    return slice_back(moments, made, scope.values[base], partly=partly)


def names(region: Region | None) -> list[str]:
    assert region is not None
    return sorted(n.outputs[0].name for n in region.nodes)


def test_a_region_has_the_nodes_between_and_not_the_constants() -> None:
    region = cut("w = Neg (g) k = Relu (z) b = Neg (x) c = Exp (b) y = Mul (c, w)")
    assert names(region) == ["b", "c", "y"]
    assert region is not None
    assert (region.input.name, region.escape) == ("x", None)


def test_it_is_none_where_something_else_is_read_at_run_time() -> None:
    assert cut("b = Neg (x) y = Mul (b, z)") is None
    assert cut("b = Neg (x) k = Relu (z) y = Mul (b, k)") is None


def test_a_near_miss_may_read_other_values() -> None:
    assert names(cut("b = Exp (x) y = Mul (b, z)", partly=True)) == ["y"]
    assert names(cut("b = Neg (x) y = Mul (b, z)", partly=True)) == ["b", "y"]


def test_it_starts_at_the_one_copy_that_it_reads() -> None:
    region = cut("c = Identity (x) b = Neg (c) y = Exp (b)")
    assert names(region) == ["b", "c", "y"]  # nobody else needs that copy
    region = cut("c = Identity (x) k = Relu (c) b = Neg (c) y = Exp (b)", more=", float[?,?] k")
    assert names(region) == ["b", "y"]
    assert region is not None
    assert region.input.name == "c"


def test_with_two_copies_it_starts_at_the_base() -> None:
    body = "c = Identity (x) d = Identity (x) k = Add (c, d) b = Sub (c, d) y = Exp (b)"
    region = cut(body, more=", float[?,?] k")
    assert region is not None
    assert region.input.name == "x"


def test_sizes_that_only_it_needs_are_part_of_it() -> None:
    size = "s = Shape (x) n = Gather (s, i) f = Cast <to = 1> (n) "
    region = cut(size + "b = Neg (x) y = Div (b, f)")
    assert names(region) == ["b", "f", "n", "s", "y"]
    region = cut(size + "k = Exp (f) b = Neg (x) y = Div (b, f)", more=", float k")
    assert names(region) == ["b", "y"]
    assert region is not None
    assert region.escape is None


def test_an_output_in_the_middle_is_an_escape() -> None:
    region = cut("b = Neg (x) y = Exp (b)", more=", float[?,?] b")
    assert region is not None
    assert region.escape is not None
    assert region.escape.value.name == "b"
    assert region.escape.node.op == "Neg"
    assert region.escape.reader is None
    assert "its result 'b' is" in region.escape.reason


def test_a_reader_outside_is_an_escape() -> None:
    region = cut("[neg] b = Neg (x) [cos] k = Cos (b) y = Exp (b)", more=", float[?,?] k")
    assert region is not None
    assert region.escape is not None
    assert region.escape.reader is not None
    assert region.escape.reader.op == "Cos"
    assert region.escape.reason == (
        "inside it, the result 'b' of Neg 'neg' is also read by node 'cos' (Cos)"
    )


def test_what_only_feeds_the_region_or_nobody_is_no_escape() -> None:
    dead = cut("b = Neg (x) k = Cos (b) l = Sin (k) y = Exp (b)")
    assert dead is not None
    assert dead.escape is None
    feeding = cut("b = Neg (x) s = Shape (b) c = Exp (b) y = Reshape (c, s)")
    assert feeding is not None
    assert feeding.escape is None


def test_a_body_that_reads_inside_is_an_escape() -> None:
    region = cut(
        "b = Neg (x) y = Exp (b) t = Constant <value = bool {1}> ()"
        " k = If (t) <then_branch = p () => (float[N,4] o) { o = Sin (b) },"
        "             else_branch = q () => (float[N,4] o) { o = Cos (x) }>",
        more=", float[?,?] k",
    )
    assert region is not None
    assert region.escape is not None
    assert region.escape.value.name == "b"


def test_a_norm_whose_mean_is_an_output_is_recognised_and_stays() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    main (float[N,4] x) => (float[N,4] y, float[N,1] m) <float two = {2}, float e = {0.01}>
    {
      m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Pow (d, two)
      v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) y = Div (d, s)
    }
    """
    (norm,) = find_norms(Facts(Module(storage.from_proto(parser.parse_model(text)))))
    assert norm.recognised
    assert norm.obstacle.startswith("inside it, at ReduceMean")
    assert norm.obstacle_at is not None
    assert norm.obstacle_at.op == "ReduceMean"
