"""The operator library: kernels where no standard operator is fast, and bodies for everywhere else.

`bodies` has the operators as functions of the model, `library` the shared library with the kernels,
`build` compiles it, and csrc/ is its source.
"""

from __future__ import annotations
