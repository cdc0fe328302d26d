import json
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from efficient_vdit_core.attention import TokenLayout, choose_backend, selection, tile_attention
from efficient_vdit_core.attention.autotune import choose, trial
from efficient_vdit_core.attention.autotune.choose import ChoiceBook, shape_class
from efficient_vdit_core.attention.autotune.trial import Choice, trial_size
from efficient_vdit_core.attention.backends import registry
from efficient_vdit_core.attention.call_shape import CallShape
from efficient_vdit_core.attention.hook.prepare import Preparation
from efficient_vdit_core.attention.report.report import AttentionReport
from efficient_vdit_core.plan import TilePlan
from efficient_vdit_core.storage.cache_folder import cache_folder
from efficient_vdit_core.tiles import TilePattern, TokenGrid
from efficient_vdit_core.timing import seconds

LAYOUT = TokenLayout(TokenGrid(4, 5, 7), prefix=3)


def qkv(layout=LAYOUT, heads=2, dim=8):
    return [torch.randn(1, heads, layout.tokens, dim) for _ in range(3)]


def kind(heads=2, dim=8, dtype=torch.float32):
    return CallShape(1, heads, dim, dtype, torch.device("cpu"))


def candidates(calls, slow):
    """Three backends that note each call; those in ``slow`` sleep."""

    def backend(name):
        def attend(q, k, v, layout, pattern):
            calls.append((name, tuple(q.shape)))
            time.sleep(0.01 if name in slow else 0)
            return q

        return attend

    return {name: backend(name) for name in ("dense", "frames", "triton")}


