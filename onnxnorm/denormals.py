"""Weights that are closer to 0 than the normal numbers of their type, which slow processors down.

    0 < |w| < 2^-126        for float32

A processor takes such a number in microcode, some hundred cycles for each product. Training drives
weights there where it takes a share off in each step. onnxruntime can take them for 0: a model of
PyPI, a fifth of whose weights are denormal, ran in 24 ms instead of 1,020 with its option
session.set_denormal_as_zero, PP-OCRv6_det_small in 61 instead of 214, with the same outputs. The
first session of a process decides for all (onnxruntime_session_options_config_keys.h).
"""

from __future__ import annotations

from typing import Final

import numpy as np
import onnx

from onnxnorm.storage import Stored, tensors

# Below that little is felt: 6,684 of 1.9 million weights cost a tenth of the time.
_SHARE: Final = 1e-3
_BLOCK: Final = 1 << 20  # elements looked at together
_EXPONENT: Final = np.uint32(0x7F800000)
_FRACTION: Final = np.uint32(0x007FFFFF)


def count_denormals(stored: Stored) -> tuple[int, int]:
    """How many float32 weights of a model are denormal, and how many there are."""
    found = total = 0
    for tensor in tensors(stored.proto):
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        bits = stored.array(tensor).reshape(-1).view(np.uint32)
        total += bits.size
        for at in range(0, bits.size, _BLOCK):
            block = bits[at : at + _BLOCK]
            found += int(np.count_nonzero((block & _EXPONENT == 0) & (block & _FRACTION != 0)))
    return found, total


def told_of_denormals(stored: Stored) -> list[str]:
    """What a report on a model that runs on a processor has to say of them, if anything."""
    found, total = count_denormals(stored)
    if found < _SHARE * total or not found:
        return []
    told = (
        f"{found:,} of {total:,} weights are denormal, closer to 0 than 1.2e-38, and a processor"
        " takes many times as long with those. onnxruntime takes them for 0 with the session option"
        " session.set_denormal_as_zero = 1, given to the first session of a process."
    )
    return [told]
