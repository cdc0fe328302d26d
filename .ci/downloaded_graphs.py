"""The templates of models that are downloaded, in the order of the template browser."""

from __future__ import annotations

from collections.abc import Iterator

from graph import Graph
from hunyuan_graphs import hunyuan
from ltx_graphs import ltx23, ltx25
from minimax_h3_graphs import minimax_h3_image, minimax_h3_text
from opensora_graphs import opensora, several_gpus
from wan_graphs import wan21, wan22, wan22_image


def downloaded_graphs() -> Iterator[Graph]:
    yield from (minimax_h3_text(), minimax_h3_image(), ltx23(), ltx25(), wan22_image(), wan22(), wan21())
    yield from (hunyuan(), opensora(29), opensora(93), several_gpus())
