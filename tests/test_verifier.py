"""The verifier: for each invariant, a pass that breaks it and is caught by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxnorm import storage
from onnxnorm.errors import VerificationError
from onnxnorm.facts import Facts
from onnxnorm.module import Module, Node, Scope, Value, Weight
from onnxnorm.verifier import Verifier

TEXT: Final = """
<ir_version: 10, opset_import: ["" : 20]>
main (bool c, float[N,4] x) => (float[N,4] y, float[N,4] z) <float[4] w = {1, 2, 3, 4}>
{
   [first] a = Mul (x, w)
   [second] b = Neg (a)
   [choice] y = If (c) <
      then_branch = t () => (float[N,4] p) { [inner] p = Add (b, w) },
      else_branch = e () => (float[N,4] p) { r = Neg (x) p = Identity (r) }
   >
   [last] z = Abs (a)
}
"""


def opened(text: str = TEXT) -> Module:
    return Module(storage.from_proto(onnx.parser.parse_model(text)))


def find(module: Module, label: str) -> Node:
    return next(n for n in module.nodes() if n.label == label)


def then(module: Module) -> Scope:
    return next(s for s in module.scopes if s.path == "y/then_branch/")


def new(
    scope: Scope, op: str, inputs: list[Any], output: Value, site: str = "demo:y", **attrs: Any
) -> Node:
    proto = helper.make_node(op, [], [], name=f"new {op}", **attrs)
    node = Node(proto, scope, inputs, [output], site)
    scope.nodes.append(node)
    scope.touch()
    return node


def caught(module: Module, corrupt: Callable[[Module], object], *, types: bool = False) -> str:
    """What the verifier says after a pass called `demo`."""
    verifier = Verifier(module)
    if types:
        verifier.remember_types(Facts(module))
    verifier.check("demo")
    corrupt(module)
    with pytest.raises(VerificationError) as error:
        verifier.check("demo")
    assert "defect of demo" in error.value.hint
    return error.value.what


# ** every value has one producer, names are unique and mean what is linked **


def two_producers(m: Module) -> None:
    new(m.main, "Neg", [m.main.values["x"]], Value("b", m.main))


def weight_twice(m: Module) -> None:
    tensor = m.stored.keep("x", np.ones(4, np.float32))
    m.main.weights[Weight(tensor, m.main, m.stored)] = None


def output_under_the_name_of_an_input(m: Module) -> None:
    new(m.main, "Neg", [m.main.values["b"]], Value("x", m.main))


def hidden(m: Module) -> None:
    new(then(m), "Neg", [m.main.values["x"]], Value("b", then(m)))


def from_a_sibling(m: Module) -> None:
    other = next(s for s in m.scopes if s.path == "y/else_branch/")
    find(m, "inner").inputs[0] = other.values["r"]


def from_inside_a_body(m: Module) -> None:
    find(m, "last").inputs[0] = find(m, "inner").outputs[0]


def from_nowhere(m: Module) -> None:
    find(m, "last").inputs[0] = Value("new", m.main)


def weight_that_is_gone(m: Module) -> None:
    del m.main.weights[find(m, "first").inputs[1]]


def producer_that_is_gone(m: Module) -> None:
    m.main.nodes.remove(find(m, "second"))


# ** links agree in both directions **


def reader_that_is_gone(m: Module) -> None:
    find(m, "last").outputs[0].outputs.append(Node(helper.make_node("Op", [], []), m.main, [], []))


def unknown_reader(m: Module) -> None:
    list.clear(find(m, "first").outputs[0].outputs)


def unknown_producer(m: Module) -> None:
    list.clear(find(m, "first").outputs[0].inputs)


# ** inputs are computed earlier **


def swapped(m: Module) -> None:
    nodes = m.main.nodes
    nodes[0], nodes[1] = nodes[1], nodes[0]


def read_by_a_body_too_early(m: Module) -> None:
    nodes = m.main.nodes
    nodes[1], nodes[2] = nodes[2], nodes[1]


# ** inputs and outputs are those of the file **


def output_renamed(m: Module) -> None:
    m.main.outputs[1].name = "renamed"


def output_missing(m: Module) -> None:
    m.main.outputs.pop()


def outputs_exchanged(m: Module) -> None:
    m.main.outputs.reverse()


def output_replaced(m: Module) -> None:
    node = find(m, "last")
    value = Value("z", m.main)
    node.outputs.clear()
    node.outputs.append(value)
    m.main.outputs[1] = value


def input_missing(m: Module) -> None:
    m.main.inputs.pop(0)


def body_output_exchanged(m: Module) -> None:
    then(m).outputs[0] = m.main.values["x"]


# ** new operators exist **


def no_such_operator(m: Module) -> None:
    new(m.main, "LayerNormalisation", [m.main.values["x"]], Value("n", m.main))


def not_in_this_opset(m: Module) -> None:
    inputs = [m.main.values["x"], m.main.values["w"]]
    new(m.main, "RMSNormalization", inputs, Value("n", m.main))


def domain_not_imported(m: Module) -> None:
    new(m.main, "Op", [m.main.values["x"]], Value("n", m.main), domain="com.example")


def too_many_inputs(m: Module) -> None:
    new(m.main, "Neg", [m.main.values["x"], m.main.values["w"]], Value("n", m.main))


def too_few_inputs(m: Module) -> None:
    new(m.main, "Mul", [m.main.values["x"]], Value("n", m.main))


def absent_input(m: Module) -> None:
    new(m.main, "Mul", [Value("", m.main), m.main.values["x"]], Value("n", m.main))


def unknown_attribute(m: Module) -> None:
    new(m.main, "Neg", [m.main.values["x"]], Value("n", m.main), axis=1)


def missing_attribute(m: Module) -> None:
    new(m.main, "Cast", [m.main.values["x"]], Value("n", m.main))


BREAKS: Final[dict[Callable[[Module], None], str]] = {
    two_producers: "demo broke the graph: 'b' has two producers",
    weight_twice: "demo broke the graph: the name 'x' is used twice",
    output_under_the_name_of_an_input: "demo broke the graph: 'x' has two producers",
    hidden: "demo broke the graph in y/then_branch/: 'b' is hidden by another value of this name",
    from_a_sibling: "demo broke the graph in y/then_branch/: nothing produces 'r'",
    from_inside_a_body: "demo broke the graph: nothing produces 'p'",
    from_nowhere: "demo broke the graph: nothing produces 'new'",
    weight_that_is_gone: "demo broke the graph: nothing produces 'w'",
    producer_that_is_gone: "demo broke the graph: 'a' does not know its readers",
    reader_that_is_gone: "demo broke the graph: 'z' does not know its readers",
    unknown_reader: "demo broke the graph: 'a' does not know its readers",
    unknown_producer: "demo broke the graph: 'a' does not know its producer",
    swapped: "demo broke the graph: 'a' is read before it is computed",
    read_by_a_body_too_early: "demo broke the graph: 'b' is read before it is computed",
    output_renamed: "demo broke the graph: the inputs or outputs are not those of the file",
    output_missing: "demo broke the graph: the inputs or outputs are not those of the file",
    outputs_exchanged: "demo broke the graph: the inputs or outputs are not those of the file",
    output_replaced: "demo broke the graph: the inputs or outputs are not those of the file",
    input_missing: "demo broke the graph: the inputs or outputs are not those of the file",
    body_output_exchanged: (
        "demo broke the graph in y/then_branch/: the inputs or outputs are not those of the file"
    ),
    no_such_operator: "demo broke the graph: LayerNormalisation does not exist in opset 20",
    not_in_this_opset: "demo broke the graph: RMSNormalization does not exist in opset 20",
    domain_not_imported: "demo broke the graph: Op is of a domain that is not imported",
    too_many_inputs: "demo broke the graph: Neg takes no 2 inputs",
    too_few_inputs: "demo broke the graph: Mul takes no 1 inputs",
    absent_input: "demo broke the graph: Mul needs its input 'A'",
    unknown_attribute: "demo broke the graph: Neg has no attribute 'axis'",
    missing_attribute: "demo broke the graph: Cast needs the attribute 'to'",
}


@pytest.mark.parametrize("corrupt", BREAKS, ids=lambda f: f.__name__)
def test_every_broken_invariant_is_named(corrupt: Callable[[Module], None]) -> None:
    assert caught(opened(), corrupt) == BREAKS[corrupt]


def swap_producer(module: Module, op: str, label: str, **attrs: Any) -> None:
    """Let another operator compute what `label` computes."""
    old = find(module, label)
    inputs, outputs = list(old.inputs), list(old.outputs)
    at = module.main.nodes.index(old)
    module.main.nodes.remove(old)
    old.inputs.clear()
    old.outputs.clear()
    new(module.main, op, inputs, outputs[0], **attrs)
    module.main.nodes.insert(at, module.main.nodes.pop())


@pytest.mark.parametrize(
    ("op", "attrs", "says"),
    [
        ("Cast", {"to": 10}, "demo changed the element type of 'b'"),
        ("Flatten", {"axis": 0}, "demo changed the shape of 'b' from (2, 4) to (1, 8)"),
        ("Shape", {}, "demo changed the element type of 'b'"),
        ("Transpose", {"perm": [1, 0]}, "demo changed the shape of 'b' from (2, 4) to (4, 2)"),
        ("ReduceSum", {"keepdims": 0}, "demo changed the shape of 'b' from (2, 4) to ()"),
    ],
)
def test_known_types_are_not_contradicted(op: str, attrs: dict[str, Any], says: str) -> None:
    text = TEXT.replace("[N,4]", "[2,4]") if "(2, 4)" in says else TEXT
    what = caught(opened(text), lambda m: swap_producer(m, op, "second", **attrs), types=True)
    assert what.startswith(says)


def test_types_are_those_before_the_first_pass() -> None:
    module = opened()
    verifier = Verifier(module)
    verifier.remember_types(Facts(module))
    swap_producer(module, "Cast", "second", to=10)
    verifier.remember_types(Facts(module))
    with pytest.raises(VerificationError, match="element type of 'b'"):
        verifier.check("demo")


def test_a_sound_change_passes() -> None:
    module = opened()
    verifier = Verifier(module)
    verifier.remember_types(Facts(module))
    swap_producer(module, "Abs", "second")
    verifier.check("demo")


def test_what_the_file_had_unsorted_may_stay_so() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> main (float[N] x) => (float[N] y)'
    module = opened(text + "{ y = Neg (a) a = Abs (x) }")
    Verifier(module).check("demo")


def test_nodes_of_the_file_need_no_schema() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20, "d" : 1]> main (float[N] x) => (float[N] y)'
    module = opened(text + "{ a = NoSuchOp <k = 1> (x) y = d.Op (a) }")
    module.main.touch()
    verifier = Verifier(module)
    verifier.check("demo")
    known: Any = module.main.values
    new(module.main, "Op", [known["a"]], Value("n", module.main), domain="d", any=1)
    verifier.check("demo")


def test_weights_listed_as_inputs_may_change_before_ir_version_4() -> None:
    text = '<ir_version: 3, opset_import: ["" : 8]> main (float[N] x, float[1] w = {1})'
    module = opened(text + " => (float[N] y) { y = Mul (x, w) }")
    verifier = Verifier(module)
    node = module.main.nodes[0]
    tensor = module.stored.keep("v", np.ones(1, np.float32))
    weight = Weight(tensor, module.main, module.stored)
    module.main.weights[weight] = None
    old = node.inputs[1]
    node.inputs[1] = weight
    del module.main.weights[old]
    module.main.graph.inputs.remove(old)
    module.main.touch()
    verifier.check("demo")
    graph = module.export().proto.graph
    assert [i.name for i in graph.input] == ["x", "v"]
    assert [t.name for t in graph.initializer] == ["v"]
