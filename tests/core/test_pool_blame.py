"""Who is blamed for a fault, and how soon: the rank that failed, within two seconds, or the full disk."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict

import pytest
import torch
from pools import HOST, START, X, gone, launch

from efficient_vdit_core.parallel.pool import session as session_module
from efficient_vdit_core.parallel.pool import start_workers
from efficient_vdit_core.parallel.pool.faults import PoolFault
from efficient_vdit_core.parallel.pool.messages import listen
from efficient_vdit_core.parallel.pool.pool_file import PoolAddress, default_pool_file, read_pool_file, write_pool_file
from efficient_vdit_core.parallel.pool.secret import new_secret
from efficient_vdit_core.parallel.pool.session import Session
from efficient_vdit_core.parallel.pool.start_workers import Workers

pytestmark = pytest.mark.usefixtures("own_cache")
STEP_TIMEOUT = 1.0


def pids(session):
    return [process.pid for process in session.workers.processes]


@pytest.mark.parametrize("trouble", ["stop", "hold"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_hung_rank_is_told_of_within_two_seconds(session, rank, trouble):
    """One that is stopped, and one that holds its interpreter's lock."""
    before, begin = pids(session), time.monotonic()
    with pytest.raises(PoolFault, match=f"did not finish in 1 s: rank {rank} does not answer"):
        session.step(launch(step_timeout=STEP_TIMEOUT), {"trouble": trouble, "rank": rank, "seconds": 60}, {"x": X})
    assert time.monotonic() - begin < STEP_TIMEOUT + 2.0
    assert gone(before, seconds=0.5)


@pytest.mark.parametrize("size", [4, 2**22])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_while_the_pool_is_idle_is_named(session, rank, size):
    """The pool says so at once, to one who listens only at the next step."""
    before = pids(session)
    os.kill(before[rank], signal.SIGKILL)
    assert gone(before)
    with pytest.raises(PoolFault, match=f"rank {rank} ended without a word") as caught:
        session.step(launch(), {}, {"x": torch.zeros(size)})
    assert f"rank {rank}: killed by SIGKILL" in str(caught.value) and caught.value.lost == (rank,)
    assert torch.equal(session.step(launch(), {}, {"x": X})[1]["sum"], 2 * X)


def test_a_pool_that_died_while_it_was_idle_is_forgotten_before_a_run(session, caplog):
    session.ready(launch())
    before = pids(session)
    session.forget_if_gone()
    assert pids(session) == before  # it lives
    os.kill(before[1], signal.SIGKILL)
    assert gone(before)
    session.forget_if_gone()
    assert session.pool is None and "sought anew: rank 1 ended without a word" in caplog.text
    session.forget_if_gone()
    assert torch.equal(session.step(launch(), {}, {"x": X})[1]["sum"], 2 * X)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_while_weights_are_gathered_is_named(rank):
    """It has begun the gather of the next layer, for which the others wait; the next run starts anew."""
    running, devices = Session(), launch(("cpu",) * 3)
    try:
        out, whole = running.step(devices, {"layers": 4}, {"x": X})[1]["out"]
        assert torch.equal(out, whole)
        before, begin = pids(running), time.monotonic()
        message = {"layers": 4, "at": 1, "rank": rank, "trouble": "kill"}
        with pytest.raises(PoolFault, match=f"rank {rank} ended without a word"):
            running.step(devices, message, {"x": torch.zeros(2**10)})
        assert time.monotonic() - begin < 5.0 and gone(before)
        out, whole = running.step(devices, {"layers": 4}, {"x": X})[1]["out"]
        assert torch.equal(out, whole)
    finally:
        running.stop()


class Cancelled(Exception):
    pass


@pytest.fixture
def starts(monkeypatch):
    """The backends by which two ranks were started, as on GPUs that NCCL joins."""
    tried = []

    class Counted(Workers):
        def __init__(self, devices, backend, *rest, **options):
            tried.append(backend)
            super().__init__(devices, backend, *rest, **options)

    monkeypatch.setattr(start_workers, "Workers", Counted)
    monkeypatch.setattr(session_module, "backend_for", lambda _: "nccl")
    return tried


def other_boot(monkeypatch, tmp_path, code):
    """Ranks that run ``code`` alone."""
    (tmp_path / "other_boot.py").write_text(code, encoding="utf-8")
    monkeypatch.setattr(start_workers, "BOOT", tmp_path / "other_boot.py")


def test_a_package_that_is_missing_is_not_blamed_on_the_driver(starts, tmp_path, monkeypatch):
    other_boot(monkeypatch, tmp_path, "import a_package_that_is_not_there")
    with pytest.raises(
        RuntimeError, match="(?s)^Rank . ended while it started.*No module named 'a_package_that_is_not_there'$"
    ):
        Session().ready(launch(("cuda:0", "cuda:1")))
    assert starts == ["nccl"]


def test_a_start_that_hangs_takes_its_time_once(starts, tmp_path, monkeypatch):
    other_boot(monkeypatch, tmp_path, "import time; time.sleep(60)")
    with pytest.raises(TimeoutError, match="not ready after 1 s. Raise start_timeout"):
        Session().ready(launch(("cuda:0", "cuda:1"), start_timeout=1.0))
    assert starts == ["nccl"]


def test_ranks_that_met_and_make_no_group_try_the_next_backend(starts, monkeypatch):
    monkeypatch.setattr(session_module, "_GPU_ATTEMPTS", (("no_such", True), ("gloo", True)))
    session = Session()
    session._start_on_gpus(launch(), None)
    assert starts == ["no_such", "gloo"] and len(session.tests) == 2
    session.stop()


