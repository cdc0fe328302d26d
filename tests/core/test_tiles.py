import pytest

from efficient_vdit_core.tiles import PLACEMENTS, TilePattern, TokenGrid

TABLE_1 = [(8, 4, 17.60), (8, 3, 29.88), (8, 2, 45.47), (8, 1, 64.38)]
TABLE_1 += [(24, 12, 21.51), (24, 8, 40.30), (24, 6, 51.88), (24, 4, 64.98), (24, 3, 72.05)]


@pytest.mark.parametrize(("frames", "k", "sparsity"), TABLE_1)
def test_block_sparsity_is_the_papers(frames, k, sparsity):
    assert round(100 * TilePattern(k).block_sparsity(TokenGrid(frames, 45, 80)), 2) == sparsity


@pytest.mark.parametrize(
    ("frames", "k", "expected"),
    [(8, 2, (0, 4)), (8, 3, (0, 3, 6)), (24, 6, (0, 4, 8, 12, 16, 20)), (21, 4, (0, 6, 12, 18)), (8, 0, ())],
)
def test_reference_frames_follow_the_stride(frames, k, expected):
    assert TilePattern(k).reference_frames(frames) == expected


@pytest.mark.parametrize("frames", [1, 2, 5, 8, 13, 21, 24])
def test_k_reference_frames_are_k(frames):
    for k in range(frames + 3):
        found = TilePattern(k).reference_frames(frames)
        assert len(set(found)) == len(found) == (frames if TilePattern(k).is_full(frames) else k)
        assert all(0 <= f < frames for f in found)


