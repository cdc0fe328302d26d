"""Few-step sampling: noise schedules, segment edges and the multi-step consistency sampler."""

from .consistency import sample_consistency
from .denoiser import Denoiser
from .schedule import DiscreteSchedule, consistency_sigmas, segment_edges

__all__ = ["Denoiser", "DiscreteSchedule", "consistency_sigmas", "sample_consistency", "segment_edges"]
