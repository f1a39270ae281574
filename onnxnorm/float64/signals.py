"""Windows and Fourier transforms in float64."""

from __future__ import annotations

import math
from typing import Final

import numpy as np

from onnxnorm.float64.call import (
    Call,
    Value,
    implements,
)
from onnxnorm.float64.movement import cast

# a0 - a1 cos(t) + a2 cos(2 t); Hamming's are the standard's 25/46 and 21/46
_WINDOWS: Final = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25.0 / 46.0, 21.0 / 46.0, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@implements("HannWindow", "HammingWindow", "BlackmanWindow")
def _cosine_window(call: Call) -> list[Value]:
    size = int(call.inputs[0])
    a0, a1, a2 = _WINDOWS[call.op_type]
    period = size if call.attribute("periodic", 1) else size - 1
    t = 2.0 * math.pi * np.arange(size) / period
    window = a0 - a1 * np.cos(t) + a2 * np.cos(2.0 * t)
    return [cast(window, int(call.attribute("output_datatype", 1)))]


@implements("STFT")
def _stft(call: Call) -> list[Value]:
    """Fourier transform of windowed frames; (batch, length, 1 or 2) to (batch, frames, bins, 2)."""
    signal, step, window, length = (call.input(i) for i in range(4))
    size = int(np.size(window)) if length is None else int(length)
    hop = int(step)
    x = signal[..., 0] + 1j * signal[..., 1] if signal.shape[-1] == 2 else signal.reshape(
        signal.shape[:2])  # fmt: skip
    frames = np.lib.stride_tricks.sliding_window_view(x, size, axis=-1)[:, ::hop]
    frames = frames if window is None else frames * window
    bins = np.fft.fft(frames, axis=-1)
    if call.attribute("onesided", 1):
        bins = bins[..., : size // 2 + 1]
    return [np.stack([bins.real, bins.imag], axis=-1)]
