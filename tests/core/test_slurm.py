"""The job script of `evdit workers --engine slurm`: read by SLURM's own parser where that is here, and run by what stands
for srun, on this machine as one node and as two."""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pools import FAULTS, ROOT, alive, family_of, gone, is_loopback, launch, listening, until

from efficient_vdit_core.commands import workers
from efficient_vdit_core.parallel.pool.pool_file import default_pool_file, read_pool_file
from efficient_vdit_core.parallel.pool.secret import secret_file, shared_secret
from efficient_vdit_core.parallel.pool.session import Session, parse_devices
from efficient_vdit_core.parallel.pool.slurm import settings_from_slurm
from efficient_vdit_core.parallel.pool.slurm_script import Job, script

X = torch.arange(4.0)
STAND_INS = ROOT / "tests" / "helpers" / "slurm"
# As the configuration of a cluster; no controller listens there.
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=1
AuthType=auth/none
CredType=cred/none
GresTypes=gpu
MessageTimeout=1
NodeName=localhost CPUs=2
PartitionName=gpu Nodes=localhost
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVDIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("EVDIT_LISTEN", raising=False)


def printed(capsys, *options):
    parser = argparse.ArgumentParser()
    workers.add_arguments(parser)
    assert workers.run(parser.parse_args(["--engine", "slurm", *options])) == 0
    return capsys.readouterr().out


def in_allocation(start, tmp_path, text, nodes, **variables):
    """Run the script as bash does inside an allocation; its ranks run the tests' host, and a short life is long enough
    for another start."""
    boot = str(ROOT / "efficient_vdit_core" / "parallel" / "boot.py")
    assert text.count(boot) == 1 and text.count("-lt 60") == 1
    path = tmp_path / "pool.sh"
    path.write_text(text.replace(boot, str(FAULTS / "fault_boot.py")).replace("-lt 60", "-lt 1"), encoding="utf-8")
    about = {"PATH": f"{STAND_INS}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_NNODES": str(nodes)}
    return start.bash(path, SLURM_JOB_NODELIST="here", GLOO_SOCKET_IFNAME="lo", **about, **variables)


def use(session):
    ranks, tensors = session.step(launch(parse_devices("auto")), {}, {"x": X})
    assert torch.equal(tensors["sum"], 2 * X)
    return [said["pid"] for said in ranks]


def announced():
    return read_pool_file(default_pool_file())


