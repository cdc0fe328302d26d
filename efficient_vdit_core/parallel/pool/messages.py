"""Messages between ComfyUI and the workers: JSON and raw tensors over a socket whose two ends have proved the same
secret.

No pickle: a message can only say what JSON and plain tensor bytes can say.
"""

from __future__ import annotations

import hmac
import json
import math
import secrets
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAGIC = b"EVDT"
NONCE, DIGEST = 32, 32
HANDSHAKE_SECONDS = 10.0
MAX_JSON, MAX_TENSORS = 2**26, 2**36
_HEADER = struct.Struct(">4sQQ")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
}

Tensors = dict[str, Tensor]
Tick = Callable[[], None]


class ConnectionEnded(ConnectionError):
    """The other end is gone."""


class Connection:
    """A socket that has been let in. Several threads may send; one receives.

    Where the socket has a timeout, ``tick`` is called whenever it has passed without a byte, and may raise: between
    messages that does no harm, within one it leaves the connection ``torn``, of no more use.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.lock, self.torn = sock, threading.Lock(), False
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: dict[str, Any], tensors: Tensors | None = None, tick: Tick | None = None) -> None:
        """Raises ConnectionEnded where nobody listens any more, ValueError for a tensor of a dtype that cannot
        travel."""
        tensors = {name: x.detach().to("cpu").contiguous() for name, x in (tensors or {}).items()}
        forms = {name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in tensors.items()}
        strange = [kind for kind, _ in forms.values() if kind not in _DTYPES]
        if strange:
            raise ValueError(
                f"A tensor of {strange[0]} cannot be sent to the workers, expected one of {', '.join(_DTYPES)}. Convert it."
            )
        text = json.dumps({**message, "_tensors": forms}).encode()
        size = sum(x.numel() * x.element_size() for x in tensors.values())
        with self.lock:
            self.torn = True
            _write(self.sock, _HEADER.pack(MAGIC, len(text), size) + text, tick)
            for x in tensors.values():
                _write(self.sock, x.flatten().view(torch.uint8).numpy().data, tick)
            self.torn = False

    def receive(self, tick: Tick | None = None) -> tuple[dict[str, Any], Tensors]:
        """The next message; waits for it. Raises ConnectionEnded, or ValueError for what is no message of ours."""
        first = _read(self.sock, 1, tick)
        self.torn = True
        magic, text_size, size = _HEADER.unpack(bytes(first) + bytes(_read(self.sock, _HEADER.size - 1, tick)))
        if magic != MAGIC or text_size > MAX_JSON or size > MAX_TENSORS:
            raise ValueError(
                "The other end of the workers' connection does not speak their protocol. Stop what uses that port."
            )
        message = json.loads(bytes(_read(self.sock, text_size, tick)))
        blob, tensors, done = _read(self.sock, size, tick), {}, 0
        self.torn = False
        for name, (kind, shape) in message.pop("_tensors").items():
            dtype = _DTYPES[kind]
            part = bytearray(
                blob[done : done + math.prod(shape) * dtype.itemsize]
            )  # a copy: it must begin at a whole element
            tensors[name] = torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape, dtype=dtype)
            done += len(part)
        return message, tensors

    def close(self) -> None:
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.sock.close()


def _read(sock: socket.socket, size: int, tick: Tick | None = None) -> memoryview:
    data = memoryview(bytearray(size))
    done = 0
    while done < size:
        count = _patiently(lambda: sock.recv_into(data[done:]), tick)  # noqa: B023 - called at once
        if not count:
            raise ConnectionEnded("the other end has closed the connection")
        done += count
    return data


def _write(sock: socket.socket, data: Any, tick: Tick | None) -> None:
    view = memoryview(data)
    while view:
        view = view[_patiently(lambda: sock.send(view), tick) :]  # noqa: B023 - called at once


def _patiently(transfer: Callable[[], int], tick: Tick | None) -> int:
    """The bytes that ``transfer`` moved; it is tried again after each timeout of the socket, while ``tick`` does not
    raise."""
    while True:
        try:
            return transfer()
        except OSError as error:
            if tick is None or not isinstance(error, TimeoutError):
                raise ConnectionEnded(str(error)) from None
        tick()


def new_secret() -> str:
    """A secret of 256 bits."""
    return secrets.token_hex(32)


def connect(host: str, port: int, secret: str, *, timeout: float = HANDSHAKE_SECONDS) -> Connection:
    """Open a connection and prove the secret, and have it proved. Raises ConnectionError where nobody or a stranger
    answers."""
    sock = socket.create_connection((host, port), timeout=timeout)
    try:
        theirs, mine = bytes(_read(sock, NONCE)), secrets.token_bytes(NONCE)
        sock.sendall(mine + _proof(secret, b"client", theirs, mine))
        if not hmac.compare_digest(bytes(_read(sock, DIGEST)), _proof(secret, b"server", theirs, mine)):
            raise ConnectionEnded("what listens there does not know the secret of the pool")
    except BaseException:
        sock.close()
        raise
    return Connection(sock)


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of ``host``."""
    return socket.create_server((host, 0))


def admit(sock: socket.socket, secret: str) -> Connection | None:
    """The connection that ``sock``, just accepted, becomes where its other end knows the secret; None and closed where
    not."""
    sock.settimeout(HANDSHAKE_SECONDS)
    try:
        mine = secrets.token_bytes(NONCE)
        sock.sendall(mine)
        answer = bytes(_read(sock, NONCE + DIGEST))
        theirs, proof = answer[:NONCE], answer[NONCE:]
        if not hmac.compare_digest(proof, _proof(secret, b"client", mine, theirs)):
            sock.close()
            return None
        sock.sendall(_proof(secret, b"server", mine, theirs))
    except OSError:
        sock.close()
        return None
    return Connection(sock)


def _proof(secret: str, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(bytes.fromhex(secret), side + server_nonce + client_nonce, "sha256")
