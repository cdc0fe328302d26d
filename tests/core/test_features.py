"""The losses on features, a layer at a time, against a plain reference that keeps everything; and what they hold."""

import copy
import gc
from contextlib import contextmanager, nullcontext

import pytest
import torch
from pinning_driver import GPU, OnGpu, PinningDriver
from small_models import cogvideox, opensora_plan, tiny, wan

from efficient_vdit_core.distill.families.model import sparse_options
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.lora.layers import add_lora, lora_off
from efficient_vdit_core.distill.objectives import features
from efficient_vdit_core.distill.objectives.features import FeatureTap, HostFeatures, LayerLosses, relative_square
from efficient_vdit_core.distill.objectives.knowledge import KnowledgeConfig, KnowledgeLoss
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.training import StepLoss
from efficient_vdit_core.training.live_bytes import LiveBytes

FAMILIES = {f.__name__: f for f in (opensora_plan, tiny, wan, cogvideox)}


class Pair:
    """A teacher and the student under a plan, which differs from it; the teacher is the student without its LoRA, or a
    module of its own."""

    def __init__(self, config, *, lora, checkpointed):
        self.model = open_model(config)
        self.student = self.model.load()
        self.teacher = self.model.load().requires_grad_(False)
        if lora:
            add_lora(self.student, 2)
            self.teacher = None
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.student.parameters():
                if p.requires_grad:
                    p.add_(0.05 * torch.randn(p.shape, generator=g))
        if checkpointed:
            self.model.checkpoint_blocks(self.student)
        options = sparse_options(self.model, TilePlan.uniform(1))
        self.learn = lambda z, time, c: self.model.predict(self.student, z, time, c, options(z))
        tap = self.model.tap(self.student)
        self.taps = {"student_tap": tap, "teacher_tap": tap if lora else self.model.tap(self.teacher)}

    def teach(self, z, time, condition):
        with lora_off(self.student) if self.teacher is None else nullcontext():
            return self.model.predict(self.teacher or self.student, z, time, condition)

    def loss(self, kind=KnowledgeLoss, **weights):
        return kind(
            KnowledgeConfig(**weights), self.model.path, segments=2, teacher=self.teach, student=self.learn, **self.taps
        )

    def inputs(self):
        g = torch.Generator().manual_seed(1)
        width = getattr(self.student.config, "caption_channels", 8)
        x = torch.randn(2, 4, 4, 8, 8, generator=g)
        return x, (torch.randn(2, 5, width, generator=g), torch.ones(2, 5, dtype=torch.long))

    def hooks(self):
        """Of the student's modules, of which a family's own tell what their calls are."""
        return [list(m._forward_hooks) for m in self.student.modules()]

    def gradients(self, loss):
        """Losses by name and gradients by weight, of the loss's first batch."""
        self.student.zero_grad(set_to_none=True)
        own = self.hooks()
        result = loss(*self.inputs(), torch.Generator().manual_seed(0))
        result.total.backward()
        result.release()
        assert self.hooks() == own, "the loss leaves none behind"
        return {"total": result.total, **result.parts}, {n: p.grad for n, p in self.student.named_parameters()}


class KeepsAll(KnowledgeLoss):
    """The reference: all features of both networks are kept, and compared when both have run."""

    def __call__(self, x, condition, generator):
        z, time = self._noised(x, generator)
        kept = []
        for tap, network, mode in (
            (self.teacher_tap, self.teacher, torch.no_grad()),
            (self.student_tap, self.student, nullcontext()),
        ):
            found = {"attention": [], "mlp": []}
            with mode, tap.open(lambda name, layer, value, found=found: found[name].append(value), list(found)):
                kept.append((found, network(z, time, condition).float()))
        (wanted, expected), (got, out) = kept
        square = lambda a, b: (a.float() - b.float()).square().sum() / b.float().square().sum()  # noqa: E731
        parts = {
            name: torch.stack([square(g, w) for g, w in zip(got[name], wanted[name], strict=True)]).mean()
            for name in got
        }
        parts["prediction"] = square(out, expected)
        total = sum(getattr(self.config, name) * part for name, part in parts.items())
        return StepLoss(total, parts)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_keeping_everything(family, lora, checkpointed, tmp_path):
    torch.manual_seed(0)
    pair = Pair(FAMILIES[family](tmp_path), lora=lora, checkpointed=checkpointed)
    weights = {"attention": 1.0, "mlp": 0.5, "prediction": 2.0}
    wanted, expected = pair.gradients(pair.loss(KeepsAll, **weights))
    got, found = pair.gradients(pair.loss(**weights))
    assert got.keys() == wanted.keys() and float(got["attention"].detach()) > 1e-3
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0)
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, value in expected.items():
        assert (value is None) == (found[name] is None)
        if value is not None:
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6 * scale)


def peaks(loss, inputs):
    """Most bytes that live until the loss is there, and until its gradient is."""
    with LiveBytes() as counter:
        result = loss(*inputs, torch.Generator().manual_seed(0))
        forward = counter.peak
        result.total.backward()
        result.release()
    return torch.tensor([forward, counter.peak])