FULL = {
    "PyTorch's allocator": trial.OUT_OF_MEMORY("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CUDA": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
}


def fails(error):
    def attend(*_):
        raise error

    return attend


no_room = fails(FULL["PyTorch's allocator"])


def key_of(shape, layout=LAYOUT):
    """Under which a choice for such calls is kept."""
    return shape_class(shape, layout, TilePattern(1), "sdpa", {})


def test_the_fastest_is_chosen_and_measured_only_once(tmp_path):
    calls = []
    book = ChoiceBook(tmp_path / "sub" / "attention.json")
    first = book.choose(candidates(calls, {"dense", "triton"}), kind(), LAYOUT, TilePattern(1), "sdpa")
    assert first.backend == "frames" and set(first.milliseconds) == {"dense", "frames", "triton"}
    assert first.milliseconds["dense"] >= 10 > first.milliseconds["frames"]
    seen = len(calls)
    assert (
        book.choose(candidates(calls, {"frames"}), kind(), LAYOUT, TilePattern(1), "sdpa") == first
        and len(calls) == seen
    )
    again = ChoiceBook(book.file).choose(candidates(calls, {"frames"}), kind(), LAYOUT, TilePattern(1), "sdpa")
    assert again == first and len(calls) == seen


def test_no_further_round_is_begun_after_a_second(tmp_path, monkeypatch):
    calls, run = [], candidates([], set())
    monkeypatch.setattr(trial, "_MOST_SECONDS", 0.02)
    book = ChoiceBook(tmp_path / "attention.json")
    choice = book.choose(candidates(calls, set(run)), kind(), LAYOUT, TilePattern(1), "sdpa")
    assert len(calls) == 2 * len(run)  # a first call, and one round of three that take 10 ms each
    assert choice.size == "2 heads, 4 frames of 35 tokens" and choice.times().endswith(f"({choice.size})")


def test_fast_candidates_are_timed_in_three_rounds():
    calls = []
    trial.trial(candidates(calls, set()), kind(), LAYOUT, TilePattern(1), "frames")
    assert [name for name, _ in calls].count("frames") == 1 + 3  # the first shows whether it runs


def test_a_choice_tells_its_times_fastest_first():
    assert Choice("frames", {"dense": 2.0, "frames": 1.0}).times() == "frames 1.00, dense 2.00"


def test_nothing_is_timed_while_a_cuda_graph_is_recorded(monkeypatch):
    """Timing waits for the device, which ends the recording with an error."""
    layout, shape = TokenLayout(TokenGrid(8, 20, 20)), CallShape(1, 4, 96, torch.bfloat16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(selection, "default_book", lambda: pytest.fail("a trial"))
    assert selection.measured_choice(shape, layout, TilePattern(2)) == Choice("frames", {})


def test_a_backend_that_does_not_compile_is_left_out_and_named(tmp_path, caplog):
    def broken(*_):
        raise RuntimeError("Failed to find C compiler")

    book = ChoiceBook(tmp_path / "attention.json")
    choice = book.choose({**candidates([], {"dense"}), "flex": broken}, kind(), LAYOUT, TilePattern(1), "sdpa")
    assert set(choice.milliseconds) == {"dense", "frames", "triton"}
    assert "the backend flex fails here and is left out: RuntimeError: Failed to find C compiler" in caplog.text
    with pytest.raises(RuntimeError, match="C compiler"):  # nothing stands in for the dense function itself
        book.choose({**candidates([], set()), "dense": broken}, kind(dim=16), LAYOUT, TilePattern(1), "sdpa")


def test_another_shape_dense_function_or_version_is_measured_anew(tmp_path, caplog):
    book, calls = ChoiceBook(tmp_path / "attention.json"), []
    run = candidates(calls, set())
    keys = {
        shape_class(kind(), LAYOUT, TilePattern(1), "sdpa", run),
        shape_class(kind(), LAYOUT, TilePattern(2), "sdpa", run),
        shape_class(kind(), LAYOUT, TilePattern(1), "sage", run),
        shape_class(kind(dtype=torch.float64), LAYOUT, TilePattern(1), "sdpa", run),
        shape_class(kind(dim=16), LAYOUT, TilePattern(1), "sdpa", run),
        shape_class(kind(heads=8), LAYOUT, TilePattern(1), "sdpa", run),
    }
    assert len(keys) == 6
    with caplog.at_level("INFO"):
        choice = book.choose(run, kind(), LAYOUT, TilePattern(1), "sdpa")
    assert (
        f"{choice.backend} is fastest for cpu, float32" in caplog.text
        and f"(ms of a trial: {choice.times()})" in caplog.text
    )
    assert ChoiceBook(book.file).choices


def test_sizes_share_a_choice_only_within_a_factor_of_the_square_root_of_two():
    for count in range(20, 5000, 7):
        assert 2**-0.26 < choose._bucket(count) / count < 2**0.26


def test_each_kind_of_gpu_has_choices_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    gpus = [torch.device("cuda", index) for index in (0, 1)]
    assert len({key_of(replace(kind(), device=gpu)) for gpu in gpus}) == 2


def test_heads_of_a_batch_count_as_so_many_more_heads():
    assert key_of(replace(kind(heads=8), batch=4)) == key_of(kind(heads=32))


def test_tokens_before_and_behind_the_video_count_together_in_a_choice():
    assert "extra 128" in key_of(kind(), TokenLayout(LAYOUT.grid, prefix=64, suffix=64))


INSTALLED = {"triton": "3.0", "sageattention": "2.0", "flash-attn": "2.8", "comfy-kitchen": "0.1"}


@pytest.mark.parametrize(
    ("where", "name", "updated"),
    [
        (choose, "__version__", "9.9"),
        (choose, "_TRIALS", 99),
        (choose, "_driver_version", lambda: 13000),
        (torch, "__version__", "9.9"),
        (torch.version, "cuda", "99.0"),
        *[(INSTALLED, package, "9.9") for package in INSTALLED],
        (INSTALLED, "xformers", "0.1"),
    ],
)
def test_choices_are_made_anew_where_anything_they_were_measured_with_is_another(
    tmp_path, monkeypatch, where, name, updated
):
    def version(package):
        if package not in INSTALLED:
            raise PackageNotFoundError(package)
        return INSTALLED[package]

    monkeypatch.setattr(choose, "version", version)
    monkeypatch.setattr(choose, "_driver_version", lambda: 12000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    file, kept = tmp_path / "attention.json", {"a shape": Choice("frames", {"frames": 1.0})}
    choose._write(file, kept)
    assert choose._read(file) == kept
    if where is INSTALLED:
        monkeypatch.setitem(where, name, updated)
    else:
        monkeypatch.setattr(where, name, updated)
    assert choose._read(file) == {}


def kept(backend="frames", **milliseconds):
    """The text of a file with one choice."""
    choices = {"a shape": {"backend": backend, "milliseconds": milliseconds}}
    return json.dumps({"versions": choose._versions(), "choices": choices})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", "null", "[" * 100_000, kept(), kept("sage", frames=1.0), kept("dense", dense=1.0),
        kept(frames="soon"), kept(frames=None), kept(frames=-1.0), kept(frames=float("nan")),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_and_replaced(tmp_path, caplog, text):
    file = tmp_path / "attention.json"
    file.write_text(text)
    book = ChoiceBook(file)
    assert "attention.json cannot be read" in caplog.text
    book.choose(candidates([], set()), kind(), LAYOUT, TilePattern(1), "sdpa")
    assert len(json.loads(file.read_text())["choices"]) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    book = ChoiceBook(tmp_path / "file" / "attention.json")
    assert book.choose(candidates([], {"dense"}), kind(), LAYOUT, TilePattern(1), "sdpa").backend != "dense"
    assert "could not be kept" in caplog.text


def test_an_empty_cache_folder_is_none_and_not_the_one_we_stand_in(monkeypatch, tmp_path):
    monkeypatch.setenv("EVDIT_CACHE_DIR", "")
    assert cache_folder().is_absolute()
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_a_time_is_the_device_s_and_not_that_of_handing_it_over(monkeypatch, kind):
    order = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *_: order.append("wait"))
    assert seconds(lambda: order.append("run"), torch.device(kind)) >= 0 and order == ["wait", "run", "wait"]
    order.clear()
    assert seconds(lambda: order.append("run"), torch.device(kind), 2) >= 0 and order == ["wait", "run", "run", "wait"]


@pytest.mark.parametrize("budget", [2e10, 3e13])
def test_trials_are_small_whatever_the_shape_and_keep_the_frames_where_they_can(budget):
    for layout in (
        TokenLayout(TokenGrid(24, 45, 80)),
        TokenLayout(TokenGrid(21, 30, 52), 512),
        TokenLayout(TokenGrid(72, 24, 42), 1110),
        TokenLayout(TokenGrid(200, 90, 160)),
        TokenLayout(TokenGrid(5, 2, 2)),
    ):
        heads, part = trial_size(kind(heads=24, dim=128), layout, budget)
        assert 1 <= heads <= 24 and part.grid.t == layout.grid.t and part.tokens <= layout.tokens
        flops = 4 * heads * part.tokens**2 * 128
        assert flops <= budget or (heads == 1 and part.grid.tokens_per_frame == 128)  # shorter ones are no trial
        assert heads == 24 or 4 * (heads + 1) * part.tokens**2 * 128 > budget or heads == 4  # as many as can be
        if 4 * 4 * layout.tokens**2 * 128 <= budget:
            assert part == layout


def test_a_trial_that_cannot_keep_the_frames_shrinks_all_parts_of_the_sequence_alike():
    """A quarter of the work of the fewest heads is half the tokens."""
    layout = TokenLayout(TokenGrid(4, 1, 1024), prefix=64, suffix=32)
    quarter = 4 * 4 * layout.tokens**2 * 64 / 4
    half = TokenLayout(TokenGrid(4, 1, 512), prefix=32, suffix=16)
    assert trial_size(kind(heads=8, dim=64), layout, quarter) == (4, half)


def test_a_gpu_s_trial_is_a_tenth_of_a_second_of_its_own_dense_attention(monkeypatch):
    """Of a card that does 3e13 FLOPs a second, where the way back is wanted as well."""
    layout, shape = TokenLayout(TokenGrid(24, 45, 80)), replace(kind(heads=24, dim=96), device=torch.device("cuda", 0))
    asked = []

    def dense(q, k, v, layout, pattern):
        asked.append(4 * q.shape[1] * q.shape[2] ** 2 * q.shape[3])
        return q

    monkeypatch.setattr(trial, "seconds", lambda run, device, calls=1: run() is None or asked[-1] / 3e13)
    monkeypatch.setattr(
        CallShape, "tensors", lambda self, heads, n: [torch.empty(1, heads, n, self.head_dim, device="meta")] * 3
    )
    found = trial._affordable_flops(dense, shape, layout, TilePattern(1))
    assert found == pytest.approx(0.1 * 3e13) and len(asked) == 2 and asked[0] <= 2e12
    assert trial._affordable_flops(dense, kind(), layout, TilePattern(1)) == 2e10 and len(asked) == 2


@pytest.fixture
def book(tmp_path, monkeypatch):
    kept = ChoiceBook(tmp_path / "attention.json")
    monkeypatch.setattr(selection, "default_book", lambda: kept)
    return kept


def test_auto_follows_the_choice(book, monkeypatch):
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    tensors = qkv()
    sparse = tile_attention(*tensors, LAYOUT, TilePattern(1), backend="frames")
    for backend in ("dense", "frames"):
        kept = Choice(backend, {"dense": 1.0 if backend == "dense" else 3.0, "frames": 2.0})
        monkeypatch.setattr(book, "choose", lambda *_, kept=kept: kept)
        # The pattern is what was asked for, where dense attention is faster too.
        assert torch.equal(tile_attention(*tensors, LAYOUT, TilePattern(1)), sparse)
        assert choose_backend(CallShape.of(tensors[0]), LAYOUT, TilePattern(1)) == backend
    times = {"dense": 1.0, "frames": 3.0, "triton": 2.0}
    monkeypatch.setattr(book, "choose", lambda *_: Choice("dense", times))
    assert choose_backend(CallShape.of(tensors[0]), LAYOUT, TilePattern(1), or_dense=False) == "triton"
    assert choose_backend(CallShape.of(tensors[0]), LAYOUT, TilePattern(None)) == "dense"


@pytest.mark.parametrize(
    ("capability", "hip", "flex"), [((9, 0), None, False), ((8, 9), None, True), ((9, 0), "6.4", True)]
)
def test_flex_is_not_tried_where_it_was_measured_to_lose(monkeypatch, capability, hip, flex):
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu = CallShape(1, 24, 96, torch.bfloat16, torch.device("cuda", 0))
    every = {name: registry.BackendStatus(name, True, "") for name in registry.BACKENDS}
    monkeypatch.setattr(registry, "statuses_on", lambda _: every)
    monkeypatch.setattr(selection, "partial_for", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert ("flex" in selection.backend_candidates(gpu)) == flex
    assert "flex" in selection.backend_candidates(replace(gpu, gradients=True))
    assert "flex" in selection.backend_candidates(replace(gpu, dtype=torch.float16))
    assert "flex" in selection.backend_candidates(replace(gpu, head_dim=256))  # which the fused kernel does not take


def test_a_trial_without_room_leaves_the_run_alive(book, monkeypatch, caplog):
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    tried = []

    def full(*_):
        tried.append(1)
        raise trial.OUT_OF_MEMORY("CUDA out of memory")

    monkeypatch.setattr(CallShape, "tensors", full)
    for gradients, backend in ((False, "frames"), (True, "parts"), (False, "frames")):
        assert choose_backend(replace(kind(), gradients=gradients), LAYOUT, TilePattern(1)) == backend
    assert len(tried) == 2, "a trial that found no memory is not made again at every call"
    assert "no room to measure backends" in caplog.text and not ChoiceBook(book.file).choices
    Preparation(TilePlan.uniform(1), AttentionReport()).forget()  # the run is over, and there may be room by the next
    assert choose_backend(kind(), LAYOUT, TilePattern(1)) == "frames" and len(tried) == 3


def test_where_only_dense_attention_has_room_the_run_follows_the_pattern_unmeasured():
    run = {"dense": candidates([], set())["dense"], "frames": no_room}
    found = trial.trial(run, kind(), LAYOUT, TilePattern(1), "frames")
    assert found == (Choice("frames", {}), False)


def test_choices_without_room_are_forgotten_at_the_end_of_every_run(book):
    """Also of one that made none."""
    book.choose({**candidates([], set()), "frames": no_room}, kind(), LAYOUT, TilePattern(1), "sdpa")
    assert book.choices
    book.forget_cramped()
    book.forget_cramped()
    assert not book.choices


def test_a_kept_choice_among_other_backends_than_run_here_is_made_anew(book):
    """As in a file that was written by hand."""
    run = candidates([], {"dense"})
    key = shape_class(kind(), LAYOUT, TilePattern(1), "sdpa", run)
    book.choices[key] = Choice("old", {"dense": 2.0, "old": 1.0})
    assert set(book.choose(run, kind(), LAYOUT, TilePattern(1), "sdpa").milliseconds) == set(run)


def test_a_candidate_that_failed_is_tried_again_at_the_next_start(book):
    """A disk, a compiler or a driver may be another by then; within a run and the next ones it is not asked again."""
    run, broken = candidates([], {"dense", "frames"}), fails(RuntimeError("no space left on device"))
    for _ in range(2):
        assert (
            "triton" not in book.choose({**run, "triton": broken}, kind(), LAYOUT, TilePattern(1), "sdpa").milliseconds
        )
        book.forget_cramped()
        assert len(book.choices) == 1
    later = ChoiceBook(book.file)
    assert not later.choices and later.choose(run, kind(), LAYOUT, TilePattern(1), "sdpa").backend == "triton"
    assert ChoiceBook(book.file).choices


@pytest.mark.parametrize("whose", FULL)
def test_a_candidate_without_room_is_left_out_and_the_choice_is_not_kept_on_disk(book, caplog, whose):
    run = {**candidates([], {"dense"}), "frames": fails(FULL[whose])}
    choice = book.choose(run, kind(), LAYOUT, TilePattern(1), "sdpa")
    assert choice.backend != "frames" and "frames" not in choice.milliseconds and len(choice.milliseconds) > 1
    assert "frames has no room" in caplog.text and book.choices and not ChoiceBook(book.file).choices
    book.choose(candidates([], {"dense"}), kind(dim=16), LAYOUT, TilePattern(1), "sdpa")
    assert len(ChoiceBook(book.file).choices) == 1


def test_short_sequences_follow_the_plan_unmeasured(book):
    assert choose_backend(kind(), LAYOUT, TilePattern(1)) == "frames" and not book.choices


class AttendedPairs(TorchDispatchMode):
    """Counts the query-key pairs, times head_dim, that PyTorch's attention multiplies."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.count += args[0].numel() * args[1].shape[2]
        return func(*args, **(kwargs or {}))


def test_a_real_trial_prefers_the_arrow_mask_where_it_saves_most(book, monkeypatch):
    """By the work that the backends' own calls do, which no other program on the machine changes."""

    def work(run, device, calls):
        with AttendedPairs() as pairs:
            run()
        return pairs.count

    monkeypatch.setattr(trial, "seconds", work)
    layout, pattern = TokenLayout(TokenGrid(24, 10, 20)), TilePattern(1)
    assert choose_backend(kind(dim=64), layout, pattern) in ("frames", "parts")
    (choice,) = book.choices.values()
    for sparse in ("frames", "parts"):
        share = choice.milliseconds[sparse] / choice.milliseconds["dense"]
        assert share == pytest.approx(pattern.flop_density(layout.grid))


def test_each_dense_function_has_trials_of_its_own(book, monkeypatch):
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)

    def other(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    for dense in (None, F.scaled_dot_product_attention, other, None):
        tile_attention(*qkv(), LAYOUT, TilePattern(1), dense=dense)
    assert [key.split(" with ")[1].split(",")[0] for key in book.choices] == ["sdpa", "other"]


def test_a_trial_leaves_the_random_numbers_of_the_run_as_they_were(book, monkeypatch):
    monkeypatch.setattr(selection, "FEWEST_MEASURED_TOKENS", 0)
    tensors, drawn = qkv(), []
    tensors[0].requires_grad_()
    for _ in range(2):  # the second time the choice is known
        torch.manual_seed(0)
        tile_attention(*tensors, LAYOUT, TilePattern(1))
        drawn.append(torch.rand(3))
    assert len(book.choices) == 1 and torch.equal(*drawn)


def test_processes_with_other_threads_keep_each_other_s_choices(tmp_path, monkeypatch):
    """As ComfyUI and its ranks, which read the file when they start."""
    books = []
    for threads in (2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        books.append((threads, ChoiceBook(tmp_path / "attention.json")))
    for threads, one in books:
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        one.choose(candidates([], {"dense"}), kind(), LAYOUT, TilePattern(1), "sdpa")
    assert sorted(key.split(", ")[-1] for key in ChoiceBook(tmp_path / "attention.json").choices) == [
        "1 threads",
        "2 threads",
    ]


def test_a_second_gpu_is_asked_for_itself(monkeypatch):
    def backends(device):
        return [registry.BackendStatus("triton", torch.device(device).index == 1, "the GPU is too old")]

    registry.statuses_on.cache_clear()
    monkeypatch.setattr(registry, "available_backends", backends)
    with pytest.raises(ValueError, match="cannot run here: the GPU is too old"):
        registry.check_backend("triton", "cuda:0")
    registry.check_backend("triton", "cuda:1")
    registry.statuses_on.cache_clear()
