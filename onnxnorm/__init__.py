"""Find every normalization in an ONNX graph, rewrite it to the cheapest equal one, and prove it.

>>> import onnxnorm
>>> result = onnxnorm.optimize("model.onnx", "optimized.onnx")      # doctest: +SKIP
>>> result.report.to_json()["parity"]["passed"]                     # doctest: +SKIP
True
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxnorm.api import Result as Result
    from onnxnorm.api import compare as compare
    from onnxnorm.api import optimize as optimize
    from onnxnorm.errors import OnnxNormError as OnnxNormError
    from onnxnorm.inspection import inspect as inspect
    from onnxnorm.ops.library import register_ops as register_ops
    from onnxnorm.report import Report as Report

    __version__: str

__all__ = ["OnnxNormError", "Report", "Result", "compare", "inspect", "optimize", "register_ops"]


logging.getLogger(__name__).addHandler(logging.NullHandler())  # silent unless it is asked for


def __getattr__(name: str) -> Any:
    """Import what is asked for: a process that only measures need not import the compiler."""
    if name == "__version__":
        return import_module("importlib.metadata").version("onnxnorm")
    homes = {
        "OnnxNormError": "errors",
        "Report": "report",
        "inspect": "inspection",
        "register_ops": "ops.library",
    }
    if name not in __all__:
        raise AttributeError(f"module 'onnxnorm' has no attribute '{name}'")
    return getattr(import_module(f"onnxnorm.{homes.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
