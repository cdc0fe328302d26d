"""The pool of workers on CPU ranks: what users rely on, and each kind of fault."""

import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from pools import HOST, START, gone, hub_of, launch

from efficient_vdit_core.parallel.pool import session as session_module
from efficient_vdit_core.parallel.pool.client import Pool
from efficient_vdit_core.parallel.pool.faults import PoolFault
from efficient_vdit_core.parallel.pool.handshake import connect
from efficient_vdit_core.parallel.pool.messages import ConnectionEnded, listen
from efficient_vdit_core.parallel.pool.pool_file import PoolAddress, default_pool_file, read_pool_file, write_pool_file
from efficient_vdit_core.parallel.pool.secret import new_secret
from efficient_vdit_core.parallel.pool.session import Launch, Session, parse_devices
from efficient_vdit_core.parallel.pool.start_workers import Workers

HERE = Path(__file__).parent
X = torch.arange(6.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def session():
    running = Session()
    yield running
    running.stop()


def pids(session):
    return [process.pid for process in session.workers.processes]


def step(session, chosen=None, **message):
    return session.step(chosen or launch(), message, {"x": X})


def test_every_rank_takes_part_and_a_second_run_reuses_the_pool(session):
    ranks, tensors = step(session)
    assert [r["rank"] for r in ranks] == [0, 1] and torch.equal(tensors["sum"], 2 * X)
    assert [r["pid"] for r in ranks] == pids(session)
    again, _ = step(session)
    assert [r["pid"] for r in again] == [r["pid"] for r in ranks] and again[0]["built"] == ["model"]
    assert all(t["gigabytes_per_second"] > 0 for t in session.tests)


def test_another_model_is_built_beside_the_first(session):
    step(session)
    ranks, _ = step(session, launch(key="other"))
    assert all(r["built"][-1] == "other" for r in ranks)


def test_offload_reaches_every_rank(session):
    step(session)
    session.offload()
    assert all(r["built"][-1] == "offloaded" for r in step(session)[0])


def test_a_model_that_cannot_be_built_is_refused_and_the_pool_lives(session):
    step(session)
    before = pids(session)
    with pytest.raises(ValueError, match=r"NoSuchNode is missing here \(rank 1 of 2\)"):
        step(session, launch(key="bad", opening={"trouble": "refuse", "rank": 1}))
    step(session)
    assert pids(session) == before


@pytest.mark.parametrize("trouble", [{"trouble": "refuse", "rank": 1}, {"trouble": "differ"}])
def test_a_fifth_model_that_fails_costs_neither_the_first_nor_the_pool(session, trouble):
    """A rank that has built it has let go of the first, without which the next step would end the pool."""
    for key in "abcd":
        step(session, launch(key=key))
    before = pids(session)
    with pytest.raises(ValueError, match="NoSuchNode is missing|different plans"):
        step(session, launch(key="fails", opening=trouble))
    for key in "abcd":
        assert torch.equal(step(session, launch(key=key))[1]["sum"], 2 * X) and pids(session) == before


def test_the_model_that_was_not_used_for_longest_makes_way(session):
    for key in "abcdae":
        ranks, _ = step(session, launch(key=key))
    assert all(set(said["held"]) == set("acde") for said in ranks)


def test_models_that_the_workers_let_go_of_are_built_again(session):
    """As where ComfyUI has other folders of models by then."""
    step(session, launch(key="high"))
    step(session, launch(key="low", opening={"trouble": "forget"}))
    ranks, _ = step(session, launch(key="high"))
    assert all(said["built"][-3:] == ["high", "low", "high"] for said in ranks)


def test_a_node_on_other_devices_says_that_it_ends_the_pool(session, caplog):
    step(session)
    assert "one pool at a time" not in caplog.text
    session.ready(launch(("cpu",)))
    assert "the workers on cpu, cpu end and others start on cpu," in caplog.text and "one pool at a time" in caplog.text


def test_plans_that_differ_between_ranks_are_refused(session):
    """Each rank runs the nodes before; a search that measures times finds another plan in each, and their exchanges
    would not match."""
    step(session)
    before = pids(session)
    for _ in range(2):  # and not taken for built the second time
        with pytest.raises(ValueError, match="The workers' models have different plans"):
            step(session, launch(key="differ", opening={"trouble": "differ"}))
    step(session)
    assert pids(session) == before


def test_devices_that_compute_in_other_precisions_are_refused(session):
    """As GPUs of two generations do by themselves: one would wait for bytes that the other never sends."""
    step(session)
    with pytest.raises(ValueError, match="compute this model in float of rank 0 and float of rank 1"):
        step(session, launch(key="precision", opening={"trouble": "precision"}))
    step(session)


def test_cancel_leaves_the_pool_alive(session):
    step(session)
    before = pids(session)

    def cancel():
        if session.pool.owed:  # the step is on its way
            raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        session.step(launch(), {"trouble": "sleep", "rank": 1, "seconds": 2.0}, {"x": X}, cancel)
    assert time.monotonic() - start < 1.5
    assert torch.equal(step(session)[1]["sum"], 2 * X) and pids(session) == before


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_with_its_last_lines(session, rank):
    step(session)
    before = pids(session)
    start = time.monotonic()
    with pytest.raises(PoolFault) as caught:
        step(session, trouble="kill", rank=rank)
    assert time.monotonic() - start < 5.0
    text = str(caught.value)
    assert (
        f"rank {rank} ended without a word" in text
        and "killed by SIGKILL" in text
        and f"rank {rank} was asked for kill" in text
    )
    assert gone(before)
    assert torch.equal(step(session)[1]["sum"], 2 * X) and not set(pids(session)) & set(before)


def test_a_hanging_rank_is_named(session):
    step(session)
    before = pids(session)
    with pytest.raises(PoolFault, match="did not finish in 1 s: rank 1 does not answer"):
        step(session, launch(step_timeout=1.0), trouble="stop", rank=1)
    assert gone(before)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_stands_still_before_the_step_is_named(session, rank):
    """More is sent to it than its connection holds; neither this end nor rank 0 may wait for ever."""
    step(session)
    before, found = pids(session), []
    os.kill(before[rank], signal.SIGSTOP)

    def run():
        with pytest.raises(PoolFault) as caught:
            session.step(launch(step_timeout=1.0), {}, {"x": torch.zeros(2**24)})
        found.append(str(caught.value))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found and f"rank {rank} does not answer. Raise step_timeout" in found[0]
    assert gone(before)


def test_no_setting_is_named_where_none_helps(session):
    step(session)
    os.kill(pids(session)[1], signal.SIGSTOP)
    with pytest.raises(PoolFault, match=r"did not finish in 0 s: rank 1 does not answer\.\nrank 0 is at"):
        session.pool.ask({"do": "self-test"}, timeout=0.3)


def test_a_slow_rank_tells_where_it_is(session):
    step(session)
    with pytest.raises(PoolFault, match="(?s)all ranks answer but none has finished.*time.sleep"):
        step(session, launch(step_timeout=1.0), trouble="sleep", rank=1, seconds=60)


def test_an_exception_comes_with_its_traceback(session):
    step(session)
    with pytest.raises(PoolFault, match=r"(?s)rank 1: KeyError: 'a layer that is not there'.*host\.py.*in trouble"):
        step(session, trouble="raise", rank=1)


def test_a_mistake_that_all_ranks_find_is_told_once_and_the_pool_lives(session):
    """None of them waits for another."""
    step(session)
    before = pids(session)
    with pytest.raises(ValueError, match=r"^The prompt is too short.* Write a longer one\. \(rank 0 of 2\)$"):
        step(session, trouble="mistake", rank="all")
    assert torch.equal(step(session)[1]["sum"], 2 * X) and pids(session) == before


def test_out_of_memory_names_device_and_size(session):
    step(session)
    with pytest.raises(PoolFault, match=r"rank 1: out of memory on cpu: Tried to allocate 2\.00 GiB"):
        step(session, trouble="memory", rank=1)


def test_a_rank_that_fails_the_self_test_is_named_and_nothing_stays():
    """No exchange is possible from a device without memory; the other rank waits for it."""
    own = Session()
    with pytest.raises(PoolFault, match="rank 1: NotImplementedError: Cannot copy out of meta tensor"):
        own.ready(Launch(("cpu", "meta"), "model", {}, START, START, HOST))
    assert own.pool is None and own.workers is None


def test_cancel_while_they_start_ends_them():
    own, started = Session(), []

    def cancel():
        started.extend(pids(own) if own.workers else [])
        raise KeyboardInterrupt

    # The session knows them only once they are started; then it waits, and asks whether to go on.
    with pytest.raises(KeyboardInterrupt):
        own.ready(launch(), cancel)
    assert len(started) == 2 and gone(started) and own.workers is None


def test_a_worker_that_cannot_be_started_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no python"))
    with pytest.raises(FileNotFoundError):
        Workers(["cpu", "cpu"], "gloo", HOST)
    assert not list(tmp_path.iterdir())


def test_python_may_be_started_by_a_launcher(tmp_path, monkeypatch):
    """As in a virtual environment on Windows: the worker's process is a child of the one that was started."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    own = Session()
    ranks, _ = step(own)
    own.stop()
    assert gone([said["pid"] for said in ranks])


def test_the_workers_go_with_a_killed_starter(tmp_path):
    code = f"""
import sys, time; sys.path.insert(0, {str(HERE.parents[1])!r})
from efficient_vdit_core.parallel.pool.imports import COMFYUI_HOST
from efficient_vdit_core.parallel.pool.start_workers import Workers
w = Workers(["cpu", "cpu"], "gloo", COMFYUI_HOST); w.wait({START})
print(*[p.pid for p in w.processes], w.folder, flush=True); time.sleep(600)
"""
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    *started, folder = starter.stdout.readline().split()
    starter.kill()
    starter.wait()
    # The workers end by themselves; the watcher, which removes the folder, may be the last to have its turn.
    assert gone([int(pid) for pid in started], Path(folder))


def test_nothing_is_left_when_the_session_ends(session):
    step(session)
    before, folder = pids(session), session.workers.folder
    shared = set(os.listdir("/dev/shm")) if Path("/dev/shm").exists() else set()
    session.stop()
    assert gone(before) and not folder.exists()
    assert not (set(os.listdir("/dev/shm")) if shared else set()) - shared


def test_no_secret_and_no_choice_in_the_command_line(session):
    step(session)
    for pid in pids(session):
        words = Path(f"/proc/{pid}/cmdline").read_text().strip("\0").split("\0")
        assert len(words) == 2 and words[1].endswith("boot.py")
        assert session.pool.address.secret not in Path(f"/proc/{pid}/environ").read_text()


def test_a_stranger_is_not_let_in(session):
    step(session)
    address = session.pool.address
    assert address.host == "127.0.0.1"
    with pytest.raises((ConnectionEnded, ConnectionError)):
        connect(address.host, address.port, new_secret())
    assert torch.equal(step(session)[1]["sum"], 2 * X)


def test_a_second_comfyui_is_refused(session):
    step(session)
    with pytest.raises(
        PoolFault, match=r"another ComfyUI uses these workers: end it, or run it with after_run set to stop\."
    ):
        Pool(session.pool.address, HOST.name)


def test_workers_of_another_version_are_refused(session, monkeypatch):
    step(session)
    address = session.pool.address
    session.pool.close()
    monkeypatch.setattr("efficient_vdit_core.parallel.pool.client.CODE_VERSION", "99.0")
    with pytest.raises(PoolFault, match="ComfyUI has 99.0: start them anew"):
        Pool(address, HOST.name)


def test_many_open_files_do_no_harm(session):
    """Some ComfyUIs hold more than the 1024 that select() knows."""
    step(session)
    address, (soft, hard) = session.pool.address, resource.getrlimit(resource.RLIMIT_NOFILE)
    session.pool.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    files = [open(os.devnull) for _ in range(1100)]  # noqa: SIM115
    try:
        pool = Pool(address, HOST.name)
        assert len(pool.ask({"do": "self-test"}, timeout=START)[0]) == 2
        pool.close()
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_comfyui_that_goes_leaves_no_model_on_the_devices(session):
    step(session)
    address = session.pool.address
    session.pool.close()
    after = Pool(address, HOST.name)
    ranks, _ = after.ask({"do": "step", "key": "model"}, {"x": X}, timeout=START)
    after.close()
    assert all(said["built"][-1] == "offloaded" for said in ranks)


def test_a_rank_of_another_version_is_named():
    """As on a second machine whose pack was not updated."""
    listener, secret = listen("127.0.0.1"), new_secret()
    hub = hub_of(listener, secret, 2, lambda *_: None)
    rank = connect(*listener.getsockname(), secret)
    rank.send({"role": "rank", "rank": 1, "version": "99.0"})
    with pytest.raises(RuntimeError, match=r"of Efficient-vDiT, rank 1 is 99\.0\. Install the same on every machine"):
        hub.wait_for_ranks(5.0)


def test_the_end_of_one_comfyui_does_not_cut_off_the_next():
    """What receives from the first may see its end only after the second was let in."""
    listener, secret = listen("127.0.0.1"), new_secret()
    hub = hub_of(listener, secret, 1, lambda message, _: hub.answer(0, {}))
    address = PoolAddress(*listener.getsockname(), secret, 1)
    first = Pool(address, HOST.name)
    with hub.lock:
        hub.main = None  # as a failed answer leaves it
    second = Pool(address, HOST.name)
    first.close()
    time.sleep(0.3)
    assert second.ask({"do": "step"}, timeout=2.0) == ([{}], {})
    second.close()


def test_a_stale_pool_file_is_removed(monkeypatch):
    free = listen("127.0.0.1")
    port = free.getsockname()[1]
    free.close()
    write_pool_file(default_pool_file(), PoolAddress("127.0.0.1", port, new_secret(), 2, ("cpu", "cpu")))
    assert default_pool_file().stat().st_mode & 0o077 == 0
    assert session_module.running_pool(("cpu", "cpu")) is None and not default_pool_file().exists()


def test_a_port_taken_by_a_stranger_is_not_trusted():
    """Somebody else listens where the pool was, and proves nothing: the file goes."""
    other = listen("127.0.0.1")
    port = other.getsockname()[1]
    write_pool_file(default_pool_file(), PoolAddress("127.0.0.1", port, new_secret(), 2, ("cpu", "cpu")))
    assert session_module.running_pool(("cpu", "cpu")) is None and not default_pool_file().exists()
    other.close()


def test_a_pool_file_that_others_can_read_is_not_trusted():
    write_pool_file(default_pool_file(), PoolAddress("127.0.0.1", 1, new_secret(), 2))
    default_pool_file().chmod(0o644)
    assert read_pool_file(default_pool_file()) is None
    default_pool_file().unlink()


@pytest.mark.parametrize("devices", [("cpu", "cpu"), ("cuda:0", "cuda:1")])
def test_a_build_without_the_start_up_file_says_how_to_start_a_pool(monkeypatch, devices):
    """The registry's archive: it attaches to a running pool, and starts none; the GPUs are not to blame."""
    monkeypatch.setitem(sys.modules, "efficient_vdit_core.parallel.pool.start_workers", None)
    with pytest.raises(ValueError, match="starts none itself. Start one with torchrun"):
        Session().ready(Launch(devices, "model", {}, host=HOST))


@pytest.mark.parametrize("text", ["a", "0,0", "0;1", "", "-1", "cuda:0", "999", ",".join(["cpu"] * 5000)])
def test_devices_that_cannot_be_read_are_refused(text):
    with pytest.raises(ValueError, match="devices"):
        parse_devices(text)


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "shows no GPU. Write auto."),
        (1, "shows one GPU, number 0. Write auto."),
        (4, "shows 4 GPUs. Name those from 0 to 3, or write auto."),
    ],
)
def test_devices_that_the_machine_has_not(monkeypatch, count, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(ValueError, match=f"devices names GPU 9, but this machine {said}"):
        parse_devices("9")


def test_devices():
    assert parse_devices(" CPU, cpu") == ("cpu", "cpu")


def test_a_worker_by_hand_says_how_to_start_one():
    boot = HERE.parents[1] / "efficient_vdit_core" / "parallel" / "boot.py"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(boot)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment, timeout=START
    )
    assert done.returncode and "expected `evdit workers`, torchrun, or the node" in done.stderr
