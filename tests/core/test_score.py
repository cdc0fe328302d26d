"""Score distillation: its formulas against Gaussians and importance weights, whose turn it is, and runs of it."""

import json
import math

import pytest
import torch

from efficient_vdit_core.distill.objectives.consistency import ConsistencyConfig
from efficient_vdit_core.distill.objectives.score import MARGIN, ScoreConfig, ScoreLoss
from efficient_vdit_core.sampling.path import EPSILON, FLOW, FlowPath, V, VPPath

PATHS = {"vp": VPPath(), "flow": FlowPath(), "flow shift 5": FlowPath(5.0)}
SPREAD = 0.7  # deviation of the Gaussian data
CASES = [("vp", EPSILON), ("vp", V), ("flow", FLOW), ("flow shift 5", FLOW)]


def levels_of(path, time):
    """a, s (B, 1) of the network's time."""
    if isinstance(path, FlowPath):
        s = (time.double() / path.start)[:, None]
        return 1 - s, s
    return tuple(c[:, None] for c in path.coefficients(time.double()))


def gaussian_network(path, prediction, spread):
    """The exact network for clean data of N(0, spread^2), in float64."""

    def network(z, time, condition=None, guidance=None):
        a, s = levels_of(path, time)
        z = z.double()
        x = a * spread**2 / (a**2 * spread**2 + s**2) * z
        noise = (z - a * x) / s
        out = {EPSILON: noise, V: a * noise - s * x, FLOW: noise - x}[prediction]
        return out if guidance is None else (out, out)

    return network


def loss_of(path, prediction, segments=3, turn=True, student=SPREAD, fake=SPREAD, **settings):
    teacher = gaussian_network(path, prediction, SPREAD)
    config = ScoreConfig(segments=segments, teacher_steps=4 * segments, weight="sqrt_snr" if prediction == EPSILON else "inverse_variance",
                         **settings)  # fmt: skip
    asks = gaussian_network(path, prediction, student) if isinstance(student, float) else student
    return ScoreLoss(
        config, path, prediction, student=asks, fake=gaussian_network(path, prediction, fake) if isinstance(fake, float) else fake,
        teacher=lambda z, time, condition, guidance: (teacher(z, time),) * 2, students_step=lambda: int(turn),
    )  # fmt: skip


