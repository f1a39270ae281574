"""What a run changed, part by part, for models that are too large to be checked as a whole."""

from __future__ import annotations

import pytest

from onnxnorm import rollback
from onnxnorm.passes.fold_affine import FoldAffine
from onnxnorm.passes.fold_batchnorm import FoldBatchnorm
from onnxnorm.testing import run

HEAD = """
<ir_version: 8, opset_import: ["" : 17]>
main (float[N,2,3,3] x) => (float[N,2,3,3] y)
<float[2,2,1,1] w = {1, 2, 3, 4}, float[2] g = {2, 3}, float[2] q = {4, 9},
 float[2,1,1] s = {2, 4}>
"""
NORM = "BatchNormalization ({}, g, g, g, q)"


@pytest.mark.parametrize(
    ("body", "regions"),
    [
        # Two maps in a row: the result of the first goes with the second, and both are one part.
        (f"c = Conv (x, w) n = {NORM.format('c')} k = Mul (n, s) y = Add (k, s)", [("x", "y")]),
        # Two that have nothing in common but a value that stays what it is.
        (
            (
                f"c = Conv (x, w) n = {NORM.format('c')} r = Relu (n) d = Conv (r, w)"
                f" y = {NORM.format('d')}"
            ),
            [("x", "n"), ("r", "y")],
        ),
        # The norm goes into what reads it, and the map in front of it into the norm before that.
        (
            f"r = Relu (x) k = Mul (r, s) n = {NORM.format('k')} y = Conv (n, w)",
            [("r", "y")],
        ),
    ],
)
def test_regions_that_share_a_value_that_changes_are_one(
    body: str, regions: list[tuple[str, str]]
) -> None:
    done = run(f"{HEAD} {{ {body} }}", FoldBatchnorm(), FoldAffine())
    found = rollback._regions(done)
    assert [(r.inputs, r.outputs) for r in found] == [((a,), (b,)) for a, b in regions]
