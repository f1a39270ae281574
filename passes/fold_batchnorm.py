"""Fold an inference-time BatchNormalization into the convolution that feeds it.

    BatchNormalization(Conv(x, W, b), gamma, beta, mean, variance)
        ->  Conv(x, s * W, s * (b - mean) + beta)      s = gamma / sqrt(variance + epsilon)

and the same for ConvTranspose, per output channel. Exact over the reals. In floating point s is
formed in float64 and each parameter is rounded once on the way back, which adds half a unit in its
last place and saves the roundings of the BatchNormalization itself. Source: the definitions of
BatchNormalization, Conv and ConvTranspose in the ONNX operator specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.matcher import Match
from onnxnorm.norm_operators import training_reason
from onnxnorm.pattern import const, maybe, op, var
from onnxnorm.port import Port, is_real
from onnxnorm.rewrite import Refusal, RewritePass, Rewriter

DEFAULT_EPSILON: Final = 1e-5  # BatchNormalization's schema default
_PARAMETERS: Final = ("gamma", "beta", "mean", "variance")
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
        *(const(n) for n in _PARAMETERS),
        name="batchnorm",
    )

    def check(self, m: Match) -> Refusal | None:
        """Every way in which folding could change the outputs."""
        if refusal := _refuse_training(m):
            return refusal
        port = Port.of(m.node("conv"), m.facts)
        if isinstance(port, str):
            return Refusal(port, at="conv")
        for name in _PARAMETERS:
            if not is_real(m.constant(name).dtype):
                return Refusal(f"{name} is of type {m.constant(name).dtype}", at="batchnorm")
            shape = m.constant(name).shape
            if shape != (port.features,):
                reason = f"{name} has shape {list(shape)} for {port.features} output channels"
                return Refusal(reason, at="batchnorm", advice="Check the model with onnx.checker.")
        if port.shares_weight and port.weight.nbytes > self.max_copy_mb * 1_000_000:
            size = f"{port.weight.nbytes / 1e6:.0f} MB"
            reason = f"weight '{port.weight.name}' has other readers and a copy takes {size}"
            return Refusal(reason, at="conv", advice="Raise fold-batchnorm{max_copy_mb=...}.")
        scale, shift = _affine(m)
        if not np.isfinite(scale).all():
            return Refusal("gamma / sqrt(variance + epsilon) is not finite", at="batchnorm")
        if not np.isfinite(shift).all():
            return Refusal(
                "beta - mean * gamma / sqrt(variance + epsilon) is not finite", at="batchnorm"
            )
        if not np.isfinite(port.shifted(scale, shift).astype(np.float64)).all():
            return Refusal(f"the folded bias is not finite in {port.weight.dtype}", at="conv")
        if misfit := port.misfit(scale):
            return Refusal(f"the folded weight {misfit}", at="conv")
        return None

    def rewrite(self, m: Match, rw: Rewriter) -> None:
        """Scale the weight, move the shift into the bias."""
        port = Port.of(m.node("conv"), m.facts)
        assert isinstance(port, Port)
        scale, shift = _affine(m)
        weight = rw.constant("weight", port.scaled(scale))
        bias = rw.constant("bias", port.shifted(scale, shift))
        rw.replace_like(port.node, port.inputs(weight, bias))


def _affine(m: Match) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(s, t) with BN(y) = s * y + t, one of each per channel."""
    epsilon = m.attr("batchnorm", "epsilon", DEFAULT_EPSILON)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # check() sees the outcome
        scale = m.float64("gamma") / np.sqrt(m.float64("variance") + epsilon)
        return scale, m.float64("beta") - m.float64("mean") * scale


def _refuse_training(m: Match) -> Refusal | None:
    node = m.node("batchnorm")
    if reason := training_reason(node):
        return Refusal(reason, at="batchnorm", advice=_EVAL_MODE)
    if name := node.parameter("epsilon", "spatial"):
        return Refusal(f"{name} is a parameter of the function", at="batchnorm")
    if node.scope.opsets[""] < 9 and m.attr("batchnorm", "spatial", 1) == 0:
        return Refusal("spatial is 0: it has statistics for every position", at="batchnorm")
    return None
