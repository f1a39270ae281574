"""The networks whose norms have fixed statistics: what they are, where from, and what remains.

Nothing here imports torch: `models.fixed_statistics` builds them, `models.skeletons` loads what the
exporters wrote of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from models.architectures import Exporter


@dataclass(frozen=True)
class System:
    """One network, as its authors train it.

    Attributes:
        name: What `models.fixed_statistics.build` and `models/exports/` call it.
        title: What it is, in a line.
        source: The paper.
        remains: Kinds of norms that no folding can remove, beside softmax.
    """

    name: str
    title: str
    source: str
    remains: tuple[str, ...] = ()


SYSTEMS: Final[tuple[System, ...]] = (
    System("un_vit", "ViT with Unified Normalization, pre-norm, on raw pixels", "arXiv:2208.01313"),
    System("un_vit_post", "ViT with Unified Normalization, post-norm", "arXiv:2208.01313"),
    System("repbn_swin", "Swin with PRepBN", "arXiv:2405.11582"),
    System("powernorm", "text encoder with PowerNorm", "arXiv:2003.07845", ("rms_norm",)),
    System(
        "lns_gpt", "decoder with LayerNorm Scaling", "arXiv:2502.05795", ("layer_norm", "rms_norm")
    ),
    System("ibn_resnet", "IBN-ResNet", "arXiv:1807.09441", ("instance_norm",)),
    System("graph_transformer", "graph transformer with batch norms", "arXiv:2012.09699"),
    System(
        "ws_bcn_resnet",
        "ResNet with weight standardization and batch-channel normalization",
        "arXiv:1903.10520",
        ("group_norm", "instance_norm"),
    ),
    System("sigma_vit", "ViT with sigma-Reparam", "arXiv:2303.06296"),
    System("spade", "generator of SPADE layers on batch norms", "arXiv:1903.07291"),
    System(
        "noiser", "convolutions whose biases instance norms ignore", "NoiSER", ("instance_norm",)
    ),
    System(
        "nonscaling_vit",
        "ViT with layer norms that only shift",
        "arXiv:2502.01441",
        ("layer_norm", "rms_norm"),
    ),
)

EXPORTERS: Final[tuple[Exporter, ...]] = ("torchscript", "dynamo")
OPSET: Final[dict[Exporter, int]] = {"torchscript": 17, "dynamo": 18}


def file_name(system: str, exporter: Exporter, *, plain: bool = False) -> str:
    """What `models.skeletons.load` calls the export of a network."""
    return f"{system}-{exporter}{'-plain' if plain else ''}"
