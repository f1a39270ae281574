"""A model of any size, streamed to disk: the weights never exist in memory together.

    x [batch, 64, 16, 16] -> 3 (Conv 3x3 -> BN -> Relu) -> MaxPool -> Conv -> BN -> Flatten
      -> depth times (x + Relu(MatMul(x, W)))        W [width, width], float16

Every weight lies in one file beside the model, each tensor at a multiple of 4096 bytes as ONNX
recommends for mapping it. Only the convolutions in front are there to be folded, so a tool that
keeps its promise reads the rest of the file through the kernel alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto

from models.network import Network, uniform

_PAGE = 4096
_CHANNELS = 64


class _Streamed(Network):
    """A network whose initializers go straight to an open file."""

    def __init__(self, name: str, location: str, file: BinaryIO) -> None:
        super().__init__(name, opset=17, dtype=TensorProto.FLOAT16)
        self._location, self._file = location, file

    def tensor(self, name: str, values: object, dtype: int | None = None) -> onnx.TensorProto:
        """Write the values and return a tensor that points to them."""
        array = np.asarray(values).astype(np.float16)
        self._file.write(b"\0" * (-self._file.tell() % _PAGE))
        tensor = onnx.TensorProto(
            name=name,
            data_type=TensorProto.FLOAT16,
            dims=array.shape,
            data_location=TensorProto.EXTERNAL,
        )
        place = {
            "location": self._location,
            "offset": str(self._file.tell()),
            "length": str(array.nbytes),
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=value)
        self._file.write(array.tobytes())
        return tensor


def depth_for(size: int, width: int) -> int:
    """Return how many layers of [width, width] float16 make up about `size` bytes; at least 1."""
    return max(1, round(size / (2 * width * width)))


def write_large(path: Path, size: int = 3_000_000_000, width: int = 4096) -> Path:
    """Write the model to `path` and its weights beside it; return the weights' path.

    Peak memory is a few layers, whatever the size.

    Args:
        path: The .onnx file to write; its folder must exist.
        size: About how many bytes the MatMul weights take together.
        width: Of each layer; one layer is 2 * width^2 bytes.
    """
    weights = path.with_name(path.name + ".data")
    with weights.open("wb") as file:
        net = _Streamed(path.stem, weights.name, file)
        x = net.input("x", ["batch", _CHANNELS, 16, 16])
        for index in range(3):
            x = net.conv(x, f"stem.{index}", (_CHANNELS, _CHANNELS), bias=True)
            x = net.batch_norm(x, f"stem.{index}.bn", _CHANNELS)
            x = net.op("Relu", x, out=f"stem.{index}.relu")
        edge = math.sqrt(3.0 / (_CHANNELS * 4))
        patch = net.parameter("patch.weight", (width, _CHANNELS, 2, 2), -edge, edge)
        x = net.op("MaxPool", x, out="pooled", kernel_shape=[8, 8], strides=[8, 8])
        x = net.op("Conv", x, patch, out="patch", kernel_shape=[2, 2])
        x = net.op("Flatten", net.batch_norm(x, "patch.bn", width), out="flat", axis=1)
        depth = depth_for(size, width)
        # a branch adds 1 / depth of the stream's variance, so float16 never overflows
        edge = math.sqrt(3.0 / (width * depth))
        layer = uniform(f"{path.stem}/layers", (width, width), -edge, edge).astype(np.float16)
        for index in range(depth):
            weight = net.constant(f"layers.{index}.weight", np.roll(layer, index, axis=1))
            y = net.op("MatMul", x, weight, out=f"layers.{index}.product")
            y = net.op("Relu", y, out=f"layers.{index}.relu")
            x = net.op("Add", x, y, out=f"layers.{index}.sum")
        net.output(x, ["batch", width])
        model = net.model()
    path.write_bytes(model.SerializeToString(deterministic=True))
    return weights