def end_samples(loss, count, generator):
    """Samples of the true distribution at the end of each example's segment."""
    segment = loss._segments(count, generator)
    a, s = (c[:, None] for c in loss.path.coefficients(loss.edges[segment + 1]))
    clean = SPREAD * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return segment, a * clean + s * torch.randn(count, 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_what_a_network_says_of_the_segments_end_is_the_posterior_mean(name, prediction):
    """z_e and z are jointly Gaussian: E[z_e | z] is cov(z_e, z) / var(z) z."""
    path = PATHS[name]
    loss, generator = loss_of(path, prediction), torch.Generator().manual_seed(0)
    segment, end = end_samples(loss, 600, generator)
    draw = loss._draw(segment, generator, end)
    z = draw.signal * end + draw.noise * torch.randn(end.shape, generator=generator, dtype=torch.float64)
    got = loss._end_of(z, gaussian_network(path, prediction, SPREAD)(z, draw.time), draw)
    a_end, s_end = (c[:, None] for c in path.coefficients(loss.edges[segment + 1]))
    variance_end = (a_end * SPREAD) ** 2 + s_end**2
    variance = draw.signal**2 * variance_end + draw.noise**2
    torch.testing.assert_close(
        variance, (draw.a * SPREAD) ** 2 + draw.s**2, rtol=1e-6, atol=1e-9
    )  # the path's own level
    # The network is asked in float32 time and divides by s, which is small next to the data.
    torch.testing.assert_close(got, draw.signal * variance_end / variance * z, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_exact_network_is_where_the_fake_scores_error_is_least(name, prediction):
    path, scale = PATHS[name], torch.ones((), dtype=torch.float64, requires_grad=True)
    exact = gaussian_network(path, prediction, SPREAD)
    loss, generator = loss_of(path, prediction, fake=lambda *a: None), torch.Generator().manual_seed(1)
    segment, end = end_samples(loss, 200_000, generator)
    draw = loss._draw(segment, generator, end)
    extra = torch.randn(end.shape, generator=generator, dtype=torch.float64)

    def fake(z, time, condition):
        a, s = levels_of(path, time)
        noise = {EPSILON: exact(z, time), V: None, FLOW: None}[prediction]
        if noise is None:  # scale the noise that the output stands for
            out = exact(z, time)
            x = a * z - s * out if prediction == V else z - s * out
            noise = scale * (z - a * x) / s
            x = (z - s * noise) / a
            return a * noise - s * x if prediction == V else noise - x
        return scale * noise

    loss.fake = lambda z, time, condition: _Double(fake(z, time, condition))
    loss._fakes_error(end, extra, draw, None).backward()
    slope = float(scale.grad)
    assert abs(slope) < 0.02, slope
    further = float(loss_with(loss, 1.2, scale, end, extra, draw)) - float(
        loss_with(loss, 1.0, scale, end, extra, draw)
    )
    assert further > 0.01


class _Double:
    """Keeps float64 where the loss would turn to float32."""

    def __init__(self, value):
        self.value = value

    def float(self):
        return self.value


def loss_with(loss, value, scale, end, extra, draw):
    with torch.no_grad():
        scale.fill_(value)
        return loss._fakes_error(end, extra, draw, None)


@pytest.mark.parametrize(("name", "prediction"), CASES)
@pytest.mark.parametrize("made", [0.3, SPREAD, 1.5])
def test_samples_are_drawn_towards_the_teachers(name, prediction, made):
    """Where the student spreads too little the gradient pulls outward, where too much inward, and where it is right not
    at all."""
    path = PATHS[name]
    loss, generator = loss_of(path, prediction, segments=2, fake=made), torch.Generator().manual_seed(2)
    count = 4000
    segment = loss._segments(count, generator)
    draw = loss._draw(segment, generator, torch.zeros(count, 1, dtype=torch.float64))
    a_end, s_end = (c[:, None] for c in path.coefficients(loss.edges[segment + 1]))
    end = ((a_end * made) ** 2 + s_end**2).sqrt() * torch.randn(count, 1, generator=generator, dtype=torch.float64)
    way = loss._way(end, torch.randn(end.shape, generator=generator, dtype=torch.float64), draw, None, generator)
    outward = float((-way * end.sign()).mean())
    if made == SPREAD:
        assert way.abs().max() < 0.05
    else:
        assert outward > 0.1 if made < SPREAD else outward < -0.1
    data = segment == 1
    assert torch.equal(s_end[data], torch.zeros_like(s_end[data]))


def test_the_draws_lie_above_the_segments_end():
    loss, generator = loss_of(VPPath(), V, segments=4), torch.Generator().manual_seed(3)
    segment = loss._segments(4000, generator)
    assert torch.bincount(segment).tolist() == [1000] * 4
    draw = loss._draw(segment, generator, torch.zeros(4000, 2))
    assert draw.a.shape == draw.noise.shape == (4000, 1) and bool((draw.noise > 0).all())
    time, end = draw.time.double(), loss.edges[segment + 1]
    span = loss.edges[0] - end
    assert bool((time >= end + MARGIN * span - 1e-3).all()) and bool(
        (time <= loss.edges[0] - MARGIN * span + 1e-3).all()
    )


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_only_the_learner_gets_a_gradient_and_the_student_is_asked_equally_often(turn, own):
    path, asked = FlowPath(), {"student": 0, "fake": 0}
    weights = {name: torch.nn.Linear(2, 2) for name in asked}

    def network(name):
        def ask(z, time, condition):
            asked[name] += 1
            return weights[name](z.float())

        return ask

    loss = loss_of(path, FLOW, segments=3, turn=turn, student=network("student"), fake=network("fake"))
    loss.own_samples = own
    loss.alone = loss.consistency.alone = False
    result = loss(torch.randn(6, 2), None, torch.Generator().manual_seed(0))
    result.total.backward()
    grads = {name: net.weight.grad is not None for name, net in weights.items()}
    assert grads == {"student": turn, "fake": not turn}
    assert asked == ({"student": 3 + 2 + 1, "fake": 1} if turn else {"student": 3, "fake": 1})
    assert set(result.parts) >= ({"consistency", "score"} if turn else {"fake score"})


def test_the_turns_come_round():
    config = ScoreConfig(fake_steps=2)
    assert [config.students_step(step) for step in range(6)] == [0, 0, 1, 0, 0, 2]
    assert [config.is_students_turn(step) for step in range(6)] == [False, False, True] * 2


@pytest.mark.parametrize(
    "wrong", [{"score_weight": -1.0}, {"score_weight": math.nan}, {"fake_steps": 0}, {"segments": 0}]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScoreConfig(**wrong)


def test_it_is_consistency_with_two_more_settings():
    own = set(ScoreConfig.__dataclass_fields__) - set(ConsistencyConfig.__dataclass_fields__)
    assert own == {"score_weight", "fake_steps"} and json.dumps(sorted(own))
