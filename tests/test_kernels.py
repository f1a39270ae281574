"""Calls of our own operators in a model: functions come and go with them, and nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
from onnx import helper, parser

import onnxnorm
from onnxnorm import kernels, session, storage
from onnxnorm.errors import OnnxNormError, UsageError, VerificationError
from onnxnorm.facts import Facts
from onnxnorm.module import Module
from onnxnorm.norms import find_norms
from onnxnorm.ops import bodies, library
from onnxnorm.passes.lower_channel_norm import LowerChannelNorm
from onnxnorm.passes.lower_group_norm import LowerGroupNorm
from onnxnorm.passes.lower_softmax import LowerSoftmax
from onnxnorm.pipeline import Pipeline
from onnxnorm.rewrite import Plan, Rewriter
from onnxnorm.session import open_session
from onnxnorm.testing import assert_refuses, run
from onnxnorm.verifier import Verifier
from tests.mutants import mutated
from tests.ops.calls import assert_expected, needs_library
from tests.ops.test_bodies import example
from tests.passes.test_lower_softmax import REFUSALS

RULES: Final = tuple(p("ort-cpu", True) for p in (LowerSoftmax, LowerChannelNorm, LowerGroupNorm))
SOFTMAX: Final = """
<ir_version: 8, opset_import: ["" : 17], producer_name: "someone", doc_string: "kept">
main (float[1,3,16,16] x) => (float[1,3,16,16] y, float[1,3,16,16] z) {
    y = Softmax <axis: int = 1> (x)
    z = Softmax <axis: int = 1> (y)
}
"""
FUNCTIONS: Final = """
<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
main (float[1,3,16,16] x) => (float[1,3,16,16] y) {
    a = local.F (x)
    y = Softmax <axis: int = 1> (a)
}
<domain: "local", opset_import: ["" : 17]> F (x) => (y) { y = Neg (x) }
"""


def optimized(text: str, **given: Any) -> onnxnorm.Result:
    asked: dict[str, Any] = {"target": "ort-cpu", "ops": True, "latency": False} | given
    return onnxnorm.optimize(parser.parse_model(text), **asked)


@needs_library
def test_a_function_is_added_once_and_all_else_is_kept() -> None:
    before = parser.parse_model(SOFTMAX)
    made = optimized(SOFTMAX).model
    assert [n.op_type for n in made.graph.node] == ["TwoPassSoftmax"] * 2
    assert [f.name for f in made.functions] == ["TwoPassSoftmax"]
    assert [(i.domain, i.version) for i in made.opset_import] == [("", 17), ("onnxnorm", 1)]
    onnx.checker.check_model(made, full_check=True)
    del made.functions[:], made.opset_import[1:], made.graph.node[:], before.graph.node[:]
    assert made == before


@needs_library
def test_functions_of_the_model_stay() -> None:
    before, made = parser.parse_model(FUNCTIONS), optimized(FUNCTIONS).model
    assert [(f.domain, f.name) for f in made.functions] == [
        ("local", "F"),
        ("onnxnorm", "TwoPassSoftmax"),
    ]
    assert made.functions[0] == before.functions[0]


@needs_library
def test_optimizing_again_changes_nothing_and_lists_the_calls_alone() -> None:
    first = optimized(SOFTMAX)
    again = onnxnorm.optimize(first.model, target="ort-cpu", ops=True, latency=False)
    assert again.model == first.model
    assert [(n["kind"], n["axes"], n["action"]) for n in again.report.norms] == [
        ("softmax", [1], "kept")
    ] * 2


@needs_library
def test_a_second_run_uses_the_function_that_is_there() -> None:
    only = [f"lower-softmax:{name}" for name in "yz"]
    first = optimized(SOFTMAX, only=only[:1], parity=False).model
    second = onnxnorm.optimize(first, target="ort-cpu", ops=True, latency=False, parity=False).model
    assert [n.op_type for n in second.graph.node] == ["TwoPassSoftmax"] * 2
    assert [f.name for f in second.functions] == ["TwoPassSoftmax"]
    assert sum(i.domain == "onnxnorm" for i in second.opset_import) == 1


def test_a_function_that_nobody_calls_any_more_goes_and_others_stay() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "onnxnorm" : 1]>
        main (float[1,3,16,16] x) => (float[1,3,16,16] y) {
            a = onnxnorm.TwoPassSoftmax <axis: int = 1> (x)
            y = Neg (a)
        }"""
    )
    bodies.add_functions(model)
    model.functions.append(bodies.function("TwoPassLogSoftmax", 17))  # unused from the start
    module = Module(storage.from_proto(model))
    facts = Facts(module)
    rewriter = Rewriter(module, facts)
    root = module.main.nodes[1]
    rewriter.begin("test", Plan(root, (root,), None))
    rewriter.replace("Neg", [module.main.inputs[0]])
    rewriter.commit()
    rewriter.finish()
    made = module.export().complete()
    assert [n.op_type for n in made.graph.node] == ["Neg"]
    assert [f.name for f in made.functions] == ["TwoPassLogSoftmax"]


