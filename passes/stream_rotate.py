"""Rotate residual streams by an orthogonal matrix; the outputs stay what they are.

    x -> x P,   P P^T = I:       W -> W P for writers,   W -> P^T W for readers
    RMS(x P) = RMS(x) P          for an RMS norm with one scale for all features

Exact over the reals, since |x P| = |x|. In floating point every weight is formed in float64 and
rounded once. It saves nothing by itself: quantization profits from streams whose outliers are
spread over all features. Layer norms have to be RMS norms (stream-fold-mean), and gammas have to be
in the weights (fold-norm-affine) before. Sources: S. Ashkboos et al., "QuaRot" (2024), section 4,
and "SliceGPT" (2024), section 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from onnxnorm.basis_change import BasisChange, basis_changes
from onnxnorm.errors import UsageError
from onnxnorm.facts import Facts
from onnxnorm.rewrite import Pass, Plan, Refusal, Rewriter
from onnxnorm.transfer import Stop


@dataclass(frozen=True)
class StreamRotate(Pass):
    """Change the basis of every RMS stream.

    Attributes:
        matrix: "hadamard" for a random one, "identity", or the path of an .npy file.
        seed: Of the random one.
    """

    matrix: str = "hadamard"
    seed: int = 0

    name: ClassVar = "stream-rotate"
    summary: ClassVar = "RMS streams in another orthonormal basis, as quantization wants them"
    equation: ClassVar = "RMS(h W) V -> RMS(h (W P)) (P^T V),   P P^T = I"

    def plan(self, facts: Facts) -> Iterator[Plan | Refusal]:
        """Every stream that an RMS norm reads."""
        for stream, change in basis_changes(facts):
            root = stream.norms[0].node
            if isinstance(change, Stop):
                yield change.refusal(root)
            elif any(n.site.startswith(_SITE) for n in change.edited):
                continue  # a moment ago, by this run
            elif _is_rotated(change):
                yield Refusal("it is rotated already", root.label, node=root)
            else:
                orthogonal(self.matrix, change.features, self.seed)  # an unfit one is told now
                yield Plan(
                    root,
                    (root, *change.edited),
                    change,
                    inside=change.inside,
                    outputs=change.outputs,
                    local=False,
                )

    def apply(self, plan: Plan, rw: Rewriter) -> None:
        """Multiply writers by P, readers by its transpose."""
        change: BasisChange = plan.detail
        p = orthogonal(self.matrix, change.features, self.seed)
        for (node, index), value in change.stage(rw, p, "rotated").items():
            rw.rewire(node, index, value)


_SITE: Final = "stream-rotate:"


def _is_rotated(change: BasisChange) -> bool:
    """Whether an earlier run did it: the nodes carry the site that changed them."""
    return any(n.made_by.startswith(_SITE) for n in change.edited)


def orthogonal(matrix: str, size: int, seed: int) -> NDArray[np.float64]:
    """An orthogonal matrix: D (H x Q) with random signs D, a Hadamard H and a random rotation Q.

    >>> p = orthogonal("hadamard", 12, 0)
    >>> bool(np.allclose(p @ p.T, np.eye(12)))
    True

    Raises:
        UsageError: The user's matrix cannot be read, or is not orthogonal of this size.
    """
    if matrix == "identity":
        return np.eye(size)
    if matrix == "hadamard":
        random = np.random.default_rng(seed)
        odd = size
        h = np.ones((1, 1))
        while odd % 2 == 0:
            h = np.block([[h, h], [h, -h]])
            odd //= 2
        q, r = np.linalg.qr(random.normal(size=(odd, odd)))
        q = q * np.sign(np.diag(r))
        signs = random.choice([-1.0, 1.0], size=(size, 1))
        return np.asarray(signs * np.kron(h / np.sqrt(len(h)), q))
    try:
        given = np.asarray(np.load(matrix), dtype=np.float64)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the matrix '{matrix}' of stream-rotate cannot be read: {error}",
            "Give hadamard, identity, or the path of an .npy file.",
        ) from error
    if given.shape != (size, size) or not np.allclose(given @ given.T, np.eye(size), atol=1e-6):
        raise UsageError(
            f"the matrix '{matrix}' of stream-rotate is not orthogonal with {size} rows",
            "Give one whose rows are orthonormal, as wide as the stream.",
        )
    return given