@pytest.mark.parametrize(("nodes", "gpus", "names"), [(2, 1, ("rank 0", "rank 1")), (1, 2, ("cpu", "cpu"))])
def test_the_script_brings_up_a_pool_that_computes(start, tmp_path, capsys, nodes, gpus, names):
    text = printed(capsys, "--nodes", str(nodes), "--gpus-per-node", str(gpus))
    command = in_allocation(start, tmp_path, text, nodes)
    until(announced, command)
    assert parse_devices("auto") == names and announced().host == "127.0.0.1"
    session = Session()
    ranks = use(session)
    assert session.workers is None and len(set(ranks)) == 2 and set(ranks) < set(family_of(command.pid))
    assert all(is_loopback(address) for address in listening(ranks)), listening(ranks)
    secret = shared_secret(make=False)
    for pid in family_of(command.pid):
        for name in ("cmdline", "environ"):
            assert secret not in Path(f"/proc/{pid}/{name}").read_text()

    os.kill(ranks[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rank 1 ended without a word"):
        use(session)
    until(lambda: any("a rank ended; starting the workers anew" in line for line in command.lines), command)
    until(lambda: announced() and all(not alive(pid) for pid in ranks), command)
    after = use(session)
    assert not set(after) & set(ranks)
    session.stop()

    every = family_of(command.pid)
    os.killpg(command.pid, signal.SIGINT)  # a terminal's Ctrl-C
    assert command.wait(20) == 130 and gone(every) and not default_pool_file().exists()


def test_what_fails_at_once_is_not_started_again(start, tmp_path, capsys):
    text = printed(capsys, "--gpus-per-node", "2")
    command = in_allocation(start, tmp_path, text.replace("SECONDS=0", "SECONDS=-99"), 1, EVDIT_LISTEN="0.0.0.0")
    assert command.wait(60) == 1
    said = "".join(command.lines)
    assert "EVDIT_LISTEN is '0.0.0.0', expected none" in said and "anew" not in said


def test_the_script_is_bashs_and_holds_no_secret(capsys, tmp_path):
    text = printed(capsys, "--gpus-per-node", "8", "--nodes", "4", "--time", "1-02:00:00", "--partition", "gpu")
    assert secret_file().exists() and shared_secret(make=False) not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).returncode == 0
    assert "srun --nodes=4 --ntasks=32 --ntasks-per-node=8 " in text and "#SBATCH --time=1-02:00:00\n" in text


def test_paths_are_quoted(monkeypatch, tmp_path):
    """Run by bash: what a path says is never a command."""
    evil = f"/a b/$(touch {tmp_path / 'ran'})'\"`"
    monkeypatch.setattr(sys, "executable", evil)
    text = script(Job(1, 2), [evil])
    shows = 'srun() { printf \'%s\\n\' "$EVDIT_IMPORT" "${@:8:1}"; }\nscontrol() { echo here; }\n'
    shown = subprocess.run(["bash", "-c", shows + text], capture_output=True, text=True, env={"SLURM_JOB_ID": "1"})
    assert shown.stdout == f"{evil}\n{evil}\n" and not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match="cannot stand in a job script, expected printable characters"):
        script(Job(1, 2), ["/a\n#SBATCH --uid=0"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus-per-node", "1"], "--nodes and --gpus-per-node make one GPU, expected two or more"),
        ([], "--engine slurm needs --gpus-per-node"),
        (["--gpus-per-node", "2", "--time", "1:00\n#SBATCH --uid=0"], "--time is .*, expected HH:MM:SS"),
        (["--gpus-per-node", "2", "--time", "60"], "--time is '60', expected HH:MM:SS"),
        (["--gpus-per-node", "2", "--partition", "a b"], "--partition is 'a b', expected a name of letters"),
        (["--gpus-per-node", "2", "--partition", "--wrap=x"], "--partition is '--wrap=x', expected a name"),
        (["--gpus-per-node", "2", "--account", "$(id)"], "--account is '.*', expected a name of letters"),
        (["--gpus-per-node", "2", "--devices", "0,1"], "--devices is given with --engine slurm, expected --engine local or ray"),
    ],
)  # fmt: skip
def test_what_slurm_would_not_take_is_refused(capsys, options, said):
    options = [f"{a}={b}" for a, b in zip(options[::2], options[1::2], strict=True)]
    with pytest.raises(ValueError, match=said):
        printed(capsys, *options)


def test_a_step_of_another_script_says_so(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    for name in ("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match="SLURM does not say SLURM_NTASKS, .* to this worker, expected a rank that srun"
    ):
        settings_from_slurm()


@pytest.mark.skipif(
    shutil.which("sbatch") is None, reason="NO SBATCH: the job script was not read by SLURM's own parser"
)
def test_slurms_own_parser_takes_the_script(capsys, tmp_path, monkeypatch):
    """It reads the options before it asks the controller, which is not there; a wrong one it names instead."""
    (tmp_path / "slurm.conf").write_text(CONFIGURATION)
    if "SLURM_CONF" not in os.environ:
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    options = ("--nodes=2", "--gpus-per-node=4", "--time=1-02:00:00", "--partition=gpu", "--account=mine")
    text = printed(capsys, *options)

    def said(script):
        answer = subprocess.run(["sbatch", "--test-only"], input=script, text=True, capture_output=True, timeout=60)
        return answer.stderr

    assert re.search("Unable to contact slurm controller|allocation failure: .*connect", said(text)), said(text)
    for wrong in ("--time=x", "--nodes=x", "--ntasks-per-node=x", "--no-such=1"):
        name = wrong.split("=")[0]
        changed = (
            re.sub(f"{name}=.*", wrong, text, count=1)
            if name in text
            else text.replace("#SBATCH", f"#SBATCH {wrong}\n#SBATCH", 1)
        )
        assert not re.search("contact slurm controller", said(changed)), (wrong, said(changed))
