"""Another opset: what the converter drops is kept, and what it cannot do is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser

import onnxnorm
from models.spellings import Case, cases
from onnxnorm import opset as opset_module
from onnxnorm import storage, verifier
from onnxnorm.errors import ParityError, UsageError
from onnxnorm.opset import Converted, convert
from onnxnorm.session import runtime_version
from onnxnorm.testing import assert_parity
from tests.networks import transformer

NEW: Final = (1, 31)
RUNTIME: Final = tuple(map(int, runtime_version().split(".")[:2]))
TEXT: Final = """
<ir_version: 8, opset_import: ["" : 13, "local" : 1], producer_name: "maker",
 metadata_props: ["who" : "me"]>
main (float[2,3,4] x, bool c) => (float[2,3,1] y, float[2,3,4] z)
<float[4] g = {1, 2, 3, 4}, int64[1] axes = {2}>
{
    s = Softmax <axis = -1> (x)
    y = ReduceMean <axes = [-1], keepdims = 1> (s)
    f = local.twice (x)
    z = If (c) <then_branch = t () => (float[2,3,4] a) {
                    m = ReduceMax <axes = [-1], keepdims = 1> (f) a = Sub (f, m) },
                else_branch = e () => (float[2,3,4] b) { b = Identity (f) }>
}
<domain: "local", opset_import: ["" : 13]>
twice (v) => (w)
{
    r = ReduceMean <axes = [-1], keepdims = 1> (v)
    w = Add (r, v)
}
"""


def model() -> onnx.ModelProto:
    made = parser.parse_model(TEXT)
    for node in [*made.graph.node, *made.functions[0].node]:
        node.name = f"the {node.op_type}"
        node.doc_string = f"what {node.op_type} is for"
        node.metadata_props.add(key="module", value=node.op_type)
    return made


def converted(made: onnx.ModelProto, version: int, target: str = "onnx") -> Converted:
    return convert(storage.from_proto(made), version, target, NEW)


def test_what_a_conversion_keeps() -> None:
    before = model()
    done = converted(before, 18)
    after = done.stored.complete()
    assert verifier.checker_complaint(done.stored) is None
    assert [o.version for o in after.opset_import if not o.domain] == [18]
    assert [o.version for o in after.functions[0].opset_import] == [18]
    assert after.producer_name == "maker"
    assert {e.key: e.value for e in after.metadata_props} == {"who": "me"}
    for old, new in ((before.graph.node, after.graph.node),):
        named = {n.name: n for n in new}
        for node in old:
            assert named[node.name].doc_string == node.doc_string
            assert ("module", node.op_type) in {
                (e.key, e.value) for e in named[node.name].metadata_props
            }
    assert_parity(before, after)


def test_only_what_is_defined_otherwise_is_written_anew() -> None:
    before = model()
    done = converted(before, 18)
    assert {label.partition(" ")[0] for label in done.changed} == {"ReduceMean", "ReduceMax"}
    assert len(done.changed) == 3, "one in the graph, one in a body, one in a function"
    assert done.note == "The opset was changed from 13 to 18; 3 nodes had to be written anew."
    kept = [n for n in done.stored.proto.graph.node if n.op_type == "Softmax"]
    assert kept[0] == before.graph.node[0]


def test_there_and_back() -> None:
    before = model()
    there = converted(before, 17).stored.complete()
    assert not converted(before, 17).changed
    back = converted(there, 13).stored.complete()
    assert back.graph == before.graph
    assert [o.version for o in back.opset_import if not o.domain] == [13]


def test_the_same_opset_changes_nothing() -> None:
    made = model()
    done = converted(made, 13)
    assert done.stored.complete() == made


def test_the_ir_version_follows_and_weights_stay_weights() -> None:
    made = parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 7]> main (float[2] x, float[2] w) => (float[2] y)'
        " <float[2] w = {1, 2}> { y = Add (x, w) }"
    )
    done = converted(made, 17)
    assert done.stored.proto.ir_version == 8
    assert [i.name for i in done.stored.proto.graph.input] == ["x"]


@pytest.mark.parametrize(
    ("text", "version", "target", "reason"),
    [
        ("y = Identity (x)", 5, "onnx", "is not one that can be converted to"),
        ("y = Identity (x)", 99, "onnx", "is not one that can be converted to"),
        ("y = Identity (x)", 24, "ort-cpu", "is newer than onnxruntime 1.23 loads"),
        ("y = LayerNormalization (x, g)", 13, "onnx", "there is no LayerNormalization before 17"),
        ('y = Pad <mode = "edge"> (x, p, , a)', 13, "onnx", "Pad 'y' cannot be converted"),
    ],
)
def test_refusals(text: str, version: int, target: str, reason: str) -> None:
    made = parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 18]> main (float[4] x) => (float[k] y)'
        f" <float[4] g = {{1, 2, 3, 4}}, int64[2] p = {{1, 1}}, int64[1] a = {{0}}> {{ {text} }}"
    )
    with pytest.raises(UsageError, match=reason):
        convert(storage.from_proto(made), version, target, (1, 23))


GROUPED: Final = """
<ir_version: 10, opset_import: ["" : 18]>
main ({kind}[N,{channels},3,5] x, {kind}[2] h) => ({kind}[N,{channels},3,5] y)
<{kind}[2] g = {{0.5, 2.0}}, {kind}[2] b = {{0.25, -1.0}}>
{{ y = GroupNormalization <num_groups = 2> (x, g, {bias}) }}
"""


@pytest.mark.parametrize("kind", ["float", "double"])
@pytest.mark.parametrize("channels", [2, 6])
def test_a_group_norm_has_a_scale_for_each_channel(kind: str, channels: int) -> None:
    """From opset 21 on; and float64 is computed in float32 there unless the node says otherwise."""
    model = parser.parse_model(GROUPED.format(kind=kind, channels=channels, bias="b"))
    done = convert(storage.from_proto(model), 21, "onnx", (1, 31)).stored.complete()
    assert_parity(model, done)


@pytest.mark.parametrize(
    ("channels", "bias", "reason"),
    [("C", "b", "the number of its channels is not known"), ("4", "h", "its bias is not constant")],
)
def test_a_group_norm_that_has_to_stay(channels: str, bias: str, reason: str) -> None:
    model = parser.parse_model(GROUPED.format(kind="float", channels=channels, bias=bias))
    with pytest.raises(UsageError, match=reason):
        convert(storage.from_proto(model), 21, "onnx", (1, 31))


def test_a_model_of_another_domain_alone() -> None:
    """ai.onnx.ml by itself, as scikit-learn's converter writes a linear model."""
    text = """
    <ir_version: 8, opset_import: ["ai.onnx.ml" : 1]>
    main (float[N,2] x) => (float[N,2] y) {
        y = ai.onnx.ml.Scaler <offset = [0.0, 0.5], scale = [2.0, 1.0]> (x)
    }
    """
    model = onnx.parser.parse_model(text)
    assert onnxnorm.optimize(model, latency=False).model == model
    with pytest.raises(UsageError, match="imports no operators"):
        onnxnorm.optimize(model, latency=False, opset=18)


