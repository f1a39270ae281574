"""Passes by name, imported when they are asked for.

fold-batchnorm                      the pass with its defaults
fold-batchnorm{max_copy_mb=64}      with an option
a,b{x=1,y=true}                     several, in this order
default, none                       the default list, the empty list
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from onnxnorm.errors import UsageError
from onnxnorm.rewrite import Pass

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
        elif name != "none":
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
