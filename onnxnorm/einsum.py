"""The equation of an Einsum: which label an axis of an operand or of the result has.

    bsd,dhe->bshe          every term is a string of labels, one for each axis

Axes count from the right, -1 being the last. Source: the Einsum operator of the ONNX specification.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from onnxnorm.module import Node


@dataclass(frozen=True)
class Equation:
    """An equation in which every label occurs once at most in each term.

    Attributes:
        terms: The labels of each operand, with "." for an ellipsis.
        output: Those of the result.
    """

    terms: tuple[str, ...]
    output: str

    @classmethod
    def of(cls, node: Node) -> Equation | None:
        """The equation of a node; None where it is a parameter, or takes a diagonal."""
        text = node.text("equation")
        if not text or node.parameter("equation") is not None:
            return None
        given, arrow, stated = text.replace(" ", "").replace("...", ".").partition("->")
        terms = tuple(given.split(","))
        if arrow:
            output = stated
        else:
            counted = Counter(given.replace(",", "").replace(".", ""))
            once = "".join(sorted(c for c, n in counted.items() if n == 1))
            output = "." + once if "." in given else once
        if len(terms) != len(node.inputs) or any(len(set(t)) != len(t) for t in (*terms, output)):
            return None
        return cls(terms, output)

    def carried(self, axes: Sequence[int], term: int | None = None) -> tuple[int, list[int]] | None:
        """Where the labels of some axes are in the only operand that has any of them.

        >>> Equation(("bsd", "dhe"), "bshe").carried([-2, -1])
        (1, [-2, -1])
        >>> Equation(("bsd", "dhe"), "bshe").carried([-3, -1]) is None
        True

        Args:
            axes: Axes of the result; or of an operand, whose labels are then looked for in the
                result.
            term: The operand.

        Returns:
            The operand, and the axes there or in the result; None where there is no such operand,
            or an axis lies before or in an ellipsis.
        """
        labels = _after(self.output if term is None else self.terms[term])
        if any(-axis > len(labels) for axis in axes):
            return None
        wanted = [labels[axis] for axis in axes]
        holders = [at for at, each in enumerate(self.terms) if set(each) & set(wanted)]
        if len(holders) != 1 or (term is not None and holders != [term]):
            return None
        found = _after(self.terms[holders[0]] if term is None else self.output)
        if not set(wanted) <= set(found):
            return None
        return holders[0], [found.index(label) - len(found) for label in wanted]

    def contracted(
        self, term: int
    ) -> tuple[dict[int, int], dict[int, int], tuple[int, ...]] | None:
        """One of two operands seen from the other, its weight: x W, summed over their common axes.

        >>> Equation(("bsd", "dhe"), "bshe").contracted(0)
        ({-1: 0}, {1: -2, 2: -1}, (-4, -3))
        >>> Equation(("bsd", "de"), "be").contracted(0) is None  # s is summed too
        True

        Returns:
            The axes of the operand that are summed over, from the right, each with that of the
            weight, from the left; the axes of the weight that the result has, each with that of the
            result, from the right; the axes of the result that the operand alone has. None where it
            is no such product, or axes that matter lie before or in an ellipsis.
        """
        if len(self.terms) != 2 or "." in self.terms[1 - term]:
            return None
        own, weight, output = self.terms[term], self.terms[1 - term], self.output
        if any(c not in output and c not in weight for c in own):
            return None
        near, found = _after(own), _after(output)
        pairs: dict[int, int] = {}
        outlets: dict[int, int] = {}
        for at, label in enumerate(weight):
            if label in output:
                if label not in found:
                    return None
                outlets[at] = found.index(label) - len(found)
            elif label in own:
                if label not in near:
                    return None
                pairs[near.index(label) - len(near)] = at
        rows = [at - len(found) for at, c in enumerate(found) if c in own and c not in weight]
        if output.startswith("."):
            rows.append(-len(found) - 1)  # the last one of the ellipsis, where there is one
        return (pairs, outlets, tuple(rows)) if pairs else None


def _after(labels: str) -> str:
    return labels.rpartition(".")[2]
