"""The part of a clip that a process holds, and how a module that numbers tokens gives it theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...attention.backends.spans import Span, take
from ...parallel.sharding.layout import Shard, within


@dataclass(frozen=True)
class ClipPart:
    """Whole latent frames, and of text that stands in the sequence a share: what ``rank`` holds of ``shard``."""

    shard: Shard
    rank: int

    @property
    def spans(self) -> Sequence[Span]:
        """In the sequence, text included."""
        return self.shard.spans[self.rank]

    @property
    def video(self) -> list[Span]:
        """Of the video's tokens."""
        first, tokens = self.shard.layout.prefix, self.shard.layout.grid.tokens
        return within(self.spans, first, first + tokens)

    @property
    def text(self) -> Span:
        """Of the text before the video."""
        return next(iter(within(self.spans, 0, self.shard.layout.prefix)), (0, 0))

    @property
    def frames(self) -> Span:
        """Of the clip's latent frames."""
        ((start, stop),), size = self.video, self.shard.layout.grid.tokens_per_frame
        return start // size, stop // size

    @contextmanager
    def cut_from_whole(self, module: nn.Module, *whole: Tensor) -> Iterator[None]:
        """Within it ``module`` is given ``whole`` in place of its inputs, and of what it returns, (B, N, ...), alone or in
        a tuple, the tokens of this part go on."""

        def widen(module: nn.Module, args: Any) -> tuple[Tensor, ...]:
            return whole

        def cut(module: nn.Module, args: Any, out: Any) -> Any:
            if isinstance(out, tuple):
                return tuple(take(x, self.spans, 1) for x in out)
            return take(out, self.spans, 1).contiguous()

        handles = module.register_forward_pre_hook(widen), module.register_forward_hook(cut)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def unwrapped(module: nn.Module) -> Any:
    """The network that DDP wraps, or the module itself."""
    return module.module if isinstance(module, DistributedDataParallel) else module
