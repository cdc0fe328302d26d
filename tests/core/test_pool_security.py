"""What a stranger can reach of a pool, on real processes: no secret, no code, no port of another machine's, no rest."""

import json
import os
import resource
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pools import (
    HOST,
    ROOT,
    SAFE_TORCHRUN,
    SAFE_VARIABLES,
    START,
    family_of,
    is_loopback,
    launch,
    listening,
    until,
)

from efficient_vdit_core.parallel.pool.acceptor import MOST_UNPROVED
from efficient_vdit_core.parallel.pool.client import Pool
from efficient_vdit_core.parallel.pool.imports import check_import, usual_folders
from efficient_vdit_core.parallel.pool.messages import listen
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file, read_pool_file
from efficient_vdit_core.parallel.pool.secret import secret_file, shared_secret
from efficient_vdit_core.parallel.pool.session import Session

X = torch.arange(4.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def session():
    running = Session()
    yield running
    running.stop()


def announced():
    return read_pool_file(default_pool_file())


def run_steps(session):
    ranks, tensors = session.step(launch(), {}, {"x": X})
    assert torch.equal(tensors["sum"], 2 * X)
    return ranks


@pytest.fixture
def other_interface(monkeypatch):
    """A machine whose administrator has named another interface for PyTorch."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "eth0")


def test_a_pool_of_the_nodes_listens_on_loopback_only(session, other_interface):
    run_steps(session)
    every = [pid for process in session.workers.processes for pid in family_of(process.pid)]
    found = listening(every)
    assert found and all(is_loopback(address) for address in found), found


def test_a_pool_under_torchrun_listens_on_loopback_only(start, session, other_interface):
    """The help page's command for one machine, torchrun itself included."""
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES)
    until(announced, command)
    run_steps(session)
    found = listening(family_of(command.pid))
    assert found and all(is_loopback(address) for address in found), found


