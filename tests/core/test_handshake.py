"""Who connects proves the secret, and has it proved: no stranger comes in, and none passes for the pool."""

import socket
import threading
import time

import pytest

from efficient_vdit_core.parallel.pool.handshake import DIGEST, NONCE, WrongSecret, admit, connect
from efficient_vdit_core.parallel.pool.messages import ConnectionEnded, listen, ticks
from efficient_vdit_core.parallel.pool.secret import new_secret


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


def test_a_question_turned_back_on_another_client_opens_nothing():
    """A stranger on the port of a pool that is gone, to which two ranks come: it asks the second what it must prove to the
    first."""
    listener, secret, refused = listen("127.0.0.1"), new_secret(), []

    def client():
        try:
            connect(*listener.getsockname(), secret, timeout=5).close()
        except WrongSecret as error:
            refused.append(str(error))

    every = [threading.Thread(target=client) for _ in range(2)]
    for thread in every:
        thread.start()
    (first, _), (second, _) = listener.accept(), listener.accept()
    first.sendall(b"0" * NONCE)
    question = _all(first, NONCE + DIGEST)[:NONCE]
    second.sendall(question)
    answer = _all(second, NONCE + DIGEST)[NONCE:]
    for sock in (first, second):
        sock.sendall(answer)
    for thread in every:
        thread.join(5)
    assert refused == ["what listens there does not know the secret of the pool"] * 2
    for sock in (first, second, listener):
        sock.close()


def test_a_client_that_is_asked_its_own_question_back_is_not_fooled():
    """Nor may its own proof come back as the pool's."""
    listener = listen("127.0.0.1")

    def mirror():
        sock, _ = listener.accept()
        sock.sendall(b"0" * NONCE)
        sock.sendall(_all(sock, NONCE + DIGEST)[NONCE:])
        sock.recv(1)
        sock.close()

    threading.Thread(target=mirror, daemon=True).start()
    with pytest.raises(WrongSecret, match="does not know the secret"):
        connect(*listener.getsockname(), new_secret(), timeout=5)
    listener.close()


def test_cancel_is_heard_while_the_other_end_is_silent():
    listener = listen("127.0.0.1")

    def cancel():
        raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        connect(*listener.getsockname(), new_secret(), timeout=60, poll=cancel)
    assert time.monotonic() - begin < 2.0
    with pytest.raises(ConnectionEnded, match="has not proved the secret in 1 s"):
        connect(*listener.getsockname(), new_secret(), timeout=1.0)
    listener.close()


def _all(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += sock.recv(size - len(data))
    return data
