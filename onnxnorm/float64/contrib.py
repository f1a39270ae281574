"""onnxruntime's own operators in float64."""

from __future__ import annotations

import math

import numpy as np

from onnxnorm.float64.call import (
    CONTRIB,
    Array,
    Call,
    NotImplementedHere,
    Value,
    floats,
    implements,
)
from onnxnorm.float64.elementwise import fast_gelu, gelu, sigmoid
from onnxnorm.float64.norms import along_channels, standardize
from onnxnorm.float64.products import gemm
from onnxnorm.float64.quantized import replaced
from onnxnorm.float64.recurrent import activation
from onnxnorm.float64.windows import convolve


@implements("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasSplitGelu", domain=CONTRIB)
def _contrib_gelu(call: Call) -> list[Value]:
    x = call.inputs[0]
    x = x if call.input(1) is None else x + call.inputs[1]
    if call.op_type == "FastGelu":
        return [fast_gelu(x)]
    if call.op_type == "QuickGelu":
        (alpha,) = floats(call, alpha=1.702)
        return [x * sigmoid(alpha * x)]
    if call.op_type == "BiasSplitGelu":
        left, right = np.split(x, 2, axis=-1)
        return [left * gelu(right)]
    return [gelu(x)]


@implements("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", domain=CONTRIB)
def _skip_norm(call: Call) -> list[Value]:
    x, skip, gamma = call.inputs[:3]
    simplified = call.op_type == "SkipSimplifiedLayerNormalization"
    beta, bias = (None, call.input(3)) if simplified else (call.input(3), call.input(4))
    (epsilon,) = floats(call, epsilon=1e-12)
    total = x + skip
    total = total if bias is None else total + bias
    mean = np.mean(total, axis=-1, keepdims=True)
    centred = total if simplified else total - mean
    inverse = 1.0 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    y = centred * inverse * gamma
    return [y if beta is None else y + beta, mean, inverse, total]


@implements("Attention", domain=CONTRIB)
def _contrib_attention(call: Call) -> list[Value]:
    """softmax(scale q k^T) v in heads, with q, k and v from one product; without a mask."""
    x, weight = call.inputs[:2]
    bias = call.input(2)
    special = ("unidirectional", "do_rotary", "past_present_share_buffer", "qkv_hidden_sizes")
    if any(v is not None for v in call.inputs[3:]) or any(map(call.attribute, special)):
        raise NotImplementedHere("Attention with a mask or a past")
    if call.wants(1):
        raise NotImplementedHere("Attention that gives its keys and values")
    heads = call.attribute("num_heads")
    made = x @ weight if bias is None else x @ weight + bias
    batch, length, width = made.shape
    size = width // 3 // heads
    q, k, v = made.reshape(batch, length, 3, heads, size).transpose(2, 0, 3, 1, 4)
    (scale,) = floats(call, scale=0.0)
    scores = q @ k.swapaxes(-1, -2) * (scale or size**-0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
    return [mixed.transpose(0, 2, 1, 3).reshape(batch, length, heads * size)]


@implements("EmbedLayerNormalization", domain=CONTRIB)
def _embed_norm(call: Call) -> list[Value]:
    ids, words, places = call.inputs[0].astype(np.int64), call.inputs[2], call.inputs[3]
    segments, kinds, mask, positions = (call.input(i) for i in (1, 4, 7, 8))
    at = np.arange(ids.shape[1]) if positions is None else positions.astype(np.int64)
    total = words[ids] + places[at]
    if segments is not None and kinds is not None:
        total = total + kinds[segments.astype(np.int64)]
    (epsilon,) = floats(call, epsilon=1e-12)
    centred = total - np.mean(total, axis=-1, keepdims=True)
    deviation = np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + epsilon)
    used = np.zeros(ids.shape) if mask is None else mask == 1
    counts = used.sum(axis=-1).astype(np.int32)
    return [centred / deviation * call.inputs[5] + call.inputs[6], counts, total]


@implements("FusedMatMul", domain=CONTRIB)
def _fused_matmul(call: Call) -> list[Value]:
    a, b = call.inputs
    if call.attribute("transBatchA", 0) or call.attribute("transBatchB", 0):
        raise NotImplementedHere("FusedMatMul with transposed batches")
    a = np.swapaxes(a, -1, -2) if call.attribute("transA", 0) and a.ndim > 1 else a
    b = np.swapaxes(b, -1, -2) if call.attribute("transB", 0) and b.ndim > 1 else b
    (alpha,) = floats(call, alpha=1.0)
    return [np.asarray(alpha * np.matmul(a, b))]


def _fused_activation(call: Call, y: Array) -> Array:
    name = call.attribute("activation", "")
    parameters = [float(p) for p in call.attribute("activation_params") or ()]
    if name in {"", "Identity"}:
        return y
    if name == "Clip":
        low, high = parameters
        return np.asarray(np.clip(y, low, high))
    alpha = float(call.attribute("activation_alpha", parameters[0] if parameters else math.nan))
    beta = float(call.attribute("activation_beta", parameters[1] if parameters[1:] else math.nan))
    given = (None if math.isnan(alpha) else alpha, None if math.isnan(beta) else beta)
    return activation(name, *given)(y)


@implements("FusedConv", "FusedGemm", domain=CONTRIB)
def _fused(call: Call) -> list[Value]:
    if call.op_type == "FusedGemm":
        return [_fused_activation(call, gemm(replaced(call, call.inputs, "Gemm"))[0])]
    y = convolve(replaced(call, call.inputs[:3]))
    return [_fused_activation(call, y if call.input(3) is None else y + call.inputs[3])]


@implements("GroupNorm", "SkipGroupNorm", domain=CONTRIB)
def _contrib_group_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs[:3]
    if call.op_type == "SkipGroupNorm":
        skip, bias = call.inputs[3], call.input(4)
        x = x + (skip if skip.ndim == x.ndim else skip[:, None, None, :])
        x = x if bias is None else x + bias
    total = x
    last = bool(call.attribute("channels_last", 1))
    x = np.moveaxis(x, -1, 1) if last else x
    (epsilon,) = floats(call, epsilon=1e-5)
    groups = int(call.attribute("groups"))
    y = standardize(x.reshape(x.shape[0], groups, -1), (2,), epsilon).reshape(x.shape)
    y = y * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim)
    if int(call.attribute("activation", 0)) == 1:
        y = y * sigmoid(y)
    return [np.moveaxis(y, 1, -1) if last else y, total]
