"""What the user sees: one file for each family of nodes, a schema and a short `execute` each."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .compare import EVDiTCompareVideos
from .loaders import EVDiTModelLoader, EVDiTTextEncoderLoader, EVDiTVAELoader
from .plan_files import EVDiTLoadTilePlan, EVDiTSaveTilePlan
from .report import EVDiTReport
from .sampling import EVDiTConsistencySampler, EVDiTConsistencySigmas
from .search import EVDiTSearchTilePlan
from .sequence_parallel import EVDiTSequenceParallel
from .sparse_attention import EVDiTSparseAttention
from .tile_map import EVDiTAttentionTileMap
from .tile_plan import EVDiTTilePlan

NODES: list[type[io.ComfyNode]] = [
    EVDiTModelLoader,
    EVDiTTextEncoderLoader,
    EVDiTVAELoader,
    EVDiTTilePlan,
    EVDiTSparseAttention,
    EVDiTConsistencySigmas,
    EVDiTConsistencySampler,
    EVDiTCompareVideos,
    EVDiTSearchTilePlan,
    EVDiTSaveTilePlan,
    EVDiTLoadTilePlan,
    EVDiTAttentionTileMap,
    EVDiTReport,
    EVDiTSequenceParallel,
]


class EfficientVDiTExtension(ComfyExtension):
    """Gives ComfyUI the nodes of this pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES
