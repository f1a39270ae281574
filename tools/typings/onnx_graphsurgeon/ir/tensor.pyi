"""Types of onnx_graphsurgeon.ir.tensor, as far as they are used here."""

from typing import Any

from numpy.typing import NDArray

class Tensor:
    name: str
    inputs: list[Any]
    outputs: list[Any]

class Variable(Tensor):
    dtype: Any
    shape: Any
    def __init__(
        self, name: str, dtype: Any = None, shape: Any = None, type: str = "tensor_type"
    ) -> None: ...

class LazyValues:
    tensor: Any
    shape: tuple[int, ...]
    dtype: Any
    nbytes: int
    def __init__(self, tensor: Any) -> None: ...
    def load(self) -> NDArray[Any]: ...

class Constant(Tensor):
    values: NDArray[Any]
    data_location: int | None
    def __init__(
        self, name: str, values: NDArray[Any] | LazyValues, data_location: int | None = None
    ) -> None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
