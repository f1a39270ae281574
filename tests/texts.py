"""Models in ONNX's text form, from what differs between them."""

from __future__ import annotations


def graph(body: str, constants: str = "", x: str = "N,2", y: str = "N,2", opset: int = 17) -> str:
    """One input x and one output y, both float, of these dims."""
    initializers = f"<{constants}>" if constants else ""
    return f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    main (float[{x}] x) => (float[{y}] y)
    {initializers}
    {{
       {body}
    }}
    """