# Without checkpoints each block is kept as it is, its features with it; a frozen gate would not keep them.
@pytest.mark.parametrize(("checkpointed", "share"), [(False, 0.34), (True, 0.05)], ids=["kept", "checkpointed"])
def test_the_features_of_one_layer_live_at_a_time(checkpointed, share, tmp_path, monkeypatch):
    """What a layer's losses add to the peaks of the same training without them; the host's memory, which numpy stands
    for here, is another."""
    monkeypatch.setattr(features.HostFeatures, "keep", lambda self, name, value: torch.from_numpy(value.numpy().copy()))
    kinds = {"bare": (KnowledgeLoss, {"attention": 0.0, "mlp": 0.0}), "all": (KeepsAll, {}), "one": (KnowledgeLoss, {})}
    found = {}
    for layers in (8, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        pair = Pair(opensora_plan(folder, layers), lora=True, checkpointed=checkpointed)
        found[layers] = {n: peaks(pair.loss(kind, **weights), pair.inputs()) for n, (kind, weights) in kinds.items()}
    feature = 4 * 2 * (4 * 4 * 4) * 24  # bytes: float32, batch, tokens, channels
    beyond = {layers: {n: peak - of["bare"] for n, peak in of.items()} for layers, of in found.items()}
    of_a_layer = {n: (beyond[12][n] - beyond[8][n]) / 4 for n in kinds}
    assert float(of_a_layer["all"][0]) > 5.9 * feature, "both networks' features and the differences"
    assert bool((of_a_layer["one"] <= share * of_a_layer["all"][0]).all())
    if checkpointed:
        assert bool((beyond[12]["one"] < 2 * feature).all()), "of one layer, while it is compared"


def test_a_weight_of_nothing_costs_nothing(tmp_path):
    pair = Pair(opensora_plan(tmp_path), lora=True, checkpointed=True)
    seen = []
    tap = pair.taps["student_tap"]
    plain = tap.open

    @contextmanager
    def watched(listener, names):
        seen.append(list(names))
        with plain(listener, names):
            yield

    tap.open = watched
    assert set(pair.gradients(pair.loss(attention=0.0))[0]) == {"total", "mlp", "prediction"}
    assert set(pair.gradients(pair.loss(attention=0.0, mlp=0.0))[0]) == {"total", "prediction"}
    assert seen == [["mlp"]] * 2 + [[]] * 2


def test_the_gradient_is_that_of_autograd():
    value = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.randn(3, 5, dtype=torch.float64)
    relative_square(value, wanted).backward()
    again = value.detach().clone().requires_grad_()
    ((again - wanted).square().sum() / wanted.square().sum()).backward()
    torch.testing.assert_close(value.grad, again.grad, rtol=1e-5, atol=1e-6)


def test_a_block_that_runs_again_adds_no_loss():
    layer = torch.nn.Linear(3, 3)
    losses, tap = LayerLosses(), FeatureTap({"mlp": [layer, copy.deepcopy(layer)]})
    x = torch.randn(2, 3)
    with tap.open(losses.keep, ["mlp"]):
        for module in tap.modules["mlp"]:
            module(x)
    with tap.open(losses.compare, ["mlp"]):
        for module in (*tap.modules["mlp"], *tap.modules["mlp"]):
            module(x)
    assert len(losses.losses) == 2 and float(losses.mean("mlp").detach()) == 0.0


def feature(value, tokens=7, dtype=torch.bfloat16):
    return torch.full((2, tokens, 5), value, dtype=dtype).as_subclass(OnGpu)


def test_features_wait_where_those_of_the_step_before_did(monkeypatch):
    driver, host = PinningDriver(monkeypatch), HostFeatures()
    for step in range(3):
        losses = LayerLosses(host=host)
        for layer in range(4):
            losses.keep("mlp", layer, feature(float(step + layer)))
        for layer in range(4):
            waits = losses.waiting["mlp", layer]
            assert waits.shape == (2, 7, 5) and waits.dtype == torch.bfloat16 and bool((waits == step + layer).all())
    assert driver.asked == ["register"] * 4, "in the first step alone, and nothing waits"
    assert set(driver.pinned.values()) == {2 * 7 * 5 * 2}, "the feature's bytes, and no more"
    host.close()
    assert not driver.pinned and not host.places


def test_a_place_grows_and_takes_smaller_features_too(monkeypatch):
    driver, host = PinningDriver(monkeypatch), HostFeatures()
    for tokens, dtype, held in ((7, torch.bfloat16, 140), (3, torch.float32, 140), (9, torch.bfloat16, 180)):
        kept = host.keep("a", feature(2.0, tokens, dtype))
        assert kept.shape == (2, tokens, 5) and kept.dtype == dtype and bool((kept == 2).all())
        assert list(driver.pinned.values()) == [held]
    assert driver.asked == ["register", f"wait {GPU}", "unregister", "register"]
    del host, kept
    gc.collect()
    assert not driver.pinned


def test_features_that_lie_in_the_hosts_memory_are_not_copied(monkeypatch):
    driver, host, value = PinningDriver(monkeypatch), HostFeatures(), torch.ones(3)
    assert host.keep("a", value) is value and not driver.asked
