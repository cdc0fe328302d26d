"""Two networks of one model, each a training of its own: which steps are whose, and what neither can do alone."""

import json
from dataclasses import replace

import pytest
import torch
from small_models import wan, wan_22

from efficient_vdit_core.distill.config import DistillConfig
from efficient_vdit_core.distill.families.open_model import open_model
from efficient_vdit_core.distill.families.texts import TextBank
from efficient_vdit_core.distill.objectives.grid import SegmentGrid
from efficient_vdit_core.distill.objectives.knowledge import KnowledgeConfig, KnowledgeLoss
from efficient_vdit_core.distill.runs.checks import check_expert, check_objective
from efficient_vdit_core.distill.runs.search_stage import WatchedRun
from efficient_vdit_core.distill.runs.trainer import describe
from efficient_vdit_core.sampling.schedule import segment_edges


@pytest.fixture
def experts(tmp_path):
    where = wan_22(tmp_path)
    return {name: open_model(replace(where, expert=name)) for name in ("high", "low")}


@pytest.mark.parametrize("segments", [2, 4, 8, 20])
def test_every_step_is_one_of_theirs_by_the_level_it_begins_at(experts, segments):
    edges = segment_edges(segments, start=1000.0, clean=0.0)[:-1]
    levels = experts["high"].path.coefficients(edges)[1]
    assert torch.equal(experts["high"].serves(edges), levels >= 0.875)
    assert torch.equal(experts["high"].serves(edges), ~experts["low"].serves(edges))
    if segments == 4:
        assert experts["high"].serves(edges).tolist() == [True, True, False, False], "as people sample: two and two"


@pytest.mark.parametrize("name", ["high", "low"])
def test_segments_of_the_other_are_never_drawn(experts, name):
    grid = SegmentGrid(experts[name].path, 4, 12, serves=experts[name].serves)
    draw = grid.draw(4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(draw.segment, minlength=4)
    assert counts.tolist() == ([0, 0, 2000, 2000] if name == "high" else [2000, 2000, 0, 0])
    assert set(torch.unique(draw.at.time).tolist()) == set(
        grid.times[7:13].tolist() if name == "high" else grid.times[1:7].tolist()
    )


def test_a_network_without_a_segment_is_refused(experts):
    with pytest.raises(ValueError, match="None of the 1 segments begins where this network is asked"):
        SegmentGrid(experts["low"].path, 1, 4, serves=experts["low"].serves)


@pytest.mark.parametrize("name", ["high", "low"])
def test_knowledge_is_learnt_at_its_own_steps(experts, name):
    loss = KnowledgeLoss(KnowledgeConfig(), experts[name].path, segments=4, student=None, teacher=None, student_tap=None,
                         teacher_tap=None, serves=experts[name].serves)  # fmt: skip
    assert loss.times.tolist() == ([1000.0, 750.0] if name == "high" else [500.0, 250.0])


def test_they_are_two_files_of_one_form(experts):
    high, low = (experts[name].load().state_dict() for name in ("high", "low"))
    assert high.keys() == low.keys() and not all(torch.equal(high[key], low[key]) for key in high)
    assert experts["low"].transformer_file.name == "transformer_2"


def test_a_search_asks_it_about_noised_clips_at_its_own_steps(experts):
    model, times = experts["low"], []
    bank = TextBank({text: torch.randn(3, 8) for text in ("a", "b", "c")})
    module, clean = model.load().eval(), torch.randn(3, 4, 2, 4, 4)
    predict = model.predict
    model.predict = lambda m, z, time, *rest: times.append(time.tolist()) or predict(m, z, time, *rest)
    seen = []

    def looks_on(func, q, k, v, *args, **kwargs):
        seen.append(q.shape[0])
        return func(q, k, v, *args, **kwargs)

    texts, shape = ["a", "b", "c"], tuple(clean.shape[1:])
    WatchedRun(model, module, bank, texts, shape, 4, 4, 2, torch.device("cpu"), clean).watch(looks_on, 0)
    levels = (1000 * model.path.coefficients(torch.tensor([500.0, 250.0]))[1]).tolist()
    assert [t[0] for t in times] == pytest.approx([*levels, *levels]) and [len(t) for t in times] == [2, 2, 1, 1]
    assert len(seen) >= 4 * model.layers


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"data": {"source": "teacher"}}, 'data.source "teacher"'),
        ({"data": {"source": "videos"}, "training": {"samples_every": 5}}, "training.samples_every"),
        ({"data": {"source": "videos"}, "method": "score"}, "method score"),
    ],
)
def test_what_takes_both_is_refused(values, what):
    config = DistillConfig.from_dict({"method": "consistency", **values})
    with pytest.raises(ValueError, match=what.replace(".", r"\.")):
        check_expert(config)


def test_the_folder_and_the_setting_must_agree(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = wan(tmp_path / "one"), wan_22(tmp_path / "two")
    with pytest.raises(ValueError, match="one network, but model.expert is 'high'. Leave it out"):
        open_model(replace(one, expert="high"))
    with pytest.raises(ValueError, match="two networks, each a training of its own, but model.expert is ''"):
        open_model(replace(two, expert=""))
    with pytest.raises(ValueError, match="Open-Sora-Plan has one network"):
        open_model(replace(two, family="opensora_plan", path="tiny"))
    (tmp_path / "two" / "model_index.json").write_text(json.dumps({"boundary_ratio": 0.9}))
    assert open_model(two).boundary == 0.9


def test_the_result_says_which_it_is(experts):
    config = DistillConfig.from_dict({"method": "consistency", "objective": {"segments": 4}})
    assert [describe(config, model).expert for model in experts.values()] == ["high", "low"]


@pytest.mark.parametrize("method", ["consistency", "knowledge"])
def test_a_network_that_no_step_begins_at_is_refused_in_every_method(tmp_path, method):
    model = open_model(replace(wan_22(tmp_path), expert="low"))
    objective = {"segments": 1, **({"plan": "1:3"} if method == "knowledge" else {})}
    config = DistillConfig.from_dict({"method": method, "objective": objective, "data": {"source": "videos"}})
    with pytest.raises(ValueError, match="None of the 1 steps begins where the low network is asked"):
        check_objective(config, model, describe(config, model))