@pytest.mark.parametrize("fault", ["no function", "inputs", "attributes"])
def test_the_verifier_knows_the_functions(fault: str) -> None:
    module = Module(storage.from_proto(parser.parse_model(SOFTMAX)))
    verifier = Verifier(module)
    rewriter = Rewriter(module, Facts(module))
    root = module.main.nodes[0]
    rewriter.begin("test", Plan(root, (root,), None))
    given = root.inputs[0]
    module.main.opsets[bodies.DOMAIN] = 1  # type: ignore[index]
    if fault != "no function":
        module.carry("TwoPassSoftmax")
    inputs = [given, given] if fault == "inputs" else [given]
    attrs = {} if fault == "attributes" else {"axis": 1}
    rewriter.replace("TwoPassSoftmax", inputs, domain=bodies.DOMAIN, attrs=attrs)
    rewriter.commit()
    rewriter.finish()
    with pytest.raises(VerificationError, match="TwoPassSoftmax"):
        verifier.check("test")


def test_each_operator_of_ours_is_one_norm_and_its_body_is_none() -> None:
    kinds = {}
    for name in bodies.OPERATORS:
        inputs, attributes = example(name)
        names = [f"X{i}" for i in range(len(inputs))]
        shaped = [
            helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, a.shape)
            for n, a in zip(names, inputs, strict=True)
        ]
        node = bodies.node(name, names, "Y", **attributes)
        out = helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, inputs[0].shape)
        graph = helper.make_graph([node, helper.make_node("Neg", ["Y"], ["Z"])], "g", shaped, [out])
        imports = [helper.make_opsetid("", 18)]
        model = bodies.add_functions(helper.make_model(graph, opset_imports=imports, ir_version=8))
        facts = Facts(Module(storage.from_proto(model)))
        (norm,) = find_norms(facts)
        kinds[name] = (norm.kind, norm.axes, norm.operator, norm.groups)
        known = facts.type(norm.output)
        assert known is not None
        assert known.shape == inputs[0].shape
        assert not Pipeline(RULES).run(storage.from_proto(model)).remarks
    assert kinds == {
        "TwoPassSoftmax": ("softmax", (1,), True, 0),
        "TwoPassLogSoftmax": ("log_softmax", (1,), True, 0),
        "TwoPassMaskedSoftmax": ("softmax", (1,), True, 0),
        "TwoPassMaskedLogSoftmax": ("log_softmax", (1,), True, 0),
        "ChannelLayerNormalization": ("layer_norm", (1,), True, 0),
        "ChannelRMSNormalization": ("rms_norm", (1,), True, 0),
        "GroupNormalization": ("group_norm", (1, 2), True, 3),
        "GroupNormalizationSilu": ("group_norm", (1, 2), True, 3),
    }


# ** asked for or not, with the library and without it **


@pytest.mark.parametrize("target", ["onnx", "ort-cpu"])
def test_without_the_option_nothing_is_written_and_nothing_said(target: Any) -> None:
    result = optimized(SOFTMAX, target=target, ops=False, parity=False)
    assert [n.op_type for n in result.model.graph.node] == ["Softmax"] * 2
    assert not result.report.sites
    assert not result.report.notes


@pytest.mark.parametrize("target", ["onnx", "ort-cuda"])
def test_the_option_is_for_one_target(target: Any) -> None:
    for call in (onnxnorm.optimize, onnxnorm.inspect):
        with pytest.raises(UsageError, match=f"--ops was given for the target {target}"):
            call(parser.parse_model(SOFTMAX), target=target, ops=True)


