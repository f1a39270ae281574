"""Find every normalization in an ONNX graph, rewrite it to the cheapest equal one, and prove it.

    >>> import onnxnorm
    >>> result = onnxnorm.optimize("model.onnx", "optimized.onnx")      # doctest: +SKIP
    >>> result.report.to_json()["parity"]["passed"]                     # doctest: +SKIP
    True
"""

from __future__ import annotations

from importlib.metadata import version

from onnxnorm.api import Result, compare, inspect, optimize
from onnxnorm.errors import OnnxNormError
from onnxnorm.report import Report

__version__ = version("onnxnorm")
__all__ = ["OnnxNormError", "Report", "Result", "compare", "inspect", "optimize"]
