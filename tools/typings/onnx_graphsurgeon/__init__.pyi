"""Types of the part of onnx-graphsurgeon that is used here, which ships none.

The links (`inputs`, `outputs`, `nodes`) are lists of Any: subclasses annotate them with their own
classes, and a list of the base class would forbid that.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from onnx_graphsurgeon.ir.tensor import Constant as Constant
from onnx_graphsurgeon.ir.tensor import Tensor as Tensor
from onnx_graphsurgeon.ir.tensor import Variable as Variable

class Node:
    class AttributeRef(NamedTuple):
        name: str
        type: Any

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: list[Any]
    outputs: list[Any]
    def __init__(
        self,
        op: str,
        name: str | None = None,
        attrs: dict[str, Any] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        domain: str | None = None,
    ) -> None: ...

class Graph:
    name: str
    nodes: list[Any]
    inputs: list[Any]
    outputs: list[Any]
    def __init__(
        self,
        nodes: Sequence[Node] | None = None,
        inputs: Sequence[Tensor] | None = None,
        outputs: Sequence[Tensor] | None = None,
        name: str | None = None,
    ) -> None: ...
