"""Pools that Ray places: on this machine alone, and on what stands for two; how they end, and what Ray is not told."""

import argparse
import importlib.metadata
import importlib.util
import os
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from pools import FAULTS, ROOT, family_of, gone, is_loopback, launch, listening, until

from efficient_vdit_core.commands import workers
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file
from efficient_vdit_core.parallel.pool.ray_pool import RayWorkers
from efficient_vdit_core.parallel.pool.secret import shared_secret
from efficient_vdit_core.parallel.pool.session import Session, parse_devices

X = torch.arange(4.0)
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: its pools were not tested"
)
# A cluster of two nodes with room for one rank each. Where it is not ended in order, Ray leaves processes behind.
CLUSTER = """
import signal
from ray.cluster_utils import Cluster
cluster = Cluster()
for _ in range(2):
    cluster.add_node(num_cpus=1, num_gpus=0, include_dashboard=False, object_store_memory=80 * 2**20)
print("at " + cluster.address, flush=True)
signal.pause()  # Ray answers SIGTERM
"""


@pytest.fixture(autouse=True)
def own_folders(monkeypatch):
    """Short ones: Ray's sockets lie in the folder for temporary files."""
    folder = Path(tempfile.mkdtemp(prefix="", dir="/tmp"))
    (folder / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(folder / "t"))
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(folder / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(start, own_folders):
    """Where it is, the variables that let this user in, and its process."""
    own = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    process = start("-c", CLUSTER, **own, RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=str(own_folders / "t"))
    try:
        until(lambda: any(line.startswith("at ") for line in process.lines), process)
        address = next(line for line in process.lines if line.startswith("at ")).split()[1]
        yield process, {**own, "RAY_ADDRESS": address, "GLOO_SOCKET_IFNAME": "lo"}
    finally:
        every = family_of(process.pid)
        process.terminate()
        assert gone(every, seconds=20.0), process.lines


def arguments(*options):
    parser = argparse.ArgumentParser()
    workers.add_arguments(parser)
    return parser.parse_args(options)


def evdit_workers(start, **variables):
    options = ("evdit", "workers", "--engine", "ray", "--devices", "cpu,cpu")
    return start(str(FAULTS / "fault_boot.py"), *options, **variables)


def ready(command, times=1):
    until(lambda: "".join(command.lines).count("workers are ready") == times, command)


def use(session):
    ranks, tensors = session.step(launch(parse_devices("auto")), {}, {"x": X})
    assert torch.equal(tensors["sum"], 2 * X)
    return [said["pid"] for said in ranks]


def holds(folder, secret):
    return [path for path in Path(folder).rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@needs_ray
def test_ranks_are_placed_mended_and_ended(start, own_folders):
    command = evdit_workers(start)
    ready(command)
    session = Session()
    before = use(session)
    assert session.workers is None and parse_devices("auto") == ("rank 0", "rank 1")

    every, secret = family_of(command.pid), shared_secret(make=False)
    assert set(before) < set(every) and any("raylet" in Path(f"/proc/{pid}/cmdline").read_text() for pid in every)
    assert all(is_loopback(address) for address in listening(every)), listening(every)
    for pid in every:
        for name in ("cmdline", "environ"):
            assert secret not in Path(f"/proc/{pid}/{name}").read_text()
    assert list(own_folders.rglob("raylet.out")) and not holds(own_folders / "t", secret)  # Ray's logs are there
    assert not (own_folders / "home").exists()

    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 ended without a word"):
        use(session)
    ready(command, 2)
    assert "rank 1 ended (killed by SIGKILL); its last lines:" in "".join(command.lines)
    after = use(session)
    assert not set(after) & set(before)
    session.stop()

    every += family_of(command.pid)
    command.send_signal(signal.SIGINT)
    assert command.wait(20) == 0 and gone(every)
    assert not default_pool_file().exists() and not list((own_folders / "t").iterdir())


@needs_ray
def test_a_killed_command_leaves_nothing(start, own_folders):
    command = evdit_workers(start)
    ready(command)
    every = family_of(command.pid)
    assert len(every) > 8
    command.kill()
    assert gone(every)
    assert gone([], default_pool_file(), *(own_folders / "t").iterdir())


@needs_ray
def test_ranks_on_two_nodes_of_a_cluster(start, cluster, own_folders):
    """The cluster is another's: it stays, with nothing of the pool's on it."""
    process, own = cluster
    command = evdit_workers(start, **own, EVDIT_LISTEN="127.0.0.1")
    ready(command)
    session = Session()
    ranks = use(session)
    session.stop()
    assert set(ranks) < set(family_of(process.pid))
    assert all(is_loopback(address) for address in listening(ranks)), listening(ranks)  # the store's too
    assert not holds(own_folders / "t", shared_secret(make=False))
    command.send_signal(signal.SIGINT)
    assert command.wait(20) == 0 and gone(ranks) and not default_pool_file().exists()
    assert process.poll() is None


@needs_ray
def test_the_end_of_ray_is_one_sentence(start, own_folders):
    """Ray's own calls would wait for a minute, and then end the command without a word."""
    command = evdit_workers(start)
    ready(command)
    every = family_of(command.pid)
    os.kill(next(pid for pid in every if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)
    until(
        lambda: any("evdit: error: Ray has ended, and the workers with it" in line for line in command.lines),
        seconds=10.0,
    )
    assert command.wait(60) and gone(every) and not list((own_folders / "t").iterdir())


def test_ranks_on_two_machines_need_an_address(monkeypatch):
    monkeypatch.delenv("EVDIT_LISTEN", raising=False)
    with pytest.raises(
        ValueError, match="has placed the ranks on one, two, expected EVDIT_LISTEN: the address by which"
    ):
        RayWorkers._meet(None, Counter(["one", "two"]), 2)


def test_without_ray_it_is_one_sentence(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match=r'needs Ray, which is not installed here\..* -m pip install "ray>=2\.52"$'):
        workers.run(arguments("--engine", "ray", "--devices", "cpu,cpu"))


def test_a_ray_that_lets_others_in_is_not_started(monkeypatch):
    """Before 2.52 it asked for no token: every user of the machine could run code as its owner."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2.51.1")
    with pytest.raises(ValueError, match="Ray 2.51.1 lets any user of this machine run code as you, expected 2.52"):
        workers.run(arguments("--engine", "ray", "--devices", "cpu,cpu"))


@needs_ray
def test_a_path_that_is_too_long_for_rays_sockets(own_folders, monkeypatch):
    long = own_folders / ("a" * 40)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(ValueError, match="its path is too long for them. Set TMPDIR to a shorter one"):
        workers.run(arguments("--engine", "ray", "--devices", "cpu,cpu"))
    assert not list(long.iterdir())


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://127.0.0.1:10001", "expected HOST:PORT of a cluster that this machine is one of"),
        ("127.0.0.1:1", "No Ray answers at RAY_ADDRESS, '127.0.0.1:1': .*refused. Start it, or unset"),
        ("127.0.0.1:99999", "No Ray answers at RAY_ADDRESS"),
    ],
)
@needs_ray
def test_an_address_where_no_ray_is(monkeypatch, address, said):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=said):
        workers.run(arguments("--engine", "ray", "--devices", "cpu,cpu"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--devices", "0,1"], "expected auto or cpu,cpu: Ray chooses the GPUs. Say by --ranks"),
        (["--devices", "cpu,cpu", "--ranks", "2"], "--ranks is how many GPUs Ray gives, expected none with CPU ranks"),
        (["--nodes", "2"], "--nodes is given with --engine ray, expected --engine slurm"),
    ],
)
def test_options_that_ray_does_not_take(options, said):
    with pytest.raises(ValueError, match=said):
        workers.run(arguments("--engine", "ray", *options))