@pytest.mark.parametrize("options", [(), ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")])
def test_a_torchrun_that_is_open_to_the_network_is_refused(start, options):
    """Its store has a port on all interfaces; the sentence names the command that has none."""
    command = start.torchrun(*options, "--nproc-per-node", "2")
    assert command.wait(START) != 0
    said = "".join(command.lines)
    assert "that every computer of the network can reach" in said and not default_pool_file().exists()
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --rdzv-backend c10d --rdzv-conf store_type=file" in said


def test_a_store_that_is_open_is_seen_where_no_variable_tells(start):
    """The c10d rendezvous keeps its TCP store even where the ranks are not given it."""
    command = start.torchrun("--standalone", "--nproc-per-node", "2", **SAFE_VARIABLES)
    assert command.wait(START) != 0 and "(port " in "".join(command.lines)


def test_the_store_of_several_machines_holds_no_secret(start):
    """The attack: anyone who reaches torchrun's port reads all of its store."""
    secret = shared_secret(make=True)
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
    about = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    variables = {"EVDIT_LISTEN": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    every = [start.torchrun(*about, "--node-rank", str(n), **variables) for n in range(2)]
    until(announced, *every)
    stranger = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
    values = {key: stranger.get(key) for key in stranger.list_keys()}
    acceptor = [value for key, value in values.items() if key.endswith("evdit/acceptor")]
    assert len(acceptor) == 1 and announced().port in json.loads(acceptor[0])  # what it looked for is there
    assert announced().secret == secret
    for key, value in values.items():
        assert secret.encode() not in value and bytes.fromhex(secret) not in value and secret not in key


def test_no_argument_and_no_variable_holds_the_secret(start, session):
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES)
    until(announced, command)
    for pid in family_of(command.pid):
        for name in ("cmdline", "environ"):
            assert announced().secret not in Path(f"/proc/{pid}/{name}").read_text()
    for path in (secret_file(), default_pool_file()):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_message_names_no_module(session, tmp_path):
    """Even one who knows the secret cannot have another folder's code run."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Host: pass\n")
    host = {"package": str(tmp_path), "module": "evil", "name": "Host"}
    session.ready(launch(opening={"host": host, "packs": {"x": str(tmp_path)}}))
    assert not (tmp_path / "ran").exists()
    assert torch.equal(session.step(launch(), {}, {"x": X})[1]["sum"], 2 * X)


def test_a_pool_imports_from_its_folders_only(tmp_path, monkeypatch):
    allowed, other = tmp_path / "ComfyUI", tmp_path / "ComfyUI-evil"
    (allowed / "custom_nodes").mkdir(parents=True)
    other.mkdir()
    check_import(str(allowed / "custom_nodes" / "pack"), (str(allowed),))
    for path in (other, allowed / ".." / "ComfyUI-evil", tmp_path):
        with pytest.raises(ValueError, match="may not import .* start the pool anew with the folder in EVDIT_IMPORT"):
            check_import(str(path), (str(allowed),))
    (tmp_path / "link").symlink_to(allowed)
    check_import(str(tmp_path / "link" / "custom_nodes"), (str(allowed),))
    assert str(ROOT) in usual_folders()
    monkeypatch.setenv("EVDIT_IMPORT", os.pathsep.join(["/a", "/b"]))
    assert usual_folders()[-2:] == ("/a", "/b")


def strangers(address, count):
    """Connections that never prove anything; those that the pool sends away count too."""
    found = []
    for _ in range(count):
        sock = socket.socket()
        sock.settimeout(5)
        try:
            sock.connect((address.host, address.port))
        except OSError:
            sock.close()
            continue
        found.append(sock)
    return found


def is_open(sock):
    sock.settimeout(0.0)
    try:
        while sock.recv(64):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def test_strangers_are_few_and_short(session):
    run_steps(session)
    address, rank_0 = session.pool.address, session.workers.processes[0].pid
    session.pool.close()
    files = len(os.listdir(f"/proc/{rank_0}/fd"))
    crowd = strangers(address, 100)
    Pool(address, HOST.name).close()  # they are in nobody's way
    time.sleep(0.5)
    assert sum(is_open(sock) for sock in crowd) <= MOST_UNPROVED
    assert len(os.listdir(f"/proc/{rank_0}/fd")) <= files + MOST_UNPROVED + 2
    time.sleep(5.5)
    assert not any(is_open(sock) for sock in crowd)
    assert len(os.listdir(f"/proc/{rank_0}/fd")) <= files + 2
    for sock in crowd:
        sock.close()


def test_one_that_sends_a_byte_now_and_then_is_sent_away(session):
    run_steps(session)
    (slow,) = strangers(session.pool.address, 1)
    begin = time.monotonic()
    while is_open(slow) and time.monotonic() - begin < 20:
        try:
            slow.setblocking(True)
            slow.sendall(b"x")
        except OSError:
            break
        time.sleep(0.5)
    assert 3.0 < time.monotonic() - begin < 8.0


def test_a_pool_without_files_left_can_be_reached_again(session):
    """At the limit of open files no connection can be accepted; afterwards it can."""
    run_steps(session)
    address, rank_0 = session.pool.address, session.workers.processes[0].pid
    session.pool.close()
    time.sleep(0.5)
    used = max(int(fd) for fd in os.listdir(f"/proc/{rank_0}/fd"))
    limits = resource.prlimit(
        rank_0, resource.RLIMIT_NOFILE, (used + 4, resource.prlimit(rank_0, resource.RLIMIT_NOFILE)[1])
    )
    crowd = strangers(address, 60)
    time.sleep(1.0)
    Pool(address, HOST.name).close()
    resource.prlimit(rank_0, resource.RLIMIT_NOFILE, (3, limits[1]))  # not one more, whoever asks
    more = strangers(address, 20)
    time.sleep(1.0)
    resource.prlimit(rank_0, resource.RLIMIT_NOFILE, limits)
    end = time.monotonic() + 10.0
    while True:
        try:
            pool = Pool(address, HOST.name)
            break
        except ConnectionError:
            assert time.monotonic() < end
    assert len(pool.ask({"do": "self-test"}, timeout=START)[0]) == 2
    pool.close()
    for sock in [*crowd, *more]:
        sock.close()
    assert subprocess.Popen.poll(session.workers.processes[0]) is None
