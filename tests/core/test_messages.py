"""Messages between ComfyUI and workers: whole, plain, and only for those who know the secret."""

import socket
import threading
import time

import pytest
import torch

from efficient_vdit_core.parallel.pool.handshake import admit, connect
from efficient_vdit_core.parallel.pool.messages import Connection, ConnectionEnded, Late, listen, ticks
from efficient_vdit_core.parallel.pool.secret import new_secret

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "odd": torch.arange(7, dtype=torch.uint8),
    "wide": torch.randn(2, 3).t(),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "truth": torch.tensor([True, False]),
}
TENSORS["twice"] = TENSORS["half"]  # as where both prompts are one


@pytest.fixture
def pair():
    """A client's and a server's end, both let in."""
    secret, listener = new_secret(), listen("127.0.0.1")
    found = []
    thread = threading.Thread(target=lambda: found.append(admit(listener.accept()[0], secret, ticks(5))))
    thread.start()
    client = connect(*listener.getsockname(), secret)
    thread.join(5)
    yield client, found[0]
    client.close()
    found[0].close()
    listener.close()


def test_what_is_sent_arrives(pair):
    client, server = pair
    client.send({"do": "step", "list": [1, None, "ü"]}, TENSORS)
    message, tensors = server.receive()
    assert message == {"do": "step", "list": [1, None, "ü"]}
    assert set(tensors) == set(TENSORS)
    for name, x in TENSORS.items():
        assert tensors[name].dtype == x.dtype and tensors[name].shape == x.shape and torch.equal(tensors[name], x), name


def test_the_end_of_the_other_side_is_noticed(pair):
    client, server = pair
    client.close()
    with pytest.raises(ConnectionEnded):
        server.receive()


def test_a_dtype_that_cannot_travel_is_refused(pair):
    with pytest.raises(ValueError, match="A tensor of complex64 cannot be sent"):
        pair[0].send({}, {"x": torch.zeros(2, dtype=torch.complex64)})


def test_what_speaks_another_protocol_is_refused():
    ours, theirs = socket.socketpair()
    theirs.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    with pytest.raises(ValueError, match="does not speak their protocol"):
        _received(ours)
    ours.close()
    theirs.close()


def _received(sock):
    # A pair of Unix sockets has no TCP option to set.
    connection = Connection.__new__(Connection)
    connection.sock, connection.lock = sock, threading.Lock()
    return connection.receive()


def fault_within(seconds, call):
    """What ``call`` raises, in that time."""
    begin = time.monotonic()
    with pytest.raises((ConnectionEnded, Late)) as caught:
        call()
    assert time.monotonic() - begin < seconds
    return caught.type


def test_one_who_does_not_read_is_given_up(pair):
    """A worker that stands still, and more is sent to it than the connection holds."""
    client, _ = pair
    client.sock.settimeout(0.1)
    x = {"x": torch.zeros(2**24)}
    assert fault_within(3.0, lambda: client.send({"do": "step"}, x, ticks(0.5))) is Late and client.torn


@pytest.mark.parametrize("part", [1, 10, 30, -1])
def test_the_rest_of_a_message_is_not_waited_for_for_ever(pair, part):
    client, server = pair
    whole, other = socket.socketpair()
    sender = Connection.__new__(Connection)
    sender.sock, sender.lock, sender.torn = whole, threading.Lock(), False
    sender.send({"do": "step"}, {"x": torch.zeros(100)})
    client.sock.sendall(other.recv(2**16)[:part])
    server.sock.settimeout(0.1)
    assert fault_within(3.0, lambda: server.receive(ticks(0.5))) is Late and server.torn
    whole.close()
    other.close()


def test_the_listener_is_on_loopback_and_the_port_is_the_systems():
    first, second = listen("127.0.0.1"), listen("127.0.0.1")
    assert first.getsockname()[0] == "127.0.0.1" and first.getsockname()[1] != second.getsockname()[1]
    first.close()
    second.close()