def test_a_parameter_of_a_function_is_refused() -> None:
    made = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 13, "local" : 1]>
        main (float[2,3] x) => (float[2,1] y) { y = local.f <k = 1> (x) }
        <domain: "local", opset_import: ["" : 13]>
        f <k> (v) => (w) { w = ReduceMean <axes = [-1], keepdims: int = @k> (v) }
        """
    )
    with pytest.raises(UsageError, match="a parameter of the model-local function"):
        converted(made, 18)


def test_optimize_proves_it_and_reports_it(tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "in.onnx")
    out = tmp_path / "out.onnx"
    result = onnxnorm.optimize(
        tmp_path / "in.onnx", out, opset=18, provider="cpu", latency=False, passes="none"
    )
    report = result.report.to_json()
    assert report["parity"]["passed"] is True
    assert report["parity"]["truth"] != "not needed: the output is the input, byte for byte"
    assert any("changed from 13 to 18" in note for note in report["notes"])
    assert report["options"]["opset"] == 18
    assert [o.version for o in onnx.load(out).opset_import if not o.domain] == [18]
    again = onnxnorm.optimize(out, opset=18, provider="cpu", latency=False, passes="none")
    assert again.proto == onnx.load(out)


def test_a_norm_gets_the_operator_of_its_new_opset() -> None:
    made = parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 13]>
        main (float[N,3,4] x) => (float[N,3,4] y)
        <float[4] g = {1, 2, 3, 4}, float[4] b = {1, 0, 0, 1}, float e = {0.001}>
        {
            m = ReduceMean <axes = [-1]> (x) d = Sub (x, m) p = Mul (d, d)
            v = ReduceMean <axes = [-1]> (p) a = Add (v, e) s = Sqrt (a) q = Div (d, s)
            w = Mul (q, g) y = Add (w, b)
        }
        """
    )
    result = onnxnorm.optimize(made, opset=17, provider="cpu", latency=False)
    assert [n.op_type for n in result.proto.graph.node] == ["LayerNormalization"]
    assert result.report.to_json()["parity"]["passed"] is True


