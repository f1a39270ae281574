"""`python -m onnxnorm` is the command `onnxnorm`."""

from __future__ import annotations

from onnxnorm.cli import main

if __name__ == "__main__":
    main()
