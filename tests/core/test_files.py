"""Files are whole or not there: also after kill -9, on a full disk, and under names that a disk cannot hold."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from efficient_vdit_core.storage.files import (
    check_writable_file,
    read_torch,
    whole_file,
    write_numbered,
    write_text,
    write_torch,
)

ROOT = Path(__file__).parents[2]
# Dies in the middle of a save, after the content was written and before it has its name.
KILLED = """
import os, signal, sys
from pathlib import Path
from efficient_vdit_core.storage import files
files.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
files.write_numbered(Path(sys.argv[1]), "plan", "{}")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kill -9 is POSIX's")
def test_a_killed_save_leaves_no_file_and_its_part_is_cleaned_after_an_hour(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGKILL
    (part,) = tmp_path.iterdir()
    assert part.name.startswith(".evdit-")
    assert write_numbered(tmp_path, "plan", "{}") == "plan_00001.json"
    assert part.exists(), "another process may be writing it"
    long_ago = time.time() - 3601
    os.utime(part, (long_ago, long_ago))
    mine = tmp_path / ".evdit-notes"
    mine.write_text("no part of ours")
    os.utime(mine, (long_ago, long_ago))
    assert write_numbered(tmp_path, "plan", "{}") == "plan_00002.json"
    assert not part.exists() and mine.exists()


def test_a_numbered_file_overwrites_nothing(tmp_path):
    (tmp_path / "a_00001.json").write_text("kept")
    assert write_numbered(tmp_path, "a", "new") == "a_00002.json"
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["kept", "new"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_takes_the_place_of_another(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda a, b: (_ for _ in ()).throw(PermissionError("no hard links here")))
    write_text(tmp_path / "a", "first", new=True)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a", "second", new=True)
    assert (tmp_path / "a").read_text() == "first" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("视" * 82, "246 bytes"),
        ("../a", "plain name"),
        ("", "plain name"),
        ("a" * 101, "plain name"),
        ("a\x00", "plain"),
    ],
)
def test_prefixes_that_no_disk_can_hold_are_refused(tmp_path, prefix, message):
    with pytest.raises(ValueError, match=message):
        write_numbered(tmp_path, prefix, "{}")
    assert not list(tmp_path.iterdir())


def test_the_longest_prefix_fits(tmp_path):
    assert write_numbered(tmp_path, "视" * 81, "{}").endswith("_00001.json")


def test_a_name_too_long_is_refused_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="300 bytes, at most 255"):
        check_writable_file(tmp_path / ("视" * 100))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names are POSIX's")
def test_a_pipe_or_a_device_is_refused_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", Path(os.devnull)):
        with pytest.raises(ValueError, match="it is a device or a pipe, and would be replaced; name a file"):
            check_writable_file(path)


@pytest.mark.skipif(os.name == "nt", reason="Windows knows of a file's mode only whether it is read-only")
@pytest.mark.parametrize("mode", [0o600, 0o666, 0o444])
def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path, mode):
    file = tmp_path / "a"
    file.write_text("old")
    file.chmod(mode)
    write_text(file, "new")
    assert file.read_text() == "new" and file.stat().st_mode & 0o777 == mode


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    resource = pytest.importorskip("resource")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written"):
            write_torch(tmp_path / "a.pt", list(range(10_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_half_a_torch_file_is_told_from_a_whole_one(tmp_path):
    write_torch(tmp_path / "a.pt", [1, 2])
    assert read_torch(tmp_path / "a.pt", "") == [1, 2]
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"a.pt cannot be read: it is damaged.*Delete it\.$"):
        read_torch(tmp_path / "a.pt", "Delete it.")


def test_a_symbolic_link_stays_one_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name in ("there", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "disk" / "there").write_text("old")
    for name in ("there", "new"):
        write_text(check_writable_file(tmp_path / name), name)
        assert (tmp_path / name).is_symlink() and (tmp_path / "disk" / name).read_text() == name
    (tmp_path / "gone").symlink_to(tmp_path / "none" / "gone")
    with pytest.raises(ValueError, match="the folder .*none' does not exist"):
        check_writable_file(tmp_path / "gone")


def test_nothing_is_left_where_writing_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_takes_in_between_is_left_to_it(tmp_path, monkeypatch):
    """It had none of the names yet when this one looked."""
    monkeypatch.setattr(Path, "exists", lambda self: False)
    names = [write_numbered(tmp_path, "a", text) for text in ("first", "second")]
    assert names == ["a_00001.json", "a_00002.json"] and (tmp_path / names[0]).read_text() == "first"


@pytest.mark.skipif(os.name == "nt", reason="no open file is removed there")
def test_a_writer_that_stood_still_for_long_keeps_its_file(tmp_path):
    """As in a suspended laptop, or on a share whose clock is behind; parts that nobody writes here are still removed, of earlier
    versions too."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    long_ago = time.time() - 4000
    with whole_file(tmp_path / "a.bin") as part:
        part.write_bytes(b"whole")
        mine = part.name.split("-")
        others = [
            "0" * 12,
            f"{mine[1]}-{gone.pid:x}-{'0' * 12}",
            f"{mine[1]}-ffffffff-{'0' * 12}",
            f"00000000-{mine[2]}-{'0' * 12}",
        ]
        for name in others:
            (tmp_path / f".evdit-{name}.tmp").touch()
        for file in tmp_path.iterdir():
            os.utime(file, (long_ago, long_ago))
        write_text(tmp_path / "b.txt", "another")
    assert (tmp_path / "a.bin").read_bytes() == b"whole" and sorted(os.listdir(tmp_path)) == ["a.bin", "b.txt"]


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_nobody_else_reads_a_private_file_while_it_is_written(tmp_path):
    path, before = tmp_path / "a.json", os.umask(0o022)
    try:
        path.touch(0o600)
        with whole_file(path) as part:
            modes = [part.stat().st_mode & 0o777]
        with whole_file(tmp_path / "b.json") as part:
            modes.append(part.stat().st_mode & 0o777)
    finally:
        os.umask(before)
    assert modes == [0o600, 0o644] and path.stat().st_mode & 0o777 == 0o600
