"""The tile map's numbers against an explicit N x N softmax, and what its picture shows."""

import itertools

import numpy as np
import pytest
import torch
from PIL import ImageDraw

from efficient_vdit_core.attention import TokenLayout
from efficient_vdit_core.attention.hook.state import FORWARD_KEY, ForwardState
from efficient_vdit_core.attention.sdpa import OVERRIDE_KEY, sdpa_attention
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.plan.head_patterns import by_head
from efficient_vdit_core.search.draw import EDGE, HEADER, LEFT, RIGHT, SMALLEST, TOP, Panel, draw_panels
from efficient_vdit_core.search.tile_map import check_panels, tile_map
from efficient_vdit_core.search.tile_mass import (
    MassRecord,
    averaged_tiles,
    choose_layers,
    kept_tiles,
    make_mass_override,
    tile_mass,
)
from efficient_vdit_core.tiles import TilePattern, TokenGrid

T, S, HEADS, DIM = 5, 6, 2, 8
MAP = SMALLEST  # pixels of a short clip's heat map
LAYOUT = TokenLayout(TokenGrid(T, 2, 3), prefix=3, suffix=4)
FRAME = torch.tensor([-1] * 3 + [f for f in range(T) for _ in range(S)] + [-1] * 4)


def qk(seed=0, batch=2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, HEADS, LAYOUT.tokens, DIM, generator=g) * 2


def exact(q, k):
    """(T, T) shares and (T,) of the rest, from all weights at once."""
    weights = (q.double() @ k.double().transpose(-1, -2) / DIM**0.5).softmax(-1).mean((0, 1))
    to = torch.stack([weights[:, FRAME == f].sum(1) for f in range(-1, T)])
    rows = torch.stack([to[:, FRAME == f].mean(1) for f in range(T)])
    return rows[:, 1:], rows[:, 0]


@pytest.mark.parametrize("max_bytes", [1, 3000, 2**28])
def test_all_rows_give_the_exact_shares_in_chunks_of_any_size(max_bytes):
    q, k = qk()
    mass = tile_mass(q, k, LAYOUT, rows=99, max_bytes=max_bytes)
    share, extra = exact(q, k)
    assert torch.allclose(mass.share.double(), share, atol=1e-6) and torch.allclose(
        mass.extra.double(), extra, atol=1e-6
    )
    assert mass.rows == S and mass.diagonal == pytest.approx(float(share.diagonal().mean()), abs=1e-6)
    off = float(share.sum() - share.diagonal().sum()) / (T * (T - 1))
    assert mass.off_diagonal == pytest.approx(off, abs=1e-6)


def test_the_kept_share_is_that_of_the_tiles_and_the_text():
    q, k = qk()
    share, extra = exact(q, k)
    mass, pattern = tile_mass(q, k, LAYOUT, rows=S), TilePattern(1)
    live = torch.tensor([[i == j or i == 0 or j == 0 for j in range(T)] for i in range(T)])
    assert torch.equal(kept_tiles(pattern, T), live)
    assert mass.kept(pattern) == pytest.approx(float((share * live).sum(1).mean() + extra.mean()), abs=1e-6)
    assert mass.kept(TilePattern(None)) == pytest.approx(1.0, abs=1e-6)


def test_the_kept_share_weighs_each_head_the_same():
    q, k = torch.randn(2, 1, 3, LAYOUT.tokens, DIM, generator=torch.Generator().manual_seed(0)) * 2
    patterns, shares = [TilePattern(1), TilePattern(2), TilePattern(1)], []
    for head, references in enumerate(((0,), (0, 3), (0,))):
        share, extra = exact(q[:, head : head + 1], k[:, head : head + 1])
        live = torch.tensor([[i == j or i in references or j in references for j in range(T)] for i in range(T)])
        shares.append(float((share * live).sum(1).mean() + extra.mean()))
    assert patterns[1].reference_frames(T) == (0, 3)
    assert tile_mass(q, k, LAYOUT, rows=S).kept(by_head(patterns)) == pytest.approx(sum(shares) / 3, abs=1e-6)


def test_the_overlap_counts_shared_positions():
    q, k = qk(batch=1)
    a, b = tile_mass(q, k, LAYOUT, rows=S), tile_mass(*qk(1, 1), LAYOUT, rows=S)
    assert a.overlap(a) == (1.0, 1.0, 1.0)

    def important(q, k, level):
        weights = (q.double() @ k.double().transpose(-1, -2) / DIM**0.5).softmax(-1)[0][:, FRAME >= 0][..., FRAME >= 0]
        rank = weights.argsort(-1, descending=True)
        held = weights.gather(-1, rank).cumsum(-1) / weights.sum(-1, keepdim=True)
        count = (held < level).sum(-1) + 1
        return torch.zeros_like(weights, dtype=torch.bool).scatter(
            -1, rank, torch.arange(T * S).expand_as(rank) < count[..., None]
        )

    for level, got in zip((0.90, 0.95, 0.99), a.overlap(b), strict=True):
        x, y = important(q, k, level), important(*qk(1, 1), level)
        assert got == pytest.approx(2 * float((x & y).sum()) / float(x.sum() + y.sum()), abs=0.01)