@pytest.mark.parametrize(
    ("frames", "h", "w", "block"), [(5, 3, 7, 4), (8, 1, 37, 16), (6, 2, 2, 5), (4, 3, 3, 1), (7, 5, 5, 64)]
)
def test_sparsities_equal_a_count_over_the_whole_mask(frames, h, w, block):
    grid = TokenGrid(frames, h, w)
    for k in range(frames + 1):
        pattern = TilePattern(k)
        references = pattern.reference_frames(frames)
        frame = [i // (h * w) for i in range(grid.tokens)]
        pairs = ((i, j) for i in range(grid.tokens) for j in range(grid.tokens))
        live = {(i, j) for i, j in pairs if frame[i] == frame[j] or {frame[i], frame[j]} & set(references)}
        count = -(-grid.tokens // block)
        blocks = {(i // block, j // block) for i, j in live}
        assert pattern.block_sparsity(grid, block) == pytest.approx(1 - len(blocks) / count**2)
        assert pattern.density(frames) == pytest.approx(len(live) / grid.tokens**2)
        extra = 9
        with_extra = len(live) + 2 * extra * grid.tokens + extra**2
        assert pattern.flop_density(grid, extra) == pytest.approx(with_extra / (grid.tokens + extra) ** 2)


def test_names_and_parsing():
    assert TilePattern(2).name(8) == "2:6"
    assert TilePattern(None).name(8) == TilePattern(8).name(8) == TilePattern(9).name(8) == "full"
    assert TilePattern.parse("2:6") == TilePattern(2) == TilePattern.parse(" 2 ")
    assert TilePattern.parse("Full") == TilePattern(None)


@pytest.mark.parametrize("text", ["", "a:b", "-1:3", "1:2:3", "99999", "1.5", "２", "1~２"])
def test_unreadable_patterns_are_refused(text):
    with pytest.raises(ValueError, match="cannot be read"):
        TilePattern.parse(text)


@pytest.mark.parametrize("k", [-1, 1.5, True, "2"])
def test_impossible_counts_are_refused(k):
    with pytest.raises(ValueError, match="reference frames"):
        TilePattern(k)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="token grid"):
        TokenGrid(8, 0, 4)


@pytest.mark.parametrize(
    ("placement", "shift", "expected"),
    [("strided", 3, (0, 4)), ("first", 3, (0, 1)), ("last", 3, (6, 7)), ("rotating", 0, (0, 4)), ("rotating", 3, (3, 7)),
     ("rotating", 5, (1, 5))],
)  # fmt: skip
def test_reference_frames_stand_where_the_placement_says(placement, shift, expected):
    assert TilePattern(2).placed(placement, shift).reference_frames(8) == expected


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("frames", [1, 2, 5, 8, 13])
def test_every_placement_keeps_k_and_every_frame_gets_its_turn(placement, frames):
    for k in range(frames + 2):
        found = [TilePattern(k).placed(placement, shift).reference_frames(frames) for shift in range(frames)]
        assert all(
            len(set(f)) == len(f) == (frames if TilePattern(k).is_full(frames) else k) and f == tuple(sorted(f))
            for f in found
        )
        assert all(0 <= i < frames for f in found for i in f)
        if placement == "rotating" and k:
            assert {i for f in found for i in f} == set(range(frames))


@pytest.mark.parametrize(
    ("k", "frames", "expected"),
    [(1, 37, (0,)), (3, 37, (0, 10, 25)), (4, 37, (0, 10, 20, 30)), (8, 37, tuple(range(0, 37, 5))), (2, 72, (0, 35)),
     (2, 7, (0, 5)), (3, 12, (0, 5, 10)),
     (2, 4, (0, 2)), (9, 37, (0, 4, 8, 12, 16, 20, 24, 28, 32))],
)  # fmt: skip
def test_chunk_heads_are_every_fifth_frame_as_long_as_they_last(k, frames, expected):
    assert TilePattern(k, placement="chunk heads").reference_frames(frames) == expected


def test_chunk_heads_and_a_window_see_the_chunks_first_frames_and_the_neighbours():
    pattern, frames = TilePattern(2, window=1).placed("chunk heads"), 11
    assert pattern.reference_frames(frames) == (0, 5)  # of the heads 0, 5 and 10; strided ones would be 0 and 6
    others = [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert pattern.neighbours(frames) == {f: tuple(g for g in others if abs(f - g) <= 1) for f in others}
    live = sum(1 for i in range(frames) for j in range(frames) if {i, j} & {0, 5} or abs(i - j) <= 1)
    assert pattern.density(frames) == pytest.approx(live / frames**2)


@pytest.mark.parametrize(("text", "words"), [("1~-1", "window -1"), ("2:6~-12", "window -12"), ("1+-3", "-3 mean")])
def test_a_window_or_means_below_none_are_named(text, words):
    with pytest.raises(ValueError, match=words):
        TilePattern.parse(text)


def test_an_unknown_placement_is_refused():
    with pytest.raises(ValueError, match="placement is 'random'"):
        TilePattern(2).placed("random")


@pytest.mark.parametrize(
    ("k", "made_for", "frames", "expected"),
    [(4, 36, 9, 1), (4, 24, 13, 3), (4, 24, 24, 4), (4, 24, 40, 4), (4, None, 9, 4), (12, 24, 5, 3), (24, 24, 9, None), (0, 24, 9, 0),
     (None, 24, 9, None), (4, 24, 1, 1)],
)  # fmt: skip
def test_a_plan_for_a_longer_clip_keeps_the_distance_between_reference_frames(k, made_for, frames, expected):
    assert TilePattern(k).scaled(made_for, frames).k == expected


def test_the_distance_itself_is_kept_and_evenly_spread_means_shrink_with_their_frames():
    assert TilePattern(6).scaled(21, 11).reference_frames(11) == (0, 4, 8)
    assert TilePattern(12, means=4).scaled(22, 11) == TilePattern(6, means=2)


@pytest.mark.parametrize(("k", "made_for"), [(8, 33), (10, 21), (20, 26), (12, 22), (14, 37)])
def test_a_plan_whose_reference_frames_are_spread_evenly_keeps_their_share(k, made_for):
    """No stride meets that many: at the next one a clip of a frame less lost up to a fifth of its tiles."""
    pattern = TilePattern(k)
    for frames in range(1, made_for):
        scaled = pattern.scaled(made_for, frames)
        assert scaled.k == -(-k * frames // made_for)
        assert len(scaled.reference_frames(frames)) == scaled.k or scaled.is_full(frames)
    assert pattern.scaled(made_for, made_for - 1).density(made_for - 1) == pytest.approx(
        pattern.density(made_for), abs=0.05
    )
