"""Pools that ComfyUI finds running: `evdit workers` on this machine, torchrun on one machine and on what stands for
two."""

import argparse
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from pools import FAULTS, ROOT, SAFE_TORCHRUN, SAFE_VARIABLES, START, alive, gone, launch, ranks_of, until

from efficient_vdit_core.commands.workers import add_arguments, run
from efficient_vdit_core.parallel.pool import worker
from efficient_vdit_core.parallel.pool.messages import listen
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file, read_pool_file
from efficient_vdit_core.parallel.pool.secret import new_secret, secret_file, shared_secret
from efficient_vdit_core.parallel.pool.session import Session, parse_devices
from efficient_vdit_core.parallel.pool.torchrun import settings_from_torchrun

X = torch.arange(4.0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def opened(devices, **opening):
    return launch(devices, key=json.dumps(opening), opening=opening)


def use(session, devices, **opening):
    """One step; the ranks' process ids."""
    ranks, tensors = session.step(opened(devices, **opening), {}, {"x": X})
    assert torch.equal(tensors["sum"], 2 * X)
    return [said["pid"] for said in ranks]


def workers_command(*options):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def refuses_a_second():
    with pytest.raises(ValueError, match="A pool of workers runs already"):
        run(workers_command("--devices", "cpu"))
    assert default_pool_file().exists()


def announced():
    return read_pool_file(default_pool_file())


def evdit_workers(start):
    command = start(str(FAULTS / "fault_boot.py"), "evdit", "workers", "--devices", "cpu,cpu")
    until(announced, command)
    return command


def on_one_machine(start, **variables):
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES, **variables)
    until(announced, command)
    return command