@pytest.mark.parametrize("missing", [("no C++ compiler was found",), ()])
def test_without_the_library_the_passes_refuse(
    missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "describe", lambda: library.Library(None, missing=missing))
    why = missing[0] if missing else "it has no kernel for TwoPassSoftmax"
    assert_refuses(SOFTMAX, RULES[0], f"the operator library is not there: {why}")


@needs_library
def test_a_library_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.describe().path
    monkeypatch.setattr(library, "describe", lambda: library.Library(path))
    assert_refuses(SOFTMAX, RULES[0], "it has no kernel for TwoPassSoftmax")


@needs_library
def test_a_norm_over_channels_becomes_a_call_before_its_stream_loses_the_mean() -> None:
    done = optimized(
        """<ir_version: 8, opset_import: ["" : 17]>
        main (float[1,2,16,16] x) => (float[1,2,16,16] y)
        <float[2,2,1,1] w = {1, 2, 3, 4}, float[2] g = {1, 2}, float[2] b = {0.5, -1}> {
            c = Conv (x, w)
            p = Transpose <perm: ints = [0, 2, 3, 1]> (c)
            n = LayerNormalization (p, g, b)
            y = Transpose <perm: ints = [0, 3, 1, 2]> (n)
        }"""
    )
    assert [n.op_type for n in done.model.graph.node] == ["Conv", "ChannelLayerNormalization"]
    (row,) = done.report.norms
    assert (row["action"], row["into"]) == ("lowered", "ChannelLayerNormalization")
    for asked in (True, False):
        again = onnxnorm.optimize(done.model, target="ort-cpu", ops=asked, latency=False)
        assert again.model == done.model


@needs_library
def test_the_report_says_how_it_was_run() -> None:
    report = optimized(SOFTMAX, provider="cpu").report
    assert report.parity is not None
    assert report.parity["passed"]
    assert any("have the operator library" in note for note in report.notes)
    assert report.options["ops"] is True


@needs_library
def test_sessions_have_the_library_where_optimizations_are_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(run(SOFTMAX, RULES[0]).stored.complete(), path)
    x = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    graphs, results = [], []
    for place, optimize in enumerate((True, False, True)):
        if place == 2:
            monkeypatch.setattr(session, "describe", lambda: library.Library(None))
        written = tmp_path / f"{place}.onnx"
        with open_session(path, optimize=optimize, optimized_model_path=written) as opened:
            results.append(opened.run({"x": x})["y"])
        graphs.append({n.op_type for n in onnx.load(written).graph.node})
    assert "TwoPassSoftmax" in graphs[0]
    assert all("TwoPassSoftmax" not in graph for graph in graphs[1:])
    for result in results:
        assert_expected(result, "TwoPassSoftmax", [x], {"axis": 1})


# ** each condition of a call is needed **

CONDITIONS: Final = {
    "library": ("there.path is None or name not in there.operators", "False"),
    "function": ("if scope.is_function:", "if False:"),
    "IR version": ("version < bodies.IR_VERSION", "False"),
    "opset": ("opset < bodies.OPERATORS[name].opset", "False"),
    "domain": ("scope.opsets.get(bodies.DOMAIN, bodies.VERSION) != bodies.VERSION", "False"),
    "namesake": ("known is not None and not _is_same", "False and _is_same"),
}
CASES: Final = {
    "function": "in a function",
    "IR version": "an old IR version",
    "opset": "an old opset",
    "domain": "another version of our domain",
    "namesake": "another function of that name",
}


@needs_library
@pytest.mark.parametrize("name", CONDITIONS)
def test_each_condition_is_needed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, reason = REFUSALS[CASES[name]] if name in CASES else (SOFTMAX, "is not there")
    if name == "library":
        monkeypatch.setattr(library, "describe", lambda: library.Library(None))
    assert_refuses(before, RULES[0], reason)
    old, new = CONDITIONS[name]
    monkeypatch.setattr(kernels, "lack", mutated(kernels, old, new)["lack"])
    with pytest.raises((AssertionError, OnnxNormError)):
        assert_refuses(before, RULES[0], reason)
