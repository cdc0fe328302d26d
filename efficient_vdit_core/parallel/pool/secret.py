"""The secret that the ranks of a pool and ComfyUI prove to one another: never in a store, an argument or a variable.

A pool that is started here inherits it by a pipe. A pool that torchrun starts reads it from a file of the user's, made
once by the first rank or by `evdit workers --make-secret`, and copied by the user to the other machines.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from .private_files import private_folder, read_private, write_private


def new_secret() -> str:
    """A secret of 256 bits."""
    return secrets.token_hex(32)


def is_secret(text: object) -> bool:
    """Whether ``text`` is one, as new_secret makes them."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def secret_file() -> Path:
    """Where the secret of pools under torchrun lies on each machine."""
    return private_folder() / "secret"


def shared_secret(*, make: bool) -> str:
    """The secret in the user's file, which is made where there is none and ``make`` is on.

    Raises ValueError where there is none, or where others could have read it.
    """
    path = secret_file()
    if make and not path.exists():
        try:
            write_private(path, new_secret() + "\n", replace=False)
        except FileExistsError:
            pass  # another rank was faster
    text = (read_private(path) or "").strip()
    if is_secret(text):
        return text
    if path.exists():
        raise ValueError(
            f"{path} is no secret that only you can read, expected 64 hexadecimal digits and mode 0600. Delete it on every "
            "machine, make it anew with `evdit workers --make-secret`, and copy it to the others."
        )
    raise ValueError(
        f"This machine has no {path}. Copy that file, with its mode 0600, from the first machine of the pool; there "
        "`evdit workers --make-secret` makes it."
    )
