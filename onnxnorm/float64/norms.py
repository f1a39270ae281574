"""Normalizations in float64."""

from __future__ import annotations

import numpy as np

from onnxnorm.float64.call import (
    CONTRIB,
    OPERATORS,
    Array,
    Call,
    NotImplementedHere,
    Value,
    floats,
    implements,
)


def along_channels(value: Array, rank: int) -> Array:
    """Bring one number for each channel to axis 1 of a tensor of some rank."""
    return np.asarray(value.reshape(-1, *(1,) * (rank - 2)) if rank > 1 else value)


@implements("BatchNormalization")
def _batch_norm(call: Call) -> list[Value]:
    x, gamma, beta, mean, variance = call.inputs
    (epsilon, momentum) = floats(call, epsilon=1e-5, momentum=0.9)
    extra: list[Value] = []
    training = call.attribute("training_mode", 0)
    if call.version < 7:
        training = call.attribute("is_test", 0) == 0
    elif call.version < 14:
        training = call.wants(1) or call.wants(2)
    if training:
        if call.version < 14:
            raise NotImplementedHere("BatchNormalization that trains before opset 14")
        axes = (0, *range(2, x.ndim))
        now, spread = np.mean(x, axis=axes), np.var(x, axis=axes)
        extra = [mean * momentum + now * (1 - momentum)]
        extra.append(variance * momentum + spread * (1 - momentum))
        mean, variance = now, spread
    if call.version < 9 and call.attribute("spatial", 1) == 0:
        scale = gamma / np.sqrt(variance + epsilon)
        return [(x - mean) * scale + beta]
    scale = gamma / np.sqrt(variance + epsilon)
    rank = x.ndim
    return [
        (x - along_channels(mean, rank)) * along_channels(scale, rank) + along_channels(beta, rank),
        *extra,
    ]


@implements("InstanceNormalization")
def _instance_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs
    (epsilon,) = floats(call, epsilon=1e-5)
    y = standardize(x, tuple(range(2, x.ndim)), epsilon)
    return [y * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim)]


def standardize(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Return (x - mean) / sqrt(variance + epsilon) over some axes."""
    centred = x - np.mean(x, axis=axes, keepdims=True)
    variance = np.mean(centred * centred, axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + epsilon))


@implements("LayerNormalization")
def _layer_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs[0], call.input(1), call.input(2)
    (epsilon,) = floats(call, epsilon=1e-5)
    axis = int(call.attribute("axis", -1)) % x.ndim
    axes = tuple(range(axis, x.ndim))
    mean = np.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    inverse = 1.0 / np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True) + epsilon)
    y = centred * inverse
    y = y if gamma is None else y * gamma
    y = y if beta is None else y + beta
    return [y, mean, inverse]


@implements("RMSNormalization", "SimplifiedLayerNormalization")
def _rms_norm(call: Call) -> list[Value]:
    x, gamma = call.inputs[0], call.input(1)
    (epsilon,) = floats(call, epsilon=1e-5)
    axis = int(call.attribute("axis", -1)) % x.ndim
    axes = tuple(range(axis, x.ndim))
    inverse = 1.0 / np.sqrt(np.mean(x * x, axis=axes, keepdims=True) + epsilon)
    y = x * inverse
    return [y if gamma is None else y * gamma, inverse]


OPERATORS[CONTRIB, "SimplifiedLayerNormalization"] = _rms_norm


@implements("GroupNormalization")
def _group_norm(call: Call) -> list[Value]:
    x, gamma, beta = call.inputs
    (epsilon,) = floats(call, epsilon=1e-5)
    groups = int(call.attribute("num_groups"))
    grouped = x.reshape(x.shape[0], groups, -1)
    y = standardize(grouped, (2,), epsilon)
    if call.version < 21:  # one factor per group until opset 20
        y = y * gamma.reshape(1, -1, 1) + beta.reshape(1, -1, 1)
        return [y.reshape(x.shape)]
    return [y.reshape(x.shape) * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim)]


@implements("LpNormalization")
def _lp_norm(call: Call) -> list[Value]:
    x, axis, p = call.inputs[0], int(call.attribute("axis", -1)), int(call.attribute("p", 2))
    size = np.abs(x) if p == 1 else x * x
    size = np.sum(size, axis=axis, keepdims=True)
    size = size if p == 1 else np.sqrt(size)
    return [np.where(size == 0, 0.0, x / np.where(size == 0, 1.0, size))]


@implements("MeanVarianceNormalization")
def _mean_variance_norm(call: Call) -> list[Value]:
    x = call.inputs[0]
    axes = tuple(int(a) for a in call.attribute("axes") or (0, 2, 3))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    spread = np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True))
    return [centred / (spread + 1e-9)]


@implements("LRN")
def _lrn(call: Call) -> list[Value]:
    x = call.inputs[0]
    alpha, beta, bias = floats(call, alpha=1e-4, beta=0.75, bias=1.0)
    size = int(call.attribute("size"))
    before, after = (size - 1) // 2, size // 2
    squares = np.pad(x * x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))
    total = np.zeros_like(x)
    for offset in range(size):
        total += squares[:, offset : offset + x.shape[1]]
    return [x / (bias + alpha / size * total) ** beta]