def on_two_machines(start, caches=(None, None), wait=True):
    """Two torchruns of one rank each, as the help page says it; they meet on loopback, and share a cache or have
    ``caches``."""
    shared_secret(make=True)
    with listen("127.0.0.1") as free:
        port = free.getsockname()[1]
    about = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    every = []
    for number, cache in enumerate(caches):
        variables = {"EVDIT_LISTEN": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        variables |= {} if cache is None else {"EVDIT_CACHE_DIR": str(cache)}
        every.append(start.torchrun(*about, "--node-rank", str(number), **variables))
    if wait:
        until(announced, *every)
    return every


def test_evdit_workers_is_found_and_mends_its_pool(start):
    command = evdit_workers(start)
    first = Session()
    assert parse_devices("auto") == ("cpu", "cpu")
    before = use(first, ("cpu", "cpu"))
    assert first.workers is None  # found, not started
    first.stop()
    again = Session()
    refuses_a_second()
    assert use(again, ("cpu", "cpu")) == before  # one ComfyUI after another
    refuses_a_second()  # in use as well
    os.kill(before[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 ended without a word"):
        use(again, ("cpu", "cpu"))
    until(lambda: "".join(command.lines).count("workers are ready") == 2, command)
    assert "rank 1 ended (killed by SIGKILL)" in "".join(command.lines)
    after = use(again, ("cpu", "cpu"))
    assert again.workers is None and not set(after) & set(before)
    again.stop()
    command.terminate()
    assert command.wait(20) == 0
    assert not any(alive(pid) for pid in [*before, *after]) and not default_pool_file().exists()


def test_evdit_workers_that_is_killed_leaves_nothing(start):
    command = evdit_workers(start)
    ranks = ranks_of(command.pid)
    folder = Path(os.readlink(f"/proc/{ranks[0]}/fd/1")).parent
    assert len(ranks) == 2 and folder.name.startswith("evdit-workers-")
    command.kill()
    assert gone(ranks)
    until(lambda: not folder.exists() and not default_pool_file().exists(), seconds=5.0)


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_torchrun_on_one_machine_is_one_pool(start, end):
    command = on_one_machine(start)
    assert parse_devices("auto") == ("cpu", "cpu")
    session = Session()
    ranks = use(session, ("cpu", "cpu"))
    assert session.workers is None and ranks == ranks_of(command.pid)
    said = f"2 workers are ready; ComfyUI finds them by {default_pool_file()}"
    until(lambda: said in "".join(command.lines), command)
    refuses_a_second()
    session.stop()
    command.send_signal(end)
    command.wait(30)
    assert gone(ranks)
    left = {path.name for path in default_pool_file().parent.iterdir()}
    assert left == {"secret", "pool.lock"}


def test_a_killed_rank_0_leaves_no_file(start):
    """The others of its machine remove what it cannot."""
    command = on_one_machine(start)
    ranks = ranks_of(command.pid)
    os.kill(ranks[0], signal.SIGKILL)
    assert gone(ranks) and command.wait(30)
    assert {path.name for path in default_pool_file().parent.iterdir()} == {"secret", "pool.lock"}


def test_rank_0_leaves_no_file_where_the_others_are_ended_before_they_notice(start):
    """torchrun ends them within a tenth of a second; on a busy machine they have not seen by then that it is gone."""
    command = on_one_machine(start)
    first, second = ranks_of(command.pid)
    os.kill(second, signal.SIGSTOP)
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGTERM)
    os.kill(second, signal.SIGCONT)
    assert gone([first, second]) and command.wait(30)
    assert {path.name for path in default_pool_file().parent.iterdir()} == {"secret", "pool.lock"}


def test_a_second_torchrun_says_that_a_pool_runs(start):
    on_one_machine(start)
    second = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES)
    assert second.wait(60)
    assert "A pool of workers runs already" in "".join(second.lines)
    assert use(Session(), ("cpu", "cpu"))


def test_torchrun_on_two_nodes_is_one_pool(start):
    every = on_two_machines(start)
    devices = parse_devices("auto")
    assert devices == ("rank 0", "rank 1")
    session = Session()
    ranks = use(session, devices)
    lacking = {str(ROOT / "gone.safetensors"): 5}
    with pytest.raises(
        ValueError, match=r"has no .*gone\.safetensors, expected the same paths on every machine.*rank 0 of 2"
    ):
        session.ready(opened(devices, paths=lacking))
    other = {str(ROOT / "LICENSE"): 5}
    with pytest.raises(ValueError, match=r"LICENSE has \d+ bytes on .*, expected 5"):
        session.ready(opened(devices, paths=other))
    assert (
        use(session, devices, paths={str(ROOT): None, str(ROOT / "LICENSE"): (ROOT / "LICENSE").stat().st_size})
        == ranks
    )
    every[0].kill()  # SIGKILL: torchrun cannot end its rank itself
    assert gone(ranks)
    with pytest.raises(RuntimeError, match="ended without a word"):
        use(session, devices)
    session.stop()
    with pytest.raises(RuntimeError, match="spanned machines, .*, is gone. Start it again"):
        use(session, devices)


@pytest.mark.parametrize("given", [None, ""])
def test_torchrun_on_several_machines_needs_an_address(monkeypatch, given):
    """At once, and on the first machine alone: the others are not reached."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "EVDIT_LISTEN": given}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match=r"on several machines, expected EVDIT_LISTEN: the address .* Set it, or start no"
    ):
        settings_from_torchrun()
    assert not default_pool_file().parent.exists()
    shared_secret(make=True)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("GROUP_RANK", "1")
    assert settings_from_torchrun().rank == 1


def test_an_address_that_the_other_machines_do_not_reach_is_named(monkeypatch):
    """Such as a loopback one."""
    monkeypatch.setattr(worker, "JOIN_SECONDS", 0.3)
    with listen("127.0.0.1") as shut:
        door = shut.getsockname()
    rank, rendezvous = worker.Worker.__new__(worker.Worker), argparse.Namespace(find=lambda: door)
    rank.settings = argparse.Namespace(rank=1, secret=new_secret(), rendezvous="")
    with pytest.raises(TimeoutError, match="refused. Look at rank 0's log, .* reaches the EVDIT_LISTEN there"):
        rank._enter_hub(rendezvous)


def test_the_file_of_a_pool_that_is_gone_names_no_devices(start, monkeypatch):
    command = on_one_machine(start)
    ranks = ranks_of(command.pid)
    command.kill()
    assert gone(ranks)
    assert announced() is not None  # nobody was left to remove it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--devices means cpu, expected two"):
        run(workers_command())


def test_the_other_machines_must_have_the_secret(start, tmp_path):
    """The first one makes it, the others never do."""
    every = on_two_machines(start, (tmp_path / "first", tmp_path / "second"), wait=False)
    until(lambda: any("Copy that file" in line for line in every[1].lines))
    until((tmp_path / "first" / "workers" / "secret").exists, every[0])
    assert not (tmp_path / "second" / "workers" / "secret").exists()


def test_another_secret_is_named(start, tmp_path):
    for name in ("first", "second"):
        (tmp_path / name / "workers").mkdir(parents=True)
        path = tmp_path / name / "workers" / "secret"
        path.write_text(new_secret())
        path.chmod(0o600)
    every = on_two_machines(start, (tmp_path / "first", tmp_path / "second"), wait=False)
    until(lambda: any("Rank 0 has another secret than this machine" in line for line in every[1].lines))


def test_a_folder_of_others_is_not_used(start, tmp_path):
    folder = default_pool_file().parent
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES)
    assert command.wait(START) and "is not yours alone, expected your folder with mode 0700" in "".join(command.lines)


def test_a_pool_on_one_machine_does_not_listen_elsewhere(start):
    command = start.torchrun(*SAFE_TORCHRUN, "--nproc-per-node", "2", **SAFE_VARIABLES, EVDIT_LISTEN="0.0.0.0")
    assert command.wait(START) and "EVDIT_LISTEN is '0.0.0.0', expected none" in "".join(command.lines)


def test_looking_for_a_pool_writes_nothing(monkeypatch):
    """As on a disk that is read only."""
    assert parse_devices("auto") and not default_pool_file().parent.exists()
    monkeypatch.setenv("EVDIT_CACHE_DIR", "/proc/nowhere")
    assert parse_devices("auto")


def test_the_secret_is_made_once(capsys):
    for _ in range(2):
        assert run(workers_command("--make-secret")) == 0
    assert str(secret_file()) in capsys.readouterr().out and secret_file().stat().st_mode & 0o777 == 0o600
    secret_file().chmod(0o644)
    with pytest.raises(ValueError, match="is no secret that only you can read"):
        run(workers_command("--make-secret"))


def test_a_live_pool_that_is_silent_keeps_its_file(start):
    """A second one on the same devices would run out of memory with it."""
    command = on_one_machine(start)
    ranks = ranks_of(command.pid)
    os.kill(ranks[0], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="lives but cannot be reached: what listens there has not proved"):
        use(Session(), ("cpu", "cpu"))
    assert time.monotonic() - begin < 10.0 and default_pool_file().exists()
    refuses_a_second()
    os.kill(ranks[0], signal.SIGCONT)
    assert use(Session(), ("cpu", "cpu")) == ranks
