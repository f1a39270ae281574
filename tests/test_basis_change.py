"""What every change of a stream's basis needs first: norms without a scale and a shift."""

from __future__ import annotations

import pytest

from onnxnorm.passes.fold_norm_affine import FoldNormAffine
from onnxnorm.passes.stream_compress import StreamCompress
from onnxnorm.passes.stream_fold_mean import StreamFoldMean
from onnxnorm.passes.stream_rotate import StreamRotate
from onnxnorm.rewrite import Pass
from onnxnorm.testing import assert_parity, assert_sound, run
from tests.networks import Net


@pytest.mark.parametrize("changing", [StreamCompress(), StreamRotate()], ids=lambda p: p.name)
@pytest.mark.parametrize("opset", [17, 23])
def test_a_bias_that_no_layer_takes_is_named_and_a_head_gets_an_add(
    opset: int, changing: Pass
) -> None:
    net = Net(opset=opset)
    x = net.linear(net.input("x", ["n", 5, 6]), 6, 8)
    model = net.model(net.op("MatMul", net.norm(x, 8), net.matrix(8, 3)))
    for adds in (0, 1):
        rules = (StreamFoldMean(), FoldNormAffine(max_adds=adds), changing)
        done = run(model, *rules)
        assert_sound(model, done, *rules)
        assert_parity(model, done.stored.complete())
        made = [r for r in done.remarks if r.rule == changing.name]
        assert sum(r.outcome == "applied" for r in made) == adds
        if not adds:
            told = "has a bias" if opset < 23 else "joins it with constants"
            assert told in made[0].reason
