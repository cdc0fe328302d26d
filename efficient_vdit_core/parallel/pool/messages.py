"""Messages between ComfyUI and the workers: JSON and raw tensors over a socket whose two ends have proved the same
secret. No pickle: a message can only say what JSON and plain tensor bytes can say.

Not multiprocessing's Connection: once a message has begun it waits without end for one who stands still, so that neither
Cancel nor a time-out would be heard. Not safetensors, which sends no tensor under two names
(tests/core/test_library_faults.py).
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MAGIC = b"EVDT"
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


class Late(Exception):
    """The time is up."""


def ticks(seconds: float, poll: Callable[[], None] | None = None) -> Tick:
    """A function that calls ``poll``, and raises Late once ``seconds`` have passed since now."""
    end = time.monotonic() + seconds

    def tick() -> None:
        if poll is not None:
            poll()
        if time.monotonic() > end:
            raise Late

    return tick


class Connection:
    """A socket that has been let in. Several threads may send; one receives.

    Where the socket has a timeout, ``tick`` is called whenever it has passed without a byte, and between the parts of a
    message; it may raise: between messages that does no harm, within one it leaves the connection ``torn``, of no more
    use, as it is until the message's end.
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
            write(self.sock, _HEADER.pack(MAGIC, len(text), size) + text, tick)
            for x in tensors.values():
                write(self.sock, x.flatten().view(torch.uint8).numpy().data, tick)
            self.torn = False

    def receive(self, tick: Tick | None = None) -> tuple[dict[str, Any], Tensors]:
        """The next message; waits for it. Raises ConnectionEnded, or ValueError for what is no message of ours."""
        first = read(self.sock, 1, tick)
        self.torn = True
        magic, text_size, size = _HEADER.unpack(bytes(first) + bytes(read(self.sock, _HEADER.size - 1, tick)))
        if magic != MAGIC or text_size > MAX_JSON or size > MAX_TENSORS:
            raise ValueError(
                "The other end of the workers' connection does not speak their protocol. Stop what uses that port."
            )
        message = json.loads(bytes(read(self.sock, text_size, tick)))
        blob, tensors, done = read(self.sock, size, tick), {}, 0
        self.torn = False
        for name, (kind, shape) in message.pop("_tensors").items():
            dtype = _DTYPES[kind]
            # A copy: it must begin at a whole element.
            part = bytearray(blob[done : done + math.prod(shape) * dtype.itemsize])
            tensors[name] = torch.frombuffer(part, dtype=dtype).view(shape) if part else torch.empty(shape, dtype=dtype)
            done += len(part)
        return message, tensors

    def unread(self) -> bool:
        """Whether something lies here to be received, the end of the connection included."""
        timeout = self.sock.gettimeout()
        self.sock.settimeout(0.0)
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        finally:
            self.sock.settimeout(timeout)
        return True

    def close(self) -> None:
        hang_up(self.sock)
        self.sock.close()


def listen(host: str) -> socket.socket:
    """A listening socket on a free port of ``host``."""
    return socket.create_server((host, 0))


def hang_up(sock: socket.socket) -> None:
    """End the connection; whoever waits for a byte of it wakes up."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def read(sock: socket.socket, size: int, tick: Tick | None = None) -> memoryview:
    """The next ``size`` bytes, waited for as Connection does. Raises ConnectionEnded."""
    data = memoryview(bytearray(size))
    done = 0
    while done < size:
        if done and tick is not None:  # a byte now and then must not keep this end deaf
            tick()
        count = _patiently(lambda: sock.recv_into(data[done:]), tick)  # noqa: B023 - called at once
        if not count:
            raise ConnectionEnded("the other end has closed the connection")
        done += count
    return data


def write(sock: socket.socket, data: Any, tick: Tick | None) -> None:
    """Send all of ``data``. Raises ConnectionEnded."""
    view = memoryview(data)
    while view:
        view = view[_patiently(lambda: sock.send(view), tick) :]  # noqa: B023 - called at once
        if view and tick is not None:
            tick()


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
