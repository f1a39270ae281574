"""Tests see onnxnorm as it is installed, and models/ and tools/ of the checkout."""

from __future__ import annotations

import sys
from pathlib import Path

# First, while the checkout is not on the path: its onnxnorm/ has no passes beside its modules, and
# would hide an installed wheel. An editable install is the checkout either way.
import onnxnorm.passes  # noqa: F401

sys.path.insert(0, str(Path(__file__).parents[1]))
