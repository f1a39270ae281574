"""What was done, and what was not and why: as values, the same for machines and for people."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Outcome: TypeAlias = Literal["applied", "refused", "missed", "kept", "skipped", "rolled_back"]


@dataclass(frozen=True)
class Region:
    """The part of the main graph that one site changed.

    A site in the body of a control-flow node changes the whole node.

    Attributes:
        site: The site's id.
        inputs: Names of the run-time values it reads; they exist before and after.
        outputs: Names of the values it computes; they exist before and after.
        inside: Names of the values in between, which go or hold something else then.
    """

    site: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    inside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Remark:
    """One decision of one pass about one place.

    Attributes:
        outcome: `applied`; `refused`, when a side condition failed; `missed`, when the place only
            resembles what the pass is for; `kept`, when it is in its best form already, or was
            measured slower in the other; `skipped`, on the user's wish; `rolled_back`, when the
            outputs no longer agreed.
        rule: The pass.
        site: The stable name of the place: pass and anchor value.
        at: The node that decided it, by its name in the model.
        reason: Why it was not applied; "" for an applied one.
        advice: What the user could change; "" where there is nothing.
        removed: Labels of the nodes that went.
        added: Labels of the nodes that came.
        region: Where, for an applied one; None in a function, which may be called anywhere, and for
            a change that goes through the whole model.
        anchor: The output value of the place's root node.
        error: The measured error that rolled it back, over its budget.
        ratio: The latency with it over that without it, for which it was left out.
        anchors: Further values that the site stands for, with the way to their scope.
        edited: Labels of the nodes that stayed and read something else now.
        action: What an applied one did to a norm: "folded", "converted", "lowered".
        into: What the place became, for an applied one.
        note: What an applied one cost and gained, as a clause.
    """

    outcome: Outcome
    rule: str
    site: str
    at: str = ""
    reason: str = ""
    advice: str = ""
    removed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    region: Region | None = None
    anchor: str = ""
    error: float | None = None
    ratio: float | None = None
    anchors: tuple[str, ...] = ()
    edited: tuple[str, ...] = ()
    action: str = "folded"
    into: str = ""
    note: str = ""
