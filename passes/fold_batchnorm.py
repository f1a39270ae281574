"""Fold an inference-time BatchNormalization into the convolution that feeds it.

    BatchNormalization(Conv(x, W, b), gamma, beta, mean, variance)
        ->  Conv(x, s * W, s * (b - mean) + beta)      s = gamma / sqrt(variance + epsilon)

and the same for ConvTranspose, per output channel. Exact over the reals. In floating point s is
formed in float64 and each parameter is rounded once on the way back, which adds half a unit in its
last place and saves the roundings of the BatchNormalization itself. Source: the definitions of
BatchNormalization, Conv and ConvTranspose in the ONNX operator specification.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from onnxnorm.change import absorbed, oversized, stage
from onnxnorm.facts import AnyValue
from onnxnorm.matcher import Match
from onnxnorm.norm_operators import PARAMETERS, batch_norm_affine, training_reason
from onnxnorm.pattern import const, maybe, op, var
from onnxnorm.port import slots
from onnxnorm.rewrite import Refusal, RewritePass, Rewriter

_EVAL_MODE: Final = "Export the model in evaluation mode (model.eval() in PyTorch)."


@dataclass(frozen=True)
class FoldBatchnorm(RewritePass):
    """Remove a BatchNormalization behind a convolution whose statistics are constant.

    Attributes:
        max_copy_mb: A weight that others read too is copied; refuse copies larger than this.
    """

    max_copy_mb: int = 256

    name: ClassVar = "fold-batchnorm"
    summary: ClassVar = "BatchNormalization into the convolution that feeds it"
    equation: ClassVar = "BN(Conv(x, W, b)) -> Conv(x, s W, s (b - mean) + beta)"
    pattern: ClassVar = op(
        "BatchNormalization",
        op(("Conv", "ConvTranspose"), var("x"), const("weight"), maybe(const("bias")), name="conv"),
        *(const(n) for n in PARAMETERS),
        name="batchnorm",
    )

    def check(self, m: Match) -> Refusal | None:
        """Every way in which folding could change the outputs."""
        node, conv = m.node("batchnorm"), m.node("conv")
        if reason := training_reason(node):
            return Refusal(reason, at="batchnorm", advice=_EVAL_MODE)
        found = slots(conv, m.facts)
        if isinstance(found, str):
            return Refusal(found, at="conv")
        features = found[0].features()
        for name in PARAMETERS:
            shape = m.constant(name).shape
            if shape != (features,):
                reason = f"{name} has shape {list(shape)} for {features} output channels"
                return Refusal(reason, at="batchnorm", advice="Check the model with onnx.checker.")
        affine = batch_norm_affine(node, m.facts)
        if isinstance(affine, str):
            return Refusal(affine, at="batchnorm")
        scale, shift = affine
        if not np.isfinite(scale).all():
            return Refusal("gamma / sqrt(variance + epsilon) is not finite", at="batchnorm")
        if not np.isfinite(shift).all():
            return Refusal(
                "beta - mean * gamma / sqrt(variance + epsilon) is not finite", at="batchnorm"
            )
        changes = absorbed(conv, found, scale, shift)
        if isinstance(changes, str):
            return Refusal(f"'{conv.label}' {changes}", at="conv")
        large = oversized(changes[0], m.facts, self.max_copy_mb, self.name, node)
        if large is not None:
            return replace(large, at="conv")
        for change in changes[0]:
            if misfit := change.misfit():
                return Refusal(misfit, at="conv")
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        """Scale the weight, move the shift into the bias."""
        conv, root = m.node("conv"), m.node("batchnorm")
        found, affine = slots(conv, m.facts), batch_norm_affine(root, m.facts)
        assert not isinstance(found, str), "check() saw them"
        assert not isinstance(affine, str), "check() saw it"
        changes = absorbed(conv, found, *affine)
        assert not isinstance(changes, str), "check() saw them"
        inputs = stage(changes[0], rw, {conv: root.outputs[0].name})
        given: list[AnyValue | None] = [*conv.inputs, None][:3]
        rw.replace_like(conv, [inputs.get((conv, i), v) for i, v in enumerate(given)])