def test_the_run_is_undisturbed_and_only_the_chosen_layers_are_measured():
    record, seen = MassRecord((1, 2), rows=3), []
    override = make_mass_override(record, progress=seen.append)
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(LAYOUT)}
    q, k = (x.transpose(1, 2).flatten(2) for x in qk())
    plain = sdpa_attention(q, k, k, HEADS)
    for _ in range(3):
        assert torch.equal(sdpa_attention(q, k, k, HEADS, transformer_options=options), plain)
    sdpa_attention(q, k[:, :5], k[:, :5], HEADS, transformer_options=options)
    assert seen == [0, 1, 2] and set(record.found) == {1, 2} and record.reasons == {"cross-attention"}


def test_padding_is_left_out():
    q, k = qk()
    state = ForwardState(LAYOUT, padding=range(LAYOUT.tokens - 2, LAYOUT.tokens))
    record = MassRecord((0,), rows=S)
    mask = torch.zeros(1, 1, 1, LAYOUT.tokens)
    mask[..., -2:] = float("-inf")
    options = {OVERRIDE_KEY: make_mass_override(record), FORWARD_KEY: state}
    sdpa_attention(q, k, k, HEADS, mask=mask, skip_reshape=True, transformer_options=options)
    want = tile_mass(q[:, :, :-2], k[:, :, :-2], TokenLayout(LAYOUT.grid, 3, 2), rows=S)
    assert torch.equal(record.found[0].share, want.share)


def test_attention_that_is_not_finite_is_named():
    q, k = qk()
    k[..., -4, :] = float("nan")  # a token of the video
    broken, sound = tile_mass(q, k, LAYOUT, rows=S), tile_mass(*qk(), LAYOUT, rows=S)
    for measured in ({2: sound, 3: broken}, {2: sound}):
        with pytest.raises(ValueError, match="layer 3 is not finite"):
            tile_map(measured, 6, other={2: sound, 3: broken})


