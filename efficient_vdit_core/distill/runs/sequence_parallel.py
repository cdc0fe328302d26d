"""Sequence-parallel training: the processes of a group share out the frames of one clip, so that each holds a part of the
activations.

A network is given the latents of this process's frames and gives its prediction of them; only attention needs the others
(`parallel.sharding`). The parts of the prediction are then joined: losses on predictions are written for whole clips, un-squared
norms and all, and are computed alike on each process. Features inside blocks stay shared out, and their losses sum
over the group. Between input and prediction every weight meets this process's tokens alone, embeddings and the last layer
too: so every gradient is a part of a sum, and no weight counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...attention import tile_attention
from ...attention.dense_call import Override
from ...attention.hook.attention_call import AttentionCall, override_by
from ...attention.hook.prepare import Preparation
from ...attention.hook.state import ForwardState
from ...attention.layout import TokenLayout
from ...attention.report.report import AttentionReport
from ...parallel.sharding.attend import sharded_attention
from ...parallel.sharding.communicator import Communicator
from ...parallel.sharding.layout import Shard, by_frames
from ...parallel.sharding.replicated import joined
from ...plan import TilePlan
from ...plan.head_patterns import LayerPattern
from ...tiles import TilePattern
from ..config import DistillConfig
from ..families.clip_part import ClipPart
from ..families.model import FamilyModel, SharedModel, can_share, sparse_options
from .launch import PATIENCE

Ask = Callable[[nn.Module, Tensor, Tensor, Any], Tensor]  # network, z, time, condition -> raw output


class ClipGroup:
    """The processes that share one clip, as this one sees them: every network is asked by all of them at once."""

    def __init__(self, model: SharedModel, comm: Communicator) -> None:
        self.model, self.comm = model, comm
        self._layer: int | None = None  # whose self-attention runs now, until it has attended

    def listen(self, module: nn.Module) -> None:
        """Tell the self-attentions over the video of a network from its other attention, also when blocks run again for
        their gradient."""
        for layer, attention in enumerate(self.model.tap(module).modules["attention"]):
            attention.register_forward_pre_hook(partial(self._enter, layer))

    def _enter(self, layer: int, module: nn.Module, args: Any) -> None:
        self._layer = layer

    def asking(self, plan: TilePlan | None) -> Ask:
        """`FamilyModel.predict` under ``plan``, or dense; whole latents in and out. Raises ValueError where the plan does
        not fit the model."""
        if plan is not None:
            self.model.check_plan(plan)
        pattern_of = patterns(plan, self.model.layers)

        def ask(module: nn.Module, z: Tensor, time: Tensor, condition: Any) -> Tensor:
            shard = share_out(self.model.layout(z), z.shape[2], self.comm.size)
            options = self.model.options_with(self._attention(shard, pattern_of))(z)
            parts = [ClipPart(shard, rank) for rank in range(self.comm.size)]
            out = self.model.predict_part(module, z, time, condition, options, parts[self.comm.rank])
            return joined(out, [part.frames for part in parts], 2, self.comm)

        return ask

    def _attention(self, shard: Shard, pattern_of: Callable[[TokenLayout, int], LayerPattern]) -> Override:
        """An attention override under which a layer's self-attention goes over the processes."""

        def answer(call: AttentionCall) -> Tensor:
            layer, self._layer = self._layer, None
            if layer is None:
                return call.dense()
            pattern = pattern_of(shard.layout, layer)

            def inner(q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
                return tile_attention(q, k, v, shard.layout, pattern.of_heads(first, q.shape[1]), dense=call.asked)

            return call.give(sharded_attention(*call.take(), shard, pattern, self.comm, inner=inner))

        return override_by(answer)


def asking(model: FamilyModel, plan: TilePlan | None, group: ClipGroup | None) -> Ask:
    """How networks are asked under ``plan``, or dense, by this process alone or by its group."""
    if group is not None:
        return group.asking(plan)
    options = sparse_options(model, plan) if plan is not None else None
    return lambda module, z, time, condition: model.predict(
        module, z, time, condition, options(z) if options is not None else None
    )


def patterns(plan: TilePlan | None, layers: int) -> Callable[[TokenLayout, int], LayerPattern]:
    """Each layer's pattern over a layout."""
    if plan is None:
        return lambda layout, layer: TilePattern(None)
    prepared = Preparation(plan, AttentionReport())

    @lru_cache(maxsize=4 * layers)
    def pattern_of(layout: TokenLayout, layer: int) -> LayerPattern:
        state = ForwardState(layout, depth=layers)
        prepared.tell(prepared.layer(state, layer))
        return prepared.pattern_of(state, layer)

    return pattern_of


@lru_cache(maxsize=32)
def share_out(layout: TokenLayout, frames: int, processes: int) -> Shard:
    """Whole latent frames for each process, numbers that differ by one at most. Raises ValueError where one would get none,
    or no share of the text that stands in the sequence."""
    if frames != layout.grid.t:
        raise ValueError(
            f"The model joins {frames} latent frames to {layout.grid.t}, which training.sequence_parallel cannot share out. Set it "
            "to 1."
        )
    least, what = min(((frames, "latent frames"), (layout.prefix or frames, "tokens of text")))
    if least < processes:
        raise ValueError(
            f"training.sequence_parallel is {processes}, expected at most {least}: a clip has {least} {what}, and each process "
            "gets one at least. Lower it, or train on longer clips."
        )
    return by_frames(layout, processes)


def check_shares(config: DistillConfig, model: FamilyModel) -> None:
    """Raises ValueError where clips of the configuration's size cannot be shared out over so many processes."""
    processes = config.training.sequence_parallel
    if processes == 1:
        return
    shared = _shared(model)
    if processes > model.heads:
        raise ValueError(
            f"training.sequence_parallel is {processes}, expected at most {model.heads}: dense layers share out their heads, "
            f"and this model has {model.heads}. Lower it."
        )
    share_out(*_sizes(config, shared), processes)


def largest_share(config: DistillConfig, model: FamilyModel) -> ClipPart:
    """What the process holds that holds most, of clips of the configuration's size."""
    shard = share_out(*_sizes(config, _shared(model)), config.training.sequence_parallel)
    return ClipPart(shard, max(range(shard.ranks), key=lambda rank: shard.tokens[rank]))


def _shared(model: FamilyModel) -> SharedModel:
    if not can_share(model):
        raise ValueError(
            f"training.sequence_parallel shares out the frames of a clip, and {model.family} keeps text, sound and video in one "
            "sequence that it does not share out. Set it to 1; FSDP2 shares out the weights."
        )
    return model


def _sizes(config: DistillConfig, model: SharedModel) -> tuple[TokenLayout, int]:
    """The layout of a clip of the configuration's size, and its latent frames."""
    data = config.data
    shape = model.latent_shape(model.size(data.frames, data.height, data.width))
    return model.layout(torch.empty(1, *shape, device="meta")), shape[1]


def check_processes(config: DistillConfig, processes: int) -> None:
    """Raises ValueError where ``processes`` do not fall into groups of the configuration's size."""
    size = config.training.sequence_parallel
    if processes % size:
        raise ValueError(
            f"training.sequence_parallel is {size}, expected a divisor of the {processes} process{'es' if processes > 1 else ''} "
            f"of this run. Start a multiple of {size} with `accelerate launch --num_processes`, or set it to 1."
        )


def make_group(config: DistillConfig, model: FamilyModel, networks: Iterable[nn.Module]) -> ClipGroup | None:
    """This process's group, which asks ``networks``; None where each has clips of its own. Called by every process."""
    size = config.training.sequence_parallel
    if size == 1:
        return None
    # As patient as the processes' own group: one of them writes samples while the others wait.
    group, _ = dist.new_subgroups(group_size=size, timeout=PATIENCE)
    made = ClipGroup(_shared(model), Communicator(group))
    for network in networks:
        made.listen(network)
    return made
