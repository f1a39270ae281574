"""Recurrent layers in float64, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from onnxnorm.float64.call import (
    Array,
    Call,
    NotImplementedHere,
    Value,
    implements,
)
from onnxnorm.float64.elementwise import sigmoid, softplus


def activation(name: str, alpha: float | None, beta: float | None) -> Callable[[Array], Array]:
    """Return an activation function by its name; None is its default."""
    table: dict[str, Callable[[Array], Array]] = {
        "sigmoid": sigmoid,
        "tanh": np.tanh,
        "relu": lambda x: np.maximum(x, 0.0),
        "softsign": lambda x: x / (1.0 + np.abs(x)),
        "softplus": softplus,
        "affine": lambda x: (1.0 if alpha is None else alpha) * x + (beta or 0.0),
        "leakyrelu": lambda x: np.where(x < 0, (0.01 if alpha is None else alpha) * x, x),
        "hardsigmoid": lambda x: np.clip(
            (0.2 if alpha is None else alpha) * x + (0.5 if beta is None else beta), 0.0, 1.0
        ),
        "elu": lambda x: np.where(
            x < 0, (1.0 if alpha is None else alpha) * np.expm1(np.minimum(x, 0.0)), x
        ),
        "scaledtanh": lambda x: (
            (1.0 if alpha is None else alpha) * np.tanh((1.0 if beta is None else beta) * x)
        ),
        "thresholdedrelu": lambda x: np.where(x > (1.0 if alpha is None else alpha), x, 0.0),
    }
    if name.lower() not in table:
        raise NotImplementedHere(f"activation {name}")
    return table[name.lower()]


_GATES: Final = {"LSTM": 4, "GRU": 3, "RNN": 1}
_ACTIVATIONS: Final = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "RNN": ["Tanh"],
}
# activations that take an alpha, and those that take a beta, in the order the lists are read
_WITH_ALPHA: Final = {"affine", "leakyrelu", "hardsigmoid", "elu", "scaledtanh", "thresholdedrelu"}
_WITH_BETA: Final = {"affine", "hardsigmoid", "scaledtanh"}


@implements("LSTM", "GRU", "RNN")
def _recurrent(call: Call) -> list[Value]:
    """Run a recurrent layer; X is (seq, batch, in), Y is (seq, directions, batch, hidden)."""
    kind = call.op_type
    x, w, r = call.inputs[:3]
    batch_first = int(call.attribute("layout", 0)) == 1
    x = np.swapaxes(x, 0, 1) if batch_first else x
    steps, batch, _ = x.shape
    hidden = int(call.attribute("hidden_size", r.shape[-1]))
    direction = call.attribute("direction", "forward")
    directions = w.shape[0]
    gates = _GATES[kind]
    bias = call.input(3)
    bias = np.zeros((directions, 2 * gates * hidden)) if bias is None else bias
    lengths = call.input(4)
    lengths = np.full(batch, steps) if lengths is None else lengths
    states = []
    for index in (5, 6):
        state = call.input(index)
        if state is None:
            state = np.zeros((directions, batch, hidden))
        elif batch_first:
            state = np.swapaxes(state, 0, 1)
        states.append(state)
    peephole = call.input(7)
    peephole = np.zeros((directions, 3 * hidden)) if peephole is None else peephole
    names = [str(a) for a in call.attribute("activations") or _ACTIVATIONS[kind] * directions]
    alphas = iter(call.attribute("activation_alpha") or ())
    betas = iter(call.attribute("activation_beta") or ())
    functions = [
        activation(
            name,
            float(v) if name.lower() in _WITH_ALPHA and (v := next(alphas, None)) is not None
            else None,
            float(v) if name.lower() in _WITH_BETA and (v := next(betas, None)) is not None
            else None,
        )
        for name in names
    ]  # fmt: skip
    per = len(functions) // directions
    clip = call.attribute("clip")
    limit = math.inf if clip is None else float(clip)
    y = np.zeros((steps, directions, batch, hidden))
    last_h, last_c = np.empty((directions, batch, hidden)), np.empty((directions, batch, hidden))
    for d in range(directions):
        backward = direction == "reverse" or d == 1
        h, c = states[0][d].copy(), states[1][d].copy()
        act = functions[d * per : (d + 1) * per]
        wb, rb = np.split(bias[d], 2)
        for step in range(steps):
            # each sequence runs over its own length, so a reversed one starts at its own end
            active = step < lengths
            time = np.where(active, lengths - 1 - step if backward else step, 0).astype(np.int64)
            entry = x[time, np.arange(batch)]
            if kind == "LSTM":
                new_h, new_c = _lstm_step(call, entry, h, c, w[d], r[d], wb + rb, peephole[d], act,
                                          limit)  # fmt: skip
                c = np.where(active[:, None], new_c, c)
            elif kind == "GRU":
                new_h = _gru_step(call, entry, h, w[d], r[d], wb, rb, act, limit)
            else:
                z = entry @ w[d].T + h @ r[d].T + wb + rb
                new_h = act[0](np.clip(z, -limit, limit))
            h = np.where(active[:, None], new_h, h)
            rows = np.nonzero(active)[0]
            y[time[rows], d, rows] = h[rows]
        last_h[d], last_c[d] = h, c
    if batch_first:
        y = np.transpose(y, (2, 0, 1, 3))
        last_h, last_c = np.swapaxes(last_h, 0, 1), np.swapaxes(last_c, 0, 1)
    return [y, last_h, last_c] if kind == "LSTM" else [y, last_h]


def _lstm_step(
    call: Call,
    entry: Array,
    h: Array,
    c: Array,
    w: Array,
    r: Array,
    bias: Array,
    peephole: Array,
    act: list[Callable[[Array], Array]],
    limit: float,
) -> tuple[Array, Array]:
    z = entry @ w.T + h @ r.T + bias
    zi, zo, zf, zc = np.split(z, 4, axis=-1)
    pi, po, pf = np.split(peephole, 3)
    i = act[0](np.clip(zi + pi * c, -limit, limit))
    f = 1.0 - i if call.attribute("input_forget", 0) else act[0](
        np.clip(zf + pf * c, -limit, limit))  # fmt: skip
    new_c = f * c + i * act[1](np.clip(zc, -limit, limit))
    o = act[0](np.clip(zo + po * new_c, -limit, limit))
    return o * act[2](np.clip(new_c, -limit, limit)), new_c


def _gru_step(
    call: Call,
    entry: Array,
    h: Array,
    w: Array,
    r: Array,
    wb: Array,
    rb: Array,
    act: list[Callable[[Array], Array]],
    limit: float,
) -> Array:
    wz, wr, wh = np.split(entry @ w.T + wb, 3, axis=-1)
    rz, rr, rh = np.split(r, 3, axis=0)
    bz, br, bh = np.split(rb, 3)
    z = act[0](np.clip(wz + h @ rz.T + bz, -limit, limit))
    reset = act[0](np.clip(wr + h @ rr.T + br, -limit, limit))
    if call.attribute("linear_before_reset", 0):
        candidate = wh + reset * (h @ rh.T + bh)
    else:
        candidate = wh + (reset * h) @ rh.T + bh
    return np.asarray((1.0 - z) * act[1](np.clip(candidate, -limit, limit)) + z * h)
