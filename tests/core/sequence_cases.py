"""What the ranks of the tests of sequence-parallel training do, each in the place of one process."""

import itertools
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from small_models import cogvideox, opensora_plan, wan

from efficient_vdit_core.attention import TokenLayout, tile_attention
from efficient_vdit_core.attention.backends.spans import take
from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.runs.alternating import add_learners
from efficient_vdit_core.distill.runs.objective import make_objective
from efficient_vdit_core.distill.runs.sequence_parallel import asking, make_group
from efficient_vdit_core.distill.runs.trainer import describe
from efficient_vdit_core.parallel.sharding.attend import sharded_attention
from efficient_vdit_core.parallel.sharding.communicator import Communicator
from efficient_vdit_core.parallel.sharding.layout import by_frames, by_tokens
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.tiles import TilePattern, TokenGrid
from efficient_vdit_core.training import StepLoss
from efficient_vdit_core.training.live_bytes import LiveBytes

HEADS, DIM = 5, 8
PATTERNS = {
    "full": TilePattern(None),
    "no reference": TilePattern(0),
    "1": TilePattern(1),
    "2": TilePattern(2),
    "0~1": TilePattern(0, window=1),
    "1~1": TilePattern(1, window=1),
    "2~1": TilePattern(2, window=1),  # on two ranks with four frames each no window reaches over the border
    "2~2": TilePattern(2, window=2),
    "heads": by_head(
        [TilePattern(1, window=1), TilePattern(2), TilePattern(None), TilePattern(0, window=2), TilePattern(2)]
    ),
}


def attention_gradients(rank, ranks):
    """The worst error of this rank's result and of its gradients of q, k and v, in float64, by case."""
    found, comm = {}, Communicator()
    for frames, (prefix, suffix) in ((5, (3, 2)), (8, (0, 0)), (11, (4, 0))):
        layout = TokenLayout(TokenGrid(frames, 2, 3), prefix, suffix)
        generator = torch.Generator().manual_seed(frames)
        draw = lambda: torch.randn(2, HEADS, layout.tokens, DIM, generator=generator, dtype=torch.float64)  # noqa: B023,E731
        dout, *qkv = (draw() for _ in range(4))
        for name, pattern in PATTERNS.items():
            want = differentiated(lambda *x: tile_attention(*x, layout, pattern), qkv, dout)  # noqa: B023
            cut = TilePattern(2) if name == "heads" else pattern
            for kind, shard in {"whole": by_frames(layout, ranks), "cut": by_tokens(layout, ranks, cut)}.items():
                mine = lambda x: take(x, shard.spans[rank], 2)  # noqa: B023,E731
                for scheme in ("rb", "ulysses"):
                    attend = lambda *x: sharded_attention(*x, shard, pattern, comm, scheme=scheme)  # noqa: B023,E731
                    got = differentiated(attend, [mine(x) for x in qkv], mine(dout))
                    errors = [float((a - mine(b)).abs().max()) for a, b in zip(got, want, strict=True)]
                    found[f"T={frames} {name} {kind} {scheme}"] = max(errors)
    return found


@torch.enable_grad()
def differentiated(attend, qkv, dout):
    """The result, and the gradients of q, k and v."""
    qkv = [x.clone().requires_grad_() for x in qkv]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, dout)]


FRAMES, WORDS = 5, 5
PLAN = TilePlan(
    (
        TilePattern(1, window=1),
        by_head([TilePattern(2), TilePattern(0, window=1)]),
        TilePattern(1),
        TilePattern(None),
    ),
    heads=2,
)
OBJECTIVES = {
    "consistency": {"segments": 2, "teacher_steps": 4, "guidance": 2.0, "loss": "norm"},
    "knowledge": {"segments": 2},
    "score": {"segments": 2, "teacher_steps": 4, "guidance": 2.0, "loss": "norm", "fake_steps": 1},
}