def test_a_conversion_that_changes_the_outputs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from 12 to 13, where the softmax of a matrix became one of an axis, taken for the same."""
    made = parser.parse_model(
        '<ir_version: 7, opset_import: ["" : 12]> main (float[2,3,4] x) => (float[2,3,4] y)'
        " { y = Softmax <axis = 1> (x) }"
    )
    onnx.save(made, tmp_path / "in.onnx")
    monkeypatch.setattr(opset_module, "_same_form", lambda *_: True)
    with pytest.raises(ParityError, match="in the other opset the outputs do not agree"):
        onnxnorm.optimize(
            tmp_path / "in.onnx", tmp_path / "out.onnx", opset=13, provider="cpu", latency=False
        )
    assert not (tmp_path / "out.onnx").exists()
    monkeypatch.undo()
    result = onnxnorm.optimize(made, opset=13, provider="cpu", latency=False)
    assert result.report.to_json()["parity"]["passed"] is True


_CASES: Final = [c for c in cases() if not c.mutation and c.model.opset_import[0].version >= 11]


def test_spellings_agree_in_every_opset_that_they_can_have() -> None:
    compared = 0

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(case=st.sampled_from(_CASES), version=st.sampled_from([11, 12, 13, 17, 18, 21, 23]))
    def agree(case: Case, version: int) -> None:
        nonlocal compared
        try:
            done = converted(case.model, version)
        except UsageError:
            return
        if verifier.checker_complaint(storage.from_proto(case.model)) is None:
            assert verifier.checker_complaint(done.stored) is None
        if "float16" in case.name and version >= 17 and RUNTIME < (1, 30):
            return  # where onnxruntime loses the epsilon of what it fuses, see docs/targets.md
        try:
            assert_parity(case.model, done.stored.complete())
        except ParityError:  # onnxruntime cannot run the original: most of bfloat16
            return
        except AssertionError as error:
            if "Could not find an implementation for" in str(error):
                return  # nor run the other, of an operator that the opset has: Clip(11) of float64
            raise
        compared += 1

    agree()
    # Nine of ten pairs can be compared: half of them are there unless something is refused anew.
    assert compared >= 12, f"only {compared} pairs of models were compared"


def test_a_transformer_up_and_down() -> None:
    made = transformer(seed=3)
    up = converted(made, 21).stored.complete()
    assert_parity(made, up)
    assert np.all([n.op_type for n in up.graph.node] == [n.op_type for n in made.graph.node])
