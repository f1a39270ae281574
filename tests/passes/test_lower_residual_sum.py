"""A residual Add that onnxruntime would fuse into SkipLayerNormalization is written as a Sum."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxnorm.passes.lower_residual_sum import LowerResidualSum
from onnxnorm.session import optimized_graph
from onnxnorm.staging import save
from onnxnorm.testing import assert_parity, assert_refuses, assert_rewrites, run

RULE = LowerResidualSum("ort-cpu")
NORM = "y = LayerNormalization <axis: int = -1> (s, g)"


def graph(body: str, shape: str = "1,3,2", kind: str = "float", outputs: str = "") -> str:
    return f"""
    <ir_version: 8, opset_import: ["" : 17]>
    main ({kind}[{shape}] a, {kind}[{shape}] b, int64[1,3] i) => ({kind}[{shape}] y{outputs})
    <{kind}[2] g = {{1.0, 2.0}}, {kind}[2,2] t = {{0.5, 1.0, 2.0, 3.0}}> {{ {body} }}
    """


def test_the_same_sum_by_another_name() -> None:
    done = assert_rewrites(
        graph(f"s = Add (a, b)\n {NORM}"), graph(f"s = Sum (a, b)\n {NORM}"), RULE
    )
    assert [r.site for r in done.applied] == ["lower-residual-sum:s"]


@pytest.mark.parametrize("shape", ["1,3,2", "N,S,2"])
def test_onnxruntime_fuses_the_one_and_not_the_other(tmp_path: Path, shape: str) -> None:
    before = graph(f"s = Add (a, b)\n {NORM}", shape)
    kinds = []
    for name, passes in (("before", ()), ("after", (RULE,))):
        save(run(before, *passes).stored, tmp_path / name)
        kinds.append({n.op_type for n in optimized_graph(tmp_path / name).graph.node})
    assert kinds == [{"SkipLayerNormalization"}, {"Sum", "LayerNormalization"}]
    assert_parity(before, run(before, RULE).stored.complete())


@pytest.mark.parametrize(
    "text",
    [
        graph(f"s = Add (a, b)\n {NORM}", outputs=", float[1,3,2] s"),
        graph(f"s = Add (a, b)\n {NORM.replace('y =', 'n =')}\n y = Add (n, s)"),
        graph(f"s = Add (a, b)\n {NORM}", "1,3,3,2"),
        graph(f"s = Add (a, b)\n {NORM}", "3,2"),
        graph(f"s = Add (a, b)\n {NORM}", kind="double"),  # has no fused operator
        graph(f"s = Mul (a, b)\n {NORM}"),
        graph("s = Add (a, b)\n y = Relu (s)"),
    ],
)
def test_what_onnxruntime_does_not_fuse_stays(text: str) -> None:
    done = run(text, RULE)
    assert not done.remarks


@pytest.mark.parametrize("target", ["onnx", "ort-cuda"])
def test_other_targets_have_no_use_for_it(target: str) -> None:
    assert not run(graph(f"s = Add (a, b)\n {NORM}"), LowerResidualSum(target)).remarks


@pytest.mark.parametrize(
    "sum_", ["s = Add (w, b)", "s = Add (b, w)", "u = Add (w, a)\n s = Add (u, b)"]
)
def test_embeddings_are_left_to_their_own_fusion(sum_: str) -> None:
    text = graph(f"w = Gather (t, i)\n {sum_}\n {NORM}")
    done = assert_refuses(text, RULE, "onnxruntime makes EmbedLayerNormalization of it")
    assert [r.outcome for r in done.remarks] == ["kept"]