def hatching(picture, panel=0):
    """(T, T): the share of each tile's pixels that is marked, in a panel of the first row."""
    orange = np.abs(picture - np.array(EDGE) / 255).max(-1) < 0.01
    left = panel * (LEFT + MAP + RIGHT) + LEFT
    return orange[HEADER + TOP : HEADER + TOP + MAP, left : left + MAP].reshape(T, MAP // T, T, MAP // T).mean((1, 3))


def test_the_picture_shows_what_is_large_and_what_is_left_out():
    q, k = qk()
    mass = tile_mass(q, k, LAYOUT, rows=S)
    mass.share = torch.eye(T) * 0.8 + 0.01
    plain, _ = tile_map({0: mass}, 6)
    hatched, text = tile_map({0: mass}, 6, TilePlan.uniform(1))
    heat = plain[HEADER + TOP : HEADER + TOP + MAP, LEFT : LEFT + MAP].mean(-1)
    cells = heat.reshape(T, MAP // T, T, MAP // T).mean((1, 3))
    assert cells.diagonal().max() < cells[~np.eye(T, dtype=bool)].min() - 0.5
    marked = hatching(hatched)
    kept = kept_tiles(TilePattern(1), T).numpy()
    assert marked[~kept].min() > 0.08 > 0.04 > marked[kept].max()
    assert "plan 1:4 keeps" in text and plain.dtype == np.float32 and 0 <= plain.min() and plain.max() <= 1


def test_a_long_clip_s_colours_are_seen_between_the_marks():
    """Of MiniMax-H3's 107 latent frames each has room in which its tile is not all edge."""
    frames = 107
    share = torch.full((frames, frames), 1 / frames)
    kept = kept_tiles(TilePattern(22), frames)
    picture = draw_panels([Panel("Layer 0", share, kept)], "", "")
    side = 6 * frames
    orange = (np.abs(picture - np.array(EDGE) / 255).max(-1) < 0.01)[HEADER + TOP :, LEFT:][:side, :side]
    marked = orange.reshape(frames, 6, frames, 6).mean((1, 3))
    assert marked[kept.numpy()].max() < 0.5 and marked[~kept.numpy()].mean() > 0.15


def test_what_is_seen_in_a_mean_is_dotted_and_named():
    q, k = qk()
    mass = tile_mass(q, k, LAYOUT, rows=S)
    pattern = TilePattern(1, means=1)
    averaged = averaged_tiles(pattern, T)
    assert torch.equal(averaged, ~kept_tiles(TilePattern(1), T)) and not averaged_tiles(TilePattern(1), T).any()
    dotted, text = tile_map({0: mass}, 6, TilePlan(uniform_pattern=pattern))
    hatched, _ = tile_map({0: mass}, 6, TilePlan.uniform(1))
    marked = [(np.abs(picture - np.array(EDGE) / 255).max(-1) < 0.01).mean() for picture in (dotted, hatched)]
    assert 0 < marked[0] < marked[1]
    assert "plan 1:4+1 keeps" in text and "of the tiles, rest in means" in text


def test_each_group_of_heads_has_a_map_with_its_own_tiles():
    q, k = qk()
    plan = TilePlan(patterns=(by_head([TilePattern(1), TilePattern(0, window=1)]),), heads=HEADS)
    picture, text = tile_map({0: tile_mass(q, k, LAYOUT, rows=S)}, 1, plan)
    sections = dict(section.split("\n", 1) for section in text.split("\n\n")[1:])
    assert list(sections) == ["Layer 0", "Layer 0, head 0", "Layer 0, head 1"]
    assert hatching(picture).max() < 0.04  # of all heads: there is no tile that speaks for them all
    names = ("1:4", "0:5~1")
    live = [
        [[i * j == 0 or i == j for j in range(T)] for i in range(T)],
        [[abs(i - j) < 2 for j in range(T)] for i in range(T)],
    ]
    for head, (name, tiles) in enumerate(zip(names, map(torch.tensor, live), strict=True)):
        share, extra = exact(q[:, [head]], k[:, [head]])
        kept = float((share * tiles).sum(1).mean() + extra.mean())
        assert (
            f"plan {name} keeps {kept:.1%} in {float(tiles.double().mean()):.0%} of"
            in sections[f"Layer 0, head {head}"]
        )
        assert f"own frame {float(share.diagonal().mean()):.1%}" in sections[f"Layer 0, head {head}"]
        marked = hatching(picture, 1 + head)
        assert marked[~tiles.numpy()].min() > 0.08 > 0.04 > marked[tiles.numpy()].max()


def test_every_text_stays_in_the_picture_and_off_the_others(monkeypatch):
    boxes, write = [], ImageDraw.ImageDraw.text

    def recorded(draw, xy, text, *args, **options):
        if text != "query: latent frame":  # is turned, in a picture of its own
            box = draw.textbbox(xy, text, font=options["font"], anchor=options.get("anchor"))
            boxes.append((text, box))
            assert 0 <= box[0] and 0 <= box[1] and box[2] <= draw.im.size[0] and box[3] <= draw.im.size[1], text
        return write(draw, xy, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    mass = tile_mass(*qk(), LAYOUT, rows=S)
    by_heads = by_head([TilePattern(1), TilePattern(0, window=1, means=1)])
    long = Panel("Layer 0", mass.share, notes=["heads: " + ", ".join(["12 x 22:85~1+12"] * 9), "own frame 17.9%"])
    for draw in (
        lambda: tile_map({0: mass, 1: mass}, 2, TilePlan(patterns=(by_heads,) * 2, heads=HEADS), {0: mass, 1: mass}),
        lambda: draw_panels([long] * 3, "Attention between frames", "Share of each query frame's attention"),
    ):
        boxes.clear()
        draw()
        for (a, (left, top, right, bottom)), (b, other) in itertools.combinations(boxes, 2):
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1], (a, b)


def test_more_maps_than_a_picture_holds_are_refused():
    plan = TilePlan(patterns=(by_head(TilePattern(k) for k in range(31)),) * 3, heads=31)
    check_panels([0, 2], 3, plan)
    with pytest.raises(ValueError, match="96 maps.* at most 64"):
        check_panels([0, 1, 2], 3, plan)


def test_a_plan_for_a_longer_clip_is_drawn_as_it_would_run():
    mass = tile_mass(*qk(), LAYOUT, rows=2)
    assert "plan 1:4 keeps" in tile_map({0: mass}, 6, TilePlan.uniform(4, 6, frames=20))[1]


def test_layers_are_chosen_by_a_list():
    assert choose_layers("0,-1", 6, 12) == (0, 5) and choose_layers("2-3, 2", 6, 12) == (2, 3)
    for text in ("", "6", "-7", "a", "0-5"):
        with pytest.raises(ValueError, match="layers"):
            choose_layers(text, 6, 4)


def test_heads_that_come_in_several_calls_are_one_layer():
    q, k = qk()
    record, options = MassRecord((0, 1), rows=S), {}
    options |= {OVERRIDE_KEY: make_mass_override(record), FORWARD_KEY: ForwardState(LAYOUT, heads=HEADS)}
    for _ in range(2 * HEADS):  # of two layers, a head at a time
        seen = options[FORWARD_KEY].counter.seen_heads
        head = slice(seen, seen + 1)
        sdpa_attention(q[:, head], k[:, head], k[:, head], 1, skip_reshape=True, transformer_options=options)
    want = tile_mass(q, k, LAYOUT, rows=S)
    for layer in (0, 1):
        found = record.found[layer]
        assert torch.allclose(found.of_heads, want.of_heads) and torch.allclose(
            found.extra_of_heads, want.extra_of_heads
        )
        assert torch.equal(found.important, want.important)
        assert found.kept(by_head([TilePattern(1), TilePattern(2)])) == pytest.approx(
            want.kept(by_head([TilePattern(1), TilePattern(2)]))
        )


def attends(override, q, k, layout=LAYOUT):
    """A forward of one layer."""
    options = {OVERRIDE_KEY: override, FORWARD_KEY: ForwardState(layout, depth=1, heads=HEADS)}
    sdpa_attention(q, k, k, HEADS, skip_reshape=True, transformer_options=options)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_map_of_several_forwards_is_their_mean_each_prompt_counted_alike(order):
    """As prompts of different lengths come in several: two of one length share a forward, a third has one of its own."""
    pairs, record = [qk(seed, batch=1) for seed in range(3)], MassRecord((0,), rows=S)
    override = make_mass_override(record)
    alone = [pairs[i] for i in order]
    attends(override, *torch.cat(alone[:2], dim=1))
    attends(override, *alone[2])
    want = [tile_mass(q, k, LAYOUT, rows=S) for q, k in pairs]
    found = record.found[0]
    assert torch.allclose(found.of_heads, sum(m.of_heads for m in want) / 3, atol=1e-6)
    assert torch.allclose(found.extra_of_heads, sum(m.extra_of_heads for m in want) / 3, atol=1e-6)
    assert found.share.sum(1) + found.extra == pytest.approx(1.0, abs=1e-5)
    assert torch.equal(found.important, tile_mass(*alone[0], LAYOUT, rows=S).important)
    assert "Mean over 3 evaluations" in tile_map(record.found, 1)[1]
    assert "Mean over" not in tile_map({0: want[0]}, 1)[1]


def test_the_mean_knows_heads_that_come_in_several_calls():
    pairs, record = [qk(seed) for seed in range(2)], MassRecord((0,), rows=S)
    for q, k in pairs:
        options = {OVERRIDE_KEY: make_mass_override(record), FORWARD_KEY: ForwardState(LAYOUT, heads=HEADS)}
        for head in range(HEADS):
            part = (x[:, head : head + 1] for x in (q, k, k))
            sdpa_attention(*part, 1, skip_reshape=True, transformer_options=options)
    want = [tile_mass(q, k, LAYOUT, rows=S) for q, k in pairs]
    assert torch.allclose(record.found[0].of_heads, sum(m.of_heads for m in want) / 2, atol=1e-6)


def test_forwards_over_another_number_of_frames_are_left_out_and_told():
    """As context windows of two lengths come; text of another length leaves nothing out."""
    longer = TokenLayout(TokenGrid(T + 1, 2, 3), prefix=3, suffix=4)
    other_text = TokenLayout(LAYOUT.grid, prefix=3, suffix=9)
    record, (q, k) = MassRecord((0,), rows=S), qk()
    override, wide = make_mass_override(record), torch.randn(2, 2, HEADS, longer.tokens, DIM)
    attends(override, q, k)
    for _ in range(2):
        attends(override, *wide, longer)
    want = tile_mass(q, k, LAYOUT, rows=S)
    assert torch.equal(record.found[0].of_heads, want.of_heads)
    text = tile_map(record.found, 1)[1]
    assert "Forwards left out: 2, over another number of latent frames than 5" in text
    assert "left out" not in tile_map({0: want}, 1)[1]
    more_text = torch.randn(2, 2, HEADS, other_text.tokens, DIM)
    attends(override, *more_text, other_text)
    mean = (want.of_heads + tile_mass(*more_text, other_text, rows=S).of_heads) / 2
    assert torch.allclose(record.found[0].of_heads, mean, atol=1e-6) and record.found[0].left_out == 2
