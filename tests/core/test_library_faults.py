"""What parts of the standard library and of PyTorch would do in the place of ours. Each fault is one that a pool must
bear; its own test, of ours, is named. A test that fails here says that the library has mended it, and may take over."""

import contextlib
import hmac
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge

import pytest
import torch
import torch.distributed as dist
from pools import children, gone, until
from safetensors.torch import save

from efficient_vdit_core.parallel.pool.open_ports import open_beyond_loopback

KEY = b"k" * 32
BLOCKED_SECONDS = 1.0


def pair():
    """The library's connections over both ends of a TCP connection, and the sockets, which end them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        first = socket.create_connection(listener.getsockname())
        second, _ = listener.accept()
    return Connection(os.dup(first.fileno())), Connection(os.dup(second.fileno())), first, second


def blocks(call, *sockets):
    """Whether ``call`` is still at it after a while; the sockets are then shut down, so that it ends."""
    thread = threading.Thread(target=_quietly, args=(call,))
    thread.start()
    thread.join(BLOCKED_SECONDS)
    waits = thread.is_alive()
    for sock in sockets:
        sock.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()
    return waits


def _quietly(call):
    with contextlib.suppress(OSError, EOFError, AuthenticationError):
        call()


def test_connection_waits_for_ever_for_one_who_does_not_read():
    """A worker that stands still; Cancel and the time-out would not be heard. Of ours: test_messages."""
    ours, _, *sockets = pair()
    assert blocks(lambda: ours.send_bytes(bytes(2**26)), *sockets)


def test_connection_waits_for_ever_for_the_rest_of_a_message():
    """And ``poll`` has said that there is one. Of ours: test_messages."""
    ours, _, first, second = pair()
    second.sendall(b"\0\0\1\0half")
    assert ours.poll(5) and blocks(ours.recv_bytes, first, second)


def test_connection_has_no_timeout_of_the_sockets():
    """A socket with one does not wait at all: a long message breaks off where the buffers are full."""
    ours, _, first, _ = pair()
    first.settimeout(0.1)
    with pytest.raises(BlockingIOError):
        ours.send_bytes(bytes(2**26))


def test_one_silent_stranger_shuts_the_listener():
    """Its accept asks for the secret itself. Of ours: test_pool_security."""
    with Listener(("127.0.0.1", 0), authkey=KEY) as listener:
        stranger = socket.create_connection(listener.address)
        assert blocks(listener.accept, stranger)


def test_its_handshake_can_be_turned_back_on_those_who_know_the_secret():
    """A stranger who has the port of a pool that is gone asks one client what another one has asked. Of ours:
    test_handshake."""
    first, mine, *_ = pair()
    second, mine_too, *_ = pair()
    let_in = []

    def client(connection):
        answer_challenge(connection, KEY)  # as Client does
        deliver_challenge(connection, KEY)
        let_in.append(True)

    for connection in (first, second):
        threading.Thread(target=_quietly, args=(lambda c=connection: client(c),), daemon=True).start()
    mine.send_bytes(b"#CHALLENGE#" + (b"{sha256}" if sys.version_info >= (3, 12) else b"") + os.urandom(40))
    mine.recv_bytes()
    mine.send_bytes(b"#WELCOME#")
    mine_too.send_bytes(mine.recv_bytes())  # the first one's question, to the second
    mine.send_bytes(mine_too.recv_bytes())
    assert mine.recv_bytes() == b"#WELCOME#"
    until(lambda: let_in, seconds=5.0)


def test_its_handshake_takes_md5():
    """Which hosts under FIPS do not have, and which no new protocol should."""
    server, mine, *_ = pair()
    found = []
    threading.Thread(target=lambda: found.append(deliver_challenge(server, KEY)), daemon=True).start()
    question = mine.recv_bytes().removeprefix(b"#CHALLENGE#")
    mine.send_bytes(hmac.digest(KEY, question, "md5"))
    assert mine.recv_bytes() == b"#WELCOME#"


def test_socketserver_spins_where_no_file_is_left():
    """A connection that it cannot take stays; it asks for it again and again. Of ours: test_pool_security."""
    code = """
import os, resource, socketserver, threading, time
class Handler(socketserver.BaseRequestHandler):
    def handle(self): time.sleep(60)
server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep(0.2)
most = max(int(fd) for fd in os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
print(server.server_address[1], flush=True)
input()
begin, until = time.process_time(), time.monotonic() + 30  # on a busy machine it gets little time
while time.process_time() - begin < 0.2 and time.monotonic() < until:
    time.sleep(0.2)
print(time.process_time() - begin, flush=True)
os._exit(0)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as server:
        with socket.create_connection(("127.0.0.1", int(server.stdout.readline()))):
            print(file=server.stdin, flush=True)
            assert float(server.stdout.readline()) >= 0.2


def test_pytorchs_store_listens_on_all_interfaces():
    """Whatever host it is given. Of ours: test_slurm, test_ray."""
    before = open_beyond_loopback(os.getpid())
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    assert set(open_beyond_loopback(os.getpid())) - set(before) == {store.port}


def test_torchruns_agent_leaves_its_ranks_behind():
    """Killed as the system kills what takes too much memory. Of ours: test_pool_ends."""
    code = """
import sys, tempfile, time
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
ranks = start_processes("rank", sys.executable, {0: ("-c", "import time; time.sleep(60)")}, {0: {}},
                        DefaultLogsSpecs(tempfile.mkdtemp()))
print("started", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) as agent:
        assert agent.stdout.readline() == "started\n"
        (rank,) = children(agent.pid)
        agent.kill()
    left = not gone([rank], seconds=3.0)
    if left:
        os.kill(rank, signal.SIGKILL)
    assert left


def test_safetensors_sends_no_tensor_under_two_names():
    """As where both prompts are one. Of ours: test_messages."""
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        save({"first": x, "second": x})
