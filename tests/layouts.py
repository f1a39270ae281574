"""Models whose weights lie in every way that ONNX knows, for the tests of reading and writing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxnorm.session import open_session
from onnxnorm.storage import Stored

RNG: Final = np.random.default_rng(0)
LARGE: Final = RNG.standard_normal((40, 50)).astype(np.float32)
OTHER: Final = RNG.standard_normal((40, 31)).astype(np.float32)
SMALL: Final = np.array([1, 2, 3], np.float32)
EMPTY: Final = np.zeros((0, 4), np.float32)
WEIGHTS: Final = {"large": LARGE, "other": OTHER, "small": SMALL, "empty": EMPTY}


def copies(arrays: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    """A model that returns its weights: `y_w = Identity(w)`."""
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    outputs = [
        helper.make_tensor_value_info(f"y_{t.name}", t.data_type, list(t.dims)) for t in tensors
    ]
    nodes = [helper.make_node("Identity", [t.name], [f"y_{t.name}"]) for t in tensors]
    graph = helper.make_graph(nodes, "copies", [], outputs, tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


@dataclass(frozen=True)
class Place:
    """Where one tensor's data go."""

    location: str
    gap: int = 0
    length: bool = True
    offset: bool = True


def externalize(model: onnx.ModelProto, folder: Path, places: dict[str, Place]) -> onnx.ModelProto:
    """Move the data of some initializers into files under `folder`."""
    for tensor in model.graph.initializer:
        place = places.get(tensor.name)
        if place is None:
            continue
        file = folder / place.location
        file.parent.mkdir(parents=True, exist_ok=True)
        before = file.read_bytes() if file.exists() else b""
        file.write_bytes(before + b"\xee" * place.gap + tensor.raw_data)
        entries = {"location": place.location}
        if place.offset:
            entries["offset"] = str(len(before) + place.gap)
        if place.length:
            entries["length"] = str(len(tensor.raw_data))
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
    return model


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


def changed(stored: Stored) -> Stored:
    """The same model with a doc string more."""
    proto = onnx.ModelProto()
    proto.CopyFrom(stored.proto)
    proto.graph.doc_string = "changed"
    return stored.with_proto(proto)


def arrays_of(stored: Stored) -> dict[str, NDArray[Any]]:
    return {t.name: stored.array(t) for t in stored.proto.graph.initializer}


def assert_arrays(stored: Stored, wanted: dict[str, NDArray[Any]]) -> None:
    found = arrays_of(stored)
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def assert_runs(path: Path, wanted: dict[str, NDArray[Any]]) -> None:
    with open_session(path) as session:
        outputs = session.run({})
    for name, array in wanted.items():
        np.testing.assert_array_equal(outputs[f"y_{name}"], array, strict=True)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under `folder`, hidden ones too."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def refusal(attempt: Callable[[], object], kind: type[BaseException]) -> BaseException | None:
    """What a call raised; None where it went well."""
    try:
        attempt()
    except kind as error:
        return error
    return None