class Training:
    """A student that differs from its teacher, and the losses of one batch of clips of five frames."""

    def __init__(self, family, folder, method, *, checkpointed, dtype=torch.float32):
        torch.manual_seed(0)
        plan = folder / "plan.json"
        plan.write_text(PLAN.to_json())
        objective = OBJECTIVES[method] | ({"plan": str(plan)} if method != "consistency" else {})
        about = asdict(family(folder))
        train = "lora" if method == "score" else "full"
        values = {
            "method": method,
            "objective": objective,
            "model": {**about, "device": "cpu", "train": train, "lora_rank": 3},
        }
        self.config = DistillConfig.from_dict(values)
        self.model = open_model(self.config.model)
        self.model.dtype = dtype
        self.student = self.model.load().to(dtype)
        self.teacher = None if method == "score" else self.model.load().to(dtype).requires_grad_(False)
        if method == "score":
            add_learners(self.student, self.config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.student.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=generator))
        if checkpointed:
            self.model.checkpoint_blocks(self.student)
        self.x = torch.randn(2, 4, FRAMES, 8, 8, generator=generator)
        self.condition = (torch.randn(2, WORDS, 8, generator=generator), torch.ones(2, WORDS, dtype=torch.long))

    def gradients(self, loss):
        """The loss by parts, and the gradients by weight."""
        self.student.zero_grad(set_to_none=True)
        result = loss()
        result.total.backward()
        result.release()
        losses = {name: part.detach().clone() for name, part in {"total": result.total, **result.parts}.items()}
        return losses, {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}

    def objective(self, group):
        """The losses of the method, at the time of a step of the student."""
        data = SimpleNamespace(negative=lambda count: (self.condition[0][:count].flip(1), self.condition[1][:count]))
        about = describe(self.config, self.model)
        loss = make_objective(
            self.config, self.model, self.student, self.student, self.teacher, about, data, lambda: 1, group=group
        )
        return lambda: loss(self.x, self.condition, torch.Generator().manual_seed(5))

    def linear(self, group):
        """A loss that no rounding to float32 enters."""
        ask, dout = (
            asking(self.model, PLAN, group),
            torch.randn(self.x.shape, generator=torch.Generator().manual_seed(7)),
        )
        time, z = torch.tensor([100.0, 700.0]), self.x.to(self.model.dtype)
        return lambda: StepLoss((ask(self.student, z, time, self.condition) * dout).sum())


def grouped(training, ranks):
    """The group of all ranks."""
    config = replace(training.config, training=replace(training.config.training, sequence_parallel=ranks))
    return make_group(config, training.model, filter(None, (training.student, training.teacher)))


@torch.enable_grad()
def family_gradients(rank, ranks):
    """How far losses and gradients are from one process's, in units of each one's largest entry (or of 1e-3 of the model's
    largest gradient, and of the largest loss, where that is more: the score's part is the square of a small difference), by case."""
    found = {}
    for family, method, checkpointed in itertools.product((opensora_plan, wan, cogvideox), OBJECTIVES, (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            training = Training(family, Path(folder), method, checkpointed=checkpointed)
            case = f"{family.__name__} {method} {checkpointed}"
            found[case] = apart(training, training.objective, ranks)
    for family, checkpointed in itertools.product((opensora_plan, wan, cogvideox), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            training = Training(family, Path(folder), "knowledge", checkpointed=checkpointed, dtype=torch.float64)
            found[f"{family.__name__} linear {checkpointed}"] = apart(training, training.linear, ranks)
    return found


def apart(training, make_loss, ranks):
    losses, want = training.gradients(make_loss(None))
    group = grouped(training, ranks)
    shared_losses, got = training.gradients(make_loss(group))
    largest = max(float(g.abs().max()) for g in want.values())
    errors = {}
    for name, gradient in want.items():
        mine = got[name]
        dist.all_reduce(mine)
        scale = max(float(gradient.abs().max()), 1e-3 * largest)
        errors[name] = float((mine / ranks - gradient).abs().max()) / scale
    worst = max(errors, key=lambda name: errors[name])
    most = max(abs(float(loss)) for loss in losses.values())
    off = max(
        abs(float(shared_losses[name] - loss)) / max(abs(float(loss)), 1e-3 * most) for name, loss in losses.items()
    )
    return {"gradient": errors[worst], "of": worst, "loss": off, "weights": len(errors)}


@torch.enable_grad()
def settled(counter):
    """The live bytes once gloo's threads have let go of what they sent, which they do a moment after the wait."""
    return min((time.sleep(0.05), counter.live)[1] for _ in range(10))


def held(rank, ranks):
    """Bytes that wait for the gradient, of this rank and of one process, by case; six frames of 64 tokens."""
    found = {}
    for family, checkpointed in itertools.product((opensora_plan, wan, cogvideox), (False, True)):
        with tempfile.TemporaryDirectory() as folder:
            training = Training(family, Path(folder), "knowledge", checkpointed=checkpointed)
            training.x = torch.randn(2, 4, 6, 16, 16, generator=torch.Generator().manual_seed(1))
            sizes = []
            for group in (None, grouped(training, ranks)):
                with LiveBytes() as counter:
                    result = training.objective(group)()
                    sizes.append(settled(counter))
                result.release()
                del result
            found[f"{family.__name__} {checkpointed}"] = sizes
    return found
