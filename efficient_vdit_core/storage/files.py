"""Writes files so that nothing is lost: refused early where it cannot work, and whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import time
import uuid
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..limits.quote import named, quoted, reason

NAME_BYTES = 255  # of a file's name, not characters: what Linux, macOS and Windows have in common
MAX_NUMBER = 99_999
# With its writer's machine and number, which those of earlier versions lack.
_PART = re.compile(r"\.evdit-(?:([0-9a-f]{8})-([0-9a-f]{1,8})-)?[0-9a-f]{12}\.\w+")
_FORGOTTEN = 3600.0  # seconds without a write, after which nobody is writing a part any more


def check_writable_file(path: str | Path) -> Path:
    """Raises ValueError if no file can be written at `path`; called before the long work, so touches nothing."""
    path = Path(path)
    name = quoted(str(path), 120)
    try:
        size = len(os.fsencode(path.name))
    except UnicodeEncodeError:
        raise ValueError(
            f"Cannot write {name}: half a surrogate pair stands for no letter; choose another name."
        ) from None
    if size > NAME_BYTES:
        raise ValueError(f"Cannot write {name}: its name has {size} bytes, at most {NAME_BYTES} fit; shorten it.")
    if path.is_dir():
        raise ValueError(f"Cannot write {name}: it is a folder; name a file in it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"Cannot write {name}: it is a device or a pipe, and would be replaced; name a file.")
    real = Path(os.path.realpath(path)).parent  # where a symbolic link leads to
    folder = quoted(str(real if path.is_symlink() else path.parent), 120)
    if not real.is_dir():
        raise ValueError(f"Cannot write {name}: the folder {folder} does not exist; create it first.")
    if not os.access(real, os.W_OK):
        raise ValueError(f"Cannot write {name}: no permission in {folder}; choose another folder.")
    return path


def can_be_path(text: str) -> bool:
    """Whether a file system could hold this path; others fail with an error of the system's, wherever they are used."""
    try:
        return "\0" not in text and all(len(os.fsencode(part)) <= NAME_BYTES for part in Path(text).parts)
    except UnicodeEncodeError:
        return False


@contextmanager
def whole_file(path: str | Path, ending: str = ".tmp", *, new: bool = False) -> Iterator[Path]:
    """A hidden file beside ``path`` to write; it takes the place of ``path`` at the end, once it is on the disk.

    ``ending`` is for writers that choose the format by it. With ``new`` a file of that name is left alone and
    FileExistsError raised.
    Where writing fails (a full disk, Ctrl-C) a file of that name stays as it was, and nothing else is left behind; what
    a killed process left is removed at the next write beside it. Where ``path`` is a symbolic link, all this is so of the file
    that it leads to. Who may read and write a file that is replaced may also do so with the new one, and nobody else meanwhile.
    """
    path = Path(os.path.realpath(path))
    _remove_forgotten(path.parent)
    part = path.with_name(f".evdit-{_machine()}-{os.getpid():x}-{uuid.uuid4().hex[:12]}{ending}")
    try:
        before = path.stat().st_mode if path.is_file() else None
        allowed = 0o666 if before is None else before & 0o777 | 0o600  # the writer's own; the umask takes from it
        os.close(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, allowed))
        mode = part.stat().st_mode if before is None else before
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        part.chmod(mode)  # some writers, such as safetensors', make their own file, which nobody else may read
        if new:
            _name_once(part, path)
        else:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str, *, new: bool = False) -> None:
    """Writes `text` as UTF-8; a file of that name is replaced only once the new one is whole, or with ``new`` kept."""
    write_bytes(path, text.encode(errors="replace"), new=new)  # half a surrogate pair becomes a question mark


def write_bytes(path: str | Path, data: bytes, *, new: bool = False) -> None:
    """Writes `data`; a file of that name is replaced only once the new one is whole, or with ``new`` kept."""
    with whole_file(path, new=new) as part:
        part.write_bytes(data)


def write_numbered(folder: Path, prefix: str, text: str, *, beside: Sequence[Path] = ()) -> str:
    """Writes ``PREFIX_00001.json``, or under the next number that is free there and in the folders ``beside``, and returns the
    name. Overwrites nothing, and takes the name together with the whole content: a process that is killed leaves no empty file.

    Raises ValueError where ``prefix`` is more than a plain file name.
    """
    if not re.fullmatch(r"\w[\w .-]{0,99}", prefix):
        raise ValueError(
            f"filename_prefix is {quoted(prefix)}, expected a plain name of up to 100 letters, digits, spaces, dots, dashes or "
            "underscores that begins with a letter or digit: these files are saved in one folder."
        )
    size, room = len(prefix.encode()), NAME_BYTES - len(f"_{MAX_NUMBER}.json")
    if size > room:
        raise ValueError(
            f"filename_prefix is {quoted(prefix)}, {size} bytes in UTF-8, expected at most {room}: a letter that is not "
            "Latin takes two to four. Shorten it."
        )
    for number in range(1, MAX_NUMBER + 1):
        path = folder / f"{prefix}_{number:05}.json"
        if any((place / path.name).exists() for place in (folder, *beside)):
            continue
        with suppress(FileExistsError):  # another process was faster
            write_text(path, text, new=True)
            return path.name
    raise ValueError(
        f"All {MAX_NUMBER:,} names {quoted(prefix + '_00001.json')} and so on are taken. Choose another prefix."
    )


def write_torch(path: str | Path, state: Any) -> None:
    """Writes ``torch.save``'s form of `state`, whole; OSError where there is no room, which PyTorch calls otherwise."""
    import torch

    try:
        with whole_file(path) as part:
            torch.save(state, part)
    except RuntimeError as error:
        raise OSError(
            f"{named(Path(path).name)} could not be written ({reason(error)}). Make room there and start the same command again."
        ) from error


def read_torch(path: str | Path, advice: str, *, mmap: bool = False) -> Any:
    """What a file of ``torch.save`` holds: tensors and plain containers only, never code. ValueError ends with
    ``advice``."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # PyTorch names a broken file in a dozen ways
        raise ValueError(
            f"{named(Path(path).name)} cannot be read: it is damaged, half written, or holds more than tensors, which "
            f"this project never unpickles. {advice}"
        ) from error


def _name_once(part: Path, path: Path) -> None:
    """Gives a finished part its name, unless there is a file of that name; both in one step of the file system."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # no hard links, as on exFAT
        if path.exists():
            raise FileExistsError(path) from None
        os.rename(part, path)


def _remove_forgotten(folder: Path) -> None:
    """Parts of a process that was killed: each may be as large as a checkpoint."""
    now = time.time()
    with suppress(OSError):  # the folder is not there or not readable: the write itself says so
        for entry in os.scandir(folder):
            with suppress(OSError):  # another process removes it too
                found = _PART.fullmatch(entry.name)
                if (
                    found
                    and now - entry.stat(follow_symlinks=False).st_mtime > _FORGOTTEN
                    and not _is_written(*found.groups())
                ):
                    os.unlink(entry.path)


def _is_written(machine: str | None, process: str | None) -> bool:
    """Whether the writer that a part's name tells still runs here: it may stand still for hours, as in a suspended laptop.
    Windows removes no open file."""
    if process is None or machine != _machine() or os.name == "nt":
        return False
    try:
        os.kill(int(process, 16), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def _machine() -> str:
    return f"{zlib.crc32(platform.node().encode(errors='replace')):08x}"