def test_what_the_last_backend_failed_of_is_told(starts, monkeypatch):
    """In the rank's own last line, behind which Python has nothing to add."""
    monkeypatch.setattr(session_module, "_GPU_ATTEMPTS", (("no_such", True), ("no_such", False)))
    said = (
        r"(?s)exchange data by NCCL or gloo\. Run on one device.* the last, by no_such without peer access, ended so:\n"
        r"Rank . ended while it started \(exit status 1\):\n.*Error: [^\n]*no_such[^\n]*$"
    )
    with pytest.raises(RuntimeError, match=said):
        Session()._start_on_gpus(launch(), None)
    assert starts == ["no_such", "no_such"]


@pytest.fixture
def stranger():
    """One that listens where a pool was, and sends a byte now and then."""
    listener, stop = listen("127.0.0.1"), threading.Event()

    def drip():
        taken, _ = listener.accept()
        while not stop.wait(0.3):
            try:
                taken.sendall(b"x")
            except OSError:
                break
        taken.close()

    threading.Thread(target=drip, daemon=True).start()
    address = PoolAddress("127.0.0.1", listener.getsockname()[1], new_secret(), 2, ("cpu", "cpu"), "gone")
    write_pool_file(default_pool_file(), address)
    yield address
    stop.set()
    listener.close()


def test_cancel_is_heard_while_a_stranger_drips(stranger):
    begin = time.monotonic()

    def poll():
        if time.monotonic() > begin + 0.5:
            raise Cancelled

    with pytest.raises(Cancelled):
        Session().ready(launch(), poll)
    assert time.monotonic() - begin < 1.5


def test_a_stranger_that_drips_is_given_up(stranger):
    begin = time.monotonic()
    assert session_module.running_pool(("cpu", "cpu"), HOST.name) is None
    assert time.monotonic() - begin < 7.0 and not default_pool_file().exists()


RIGHT = asdict(PoolAddress("127.0.0.1", 4000, "0" * 64, 2, ("cpu", "cpu"), "name"))
WRONG = {
    "host": 5,
    "port": ["4000", 0, 70000, True, 4000.0, None],
    "secret": ["short", 5, "g" * 64],
    "ranks": [0, -1, "2", 2.0, True, 10**9],
    "devices": ["cpu,cpu", 5, [1, 2], ["cpu"], None],
    "pool": [5, None],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(f, v) for f, values in WRONG.items() for v in (values if isinstance(values, list) else [values])],
)
def test_a_pool_file_with_a_field_of_another_type_is_not_trusted(field, value):
    path = default_pool_file()
    path.parent.mkdir(parents=True)
    for values, trusted in ((RIGHT, True), ({**RIGHT, field: value}, False)):
        path.write_text(json.dumps(values))
        path.chmod(0o600)
        assert (read_pool_file(path) is not None) == trusted


@pytest.mark.parametrize("text", ["", "[]", "[" * 50000, "{}", "5", "\xff", '{"host": "a"}'])
def test_a_pool_file_with_another_content_is_not_trusted(text):
    path = default_pool_file()
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    path.chmod(0o600)
    assert read_pool_file(path) is None


def no_file_may_grow(pid):
    """As on a full disk: whatever the process writes fails."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def test_a_full_log_hides_nothing(session):
    """Rank 1 raises and cannot write it into its log: it is named with its traceback all the same."""
    for pid in pids(session):
        no_file_may_grow(pid)
    with pytest.raises(PoolFault, match=r"(?s)rank 1: KeyError: 'a layer that is not there'.*host\.py.*in trouble"):
        session.step(launch(), {"trouble": "raise", "rank": 1}, {"x": X})


def test_a_full_log_ends_no_rank(session):
    before = pids(session)
    for pid in before:
        no_file_may_grow(pid)
    session.step(launch(), {"trouble": "print", "rank": 1}, {"x": X})
    assert torch.equal(session.step(launch(), {}, {"x": X})[1]["sum"], 2 * X) and pids(session) == before


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A disk of its own for temporary files, of 256 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NO SMALL DISK: mounting one needs root")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    with open(folder / "fill", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(2**12))
        except OSError:
            pass


def test_a_full_disk_is_told_before_the_start(small_disk):
    fill(small_disk)
    with pytest.raises(OSError, match=f"{small_disk}, is full: the workers cannot start. Free some space") as caught:
        Session().ready(launch())
    assert len(str(caught.value)) < 400 and [path.name for path in small_disk.iterdir()] == ["fill"]


def test_a_disk_that_becomes_full_while_they_start_is_told(small_disk):
    workers = Workers(["cpu", "cpu"], "gloo", HOST)
    fill(small_disk)
    with pytest.raises(OSError, match=f"{small_disk}, is full: the workers cannot start"):
        workers.wait(START)
    assert gone([process.pid for process in workers.processes])


def test_a_disk_that_becomes_full_later_ends_nothing(small_disk):
    session = Session()
    session.step(launch(), {}, {"x": X})
    fill(small_disk)
    session.step(launch(), {"trouble": "print", "rank": 1}, {"x": X})
    with pytest.raises(PoolFault, match=r"(?s)rank 1: KeyError: 'a layer that is not there'.*host\.py.*in trouble"):
        session.step(launch(), {"trouble": "raise", "rank": 1}, {"x": X})


def test_no_folder_for_temporary_files_is_told(monkeypatch):
    """What Python says where not even an empty file can be made."""
    code = f"""
import resource, sys, signal
sys.path[:0] = {sys.path!r}
import torch
from pools import launch
from efficient_vdit_core.parallel.pool.session import Session
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
Session().ready(launch())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=START)
    assert done.returncode == 1 and "Free some space, or set TMPDIR" in done.stderr, done.stderr
