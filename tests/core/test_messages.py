"""Messages between ComfyUI and workers: whole, plain, and only for those who know the secret."""

import socket
import threading

import pytest
import torch

from efficient_vdit_core.parallel.pool.messages import Connection, ConnectionEnded, admit, connect, listen, ticks
from efficient_vdit_core.parallel.pool.secret import new_secret

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "odd": torch.arange(7, dtype=torch.uint8),
    "wide": torch.randn(2, 3).t(),
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "truth": torch.tensor([True, False]),
}


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


@pytest.mark.parametrize("liar", ["client", "server"])
def test_each_side_proves_the_secret(liar):
    listener, true, false = listen("127.0.0.1"), new_secret(), new_secret()
    refused = []

    def let_in():
        sock, _ = listener.accept()
        try:
            admit(sock, false if liar == "server" else true, ticks(5))
        except ConnectionEnded as error:
            refused.append(error)
        sock.close()

    thread = threading.Thread(target=let_in)
    thread.start()
    with pytest.raises(ConnectionError):
        connect(*listener.getsockname(), false if liar == "client" else true, timeout=5)
    thread.join(5)
    assert len(refused) == 1
    listener.close()


def test_the_listener_is_on_loopback_and_the_port_is_the_systems():
    first, second = listen("127.0.0.1"), listen("127.0.0.1")
    assert first.getsockname()[0] == "127.0.0.1" and first.getsockname()[1] != second.getsockname()[1]
    first.close()
    second.close()
