"""Passes by name, imported when they are asked for.

fold-batchnorm                      the pass with its defaults
fold-batchnorm{max_copy_mb=64}      with an option
a,b{x=1,y=true}                     several, in this order
default, none                       the default list, the empty list
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields, replace
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Literal, TypeAlias, get_args

from onnxnorm.errors import UsageError
from onnxnorm.rewrite import Pass

Target: TypeAlias = Literal["onnx", "ort-cpu", "ort-cuda"]

_ITEM = re.compile(r"\s*([a-z0-9-]+)\s*(?:\{([^{}]*)\})?\s*(?:,|$)")


def catalogue() -> dict[str, type[Pass]]:
    """Every pass by name, in the order in which they run."""
    from onnxnorm.passes import PASSES

    return {name: _load(target) for name, target in PASSES.items()}


def default_passes() -> tuple[str, ...]:
    """Names of the passes that run unless others are asked for."""
    from onnxnorm.passes import DEFAULT

    return DEFAULT


def select(wanted: str | Iterable[str | Pass] | None) -> list[Pass]:
    """The passes that a specification names; None is the default list.

    >>> [p.name for p in select("fold-batchnorm{max_copy_mb=64}")]
    ['fold-batchnorm']

    Raises:
        UsageError: An unknown pass or option, or a value of the wrong type.
    """
    if wanted is None or wanted == "default":
        return [_make(name, "") for name in default_passes()]
    if isinstance(wanted, str):
        return _parse(wanted)
    chosen: list[Pass] = []
    for item in wanted:
        chosen += _parse(item) if isinstance(item, str) else [item]
    return chosen


def aimed(
    passes: list[Pass],
    target: Target,
    *,
    ops: bool,
    cuda_kernels: bool = False,
    runtime: str | None,
) -> list[Pass]:
    """Passes that depend on the target, told of it; what the user gave them stays.

    Raises:
        UsageError: There is no such target or version, or an option is not for this target.
    """
    if target not in get_args(Target):
        raise UsageError(
            f"there is no target '{target}'", f"Give one of: {', '.join(get_args(Target))}."
        )
    if runtime is not None and re.fullmatch(r"\d+\.\d+(\.\w+)*", runtime) is None:
        raise UsageError(
            f"'{runtime}' is not a version of onnxruntime", "Write it as --runtime-version 1.23."
        )
    if runtime is not None and target == "onnx":
        raise UsageError(
            f"--runtime-version {runtime} was given for the target onnx, which is any runtime",
            "Add --target ort-cpu or ort-cuda, or leave it out.",
        )
    if cuda_kernels and not (ops and target == "ort-cuda"):
        raise UsageError(
            "--cuda-kernels was given without --target ort-cuda --ops",
            "Give all three, or leave it out.",
        )
    if ops and target != "ort-cpu" and not cuda_kernels:
        also = "" if target == "onnx" else " Those for CUDA are behind --cuda-kernels."
        raise UsageError(
            f"--ops was given for the target {target}",
            "Add --target ort-cpu: the operators of onnxnorm have kernels for onnxruntime's CPU."
            + also,
        )
    found = []
    for each in passes:
        given: dict[str, Any] = {}
        if getattr(each, "target", None) == "onnx":
            given["target"] = target
        if ops and hasattr(each, "ops"):
            given["ops"] = True
        if cuda_kernels and hasattr(each, "cuda_kernels"):
            given["cuda_kernels"] = True
        if runtime is not None and hasattr(each, "runtime"):
            given["runtime"] = runtime
        found.append(replace(each, **given) if given else each)  # type: ignore[type-var]
    return found


def options(kind: type[Pass]) -> dict[str, tuple[str, Any]]:
    """A pass's options: name -> (type, default)."""
    return {f.name: (str(f.type), f.default) for f in fields(kind)}  # type: ignore[arg-type]


def _parse(text: str) -> list[Pass]:
    if text.strip() in ("none", ""):
        return []
    chosen: list[Pass] = []
    at = 0
    while at < len(text):
        item = _ITEM.match(text, at)
        if item is None:
            raise UsageError(
                f"'{text[at:]}' is not a list of passes",
                "Write names separated by commas, with options in braces:"
                " fold-batchnorm{max_copy_mb=64}.",
            )
        name, given = item[1], item[2] or ""
        if name == "default":
            chosen += select(None)
        elif name == "none":
            raise UsageError(
                f"'none' stands beside other passes in '{text}'", "Give it alone, or leave it out."
            )
        else:
            chosen.append(_make(name, given))
        at = item.end()
    return chosen


def _make(name: str, given: str) -> Pass:
    from onnxnorm.passes import PASSES

    if name not in PASSES:
        near = get_close_matches(name, PASSES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(
            f"there is no pass '{name}'",
            f"{hint}`onnxnorm passes` lists them: {', '.join(PASSES)}.",
        )
    kind = _load(PASSES[name])
    known = options(kind)
    values: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in given.split(","))):
        key, equals, value = (x.strip() for x in part.partition("="))
        if key not in known or not equals:
            choices = ", ".join(f"{k}={v[1]}" for k, v in known.items()) or "none"
            raise UsageError(f"{name} has no option '{part}'", f"Its options are: {choices}.")
        values[key] = _convert(name, key, value, known[key][0])
    return kind(**values)


def _convert(name: str, key: str, value: str, kind: str) -> Any:
    try:
        if kind == "bool":
            return {"true": True, "1": True, "false": False, "0": False}[value.lower()]
        return {"int": int, "float": float, "str": str}[kind.removesuffix(" | None")](value)
    except (ValueError, KeyError):
        raise UsageError(
            f"'{value}' is not a value for {name}'s option {key}",
            f"It takes a value of type {kind.removesuffix(' | None')}.",
        ) from None


def _load(target: str) -> type[Pass]:
    module, _, attribute = target.partition(":")
    kind: type[Pass] = getattr(import_module(module), attribute)
    return kind
