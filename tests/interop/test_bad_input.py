"""What bad input gets: a clear error, or a closed connection and a log line, and nobody else notices anything."""

import os
import socket
import struct
import subprocess
import sys
import threading
import time

import pytest
from peers import START, Client, RemoteError, Server, connect, free_port
from ZODB.Connection import TransactionMetaData
from ZODB.FileStorage import FileStorage as ZODBFileStorage
from ZODB.utils import z64

import zeo_rs


@pytest.fixture(scope="module")
def server():
    with Server("rust", "Z5") as server:
        yield server


@pytest.fixture(scope="module")
def other(server):
    """A client that must not notice anything."""
    with Client("zeo", server.address) as client:
        client.set("other", 0)
        yield client


def frame(payload):
    return struct.pack(">I", len(payload)) + payload


def receive_all(sock):
    got = b""
    try:
        while piece := sock.recv(65536):
            got += piece
    except ConnectionResetError:
        pass
    return got


def resident(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))


REGISTER = frame(b"Z5") + frame(
    # (1, False, 'register', ('1', False))
    b"\x80\x03(K\x01\x89X\x08\x00\x00\x00registerq\x00X\x01\x00\x00\x001q\x01\x89\x86q\x02tq\x03."
)

HOSTILE = {
    "no ZEO": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "another protocol": frame(b"Z9"),
    "a huge frame": struct.pack(">I", 0xFFFF_FFF0) + b"x" * 1000,
    "a huge frame after the handshake": frame(b"Z5") + struct.pack(">I", 0x7FFF_FFF0) + b"x" * 1000,
    "garbage": REGISTER + frame(os.urandom(200)),
    "an empty message": REGISTER + frame(b""),
    "a pickle that is no message": REGISTER + frame(b"\x80\x03K\x01."),
    "a pickle with a global": REGISTER + frame(b"\x80\x03(K\x02\x89cos\nsystem\nX\x04\x00\x00\x00true\x85Rtq\x00."),
    "a nested pickle": REGISTER + frame(b"\x80\x03" + b"(" * 200_000 + b"t" * 200_000 + b"."),
    "an announced length": REGISTER + frame(b"\x80\x03B\xff\xff\xff\x7f."),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_peer(server, other, what):
    before = resident(server.process.pid)
    logged = len(server.log())
    with connect(server.address) as sock:
        peer = "%s:%s" % sock.getsockname()
        sock.sendall(HOSTILE[what])
        # it is closed by the server, whatever it answered before
        receive_all(sock)
    other.set("other", what)
    assert other.get("other") == what
    assert server.process.poll() is None
    assert resident(server.process.pid) - before < 50_000_000
    if "garbage" not in what and "HTTP" not in what:
        # written by a thread of its own
        deadline = time.monotonic() + START
        while peer not in server.log()[logged:]:
            assert time.monotonic() < deadline, f"no log line names {peer}"
            time.sleep(0.01)


def test_truncated_frame(server, other):
    with connect(server.address) as sock:
        sock.sendall(REGISTER + struct.pack(">I", 100) + b"only a part")
    other.set("other", "after")
    assert other.get("other") == "after"


def test_a_global_is_not_called(server, tmp_path):
    """A pickle whose global would create a file: nothing is called."""
    target = tmp_path / "called"
    command = f"touch {target}".encode()
    call = b"cposix\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85R"
    with connect(server.address) as sock:
        sock.sendall(REGISTER + frame(b"\x80\x03(K\x02\x89" + call + b"tq\x00."))
        receive_all(sock)
    assert not target.exists()


@pytest.mark.parametrize("kind", ["zeo", "rust"])
def test_unknown_storage(server, kind):
    for wait_timeout in (1, 4, 16, 60):
        with pytest.raises(RemoteError) as caught:
            Client(kind, server.address, storage="nope", wait_timeout=wait_timeout).close()
        if kind == "zeo" or "nope" in caught.value.text:
            return
    raise caught.value


def test_address_nobody_listens_on():
    port = free_port()
    with pytest.raises(Exception) as caught:
        zeo_rs.ClientStorage(("127.0.0.1", port), wait_timeout=1)
    assert "ClientDisconnected" in [c.__name__ for c in type(caught.value).__mro__]
    assert str(port) in str(caught.value)


def test_server_that_speaks_no_zeo():
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            with sock:
                sock.sendall(b"220 smtp.example.org ESMTP\r\n" * 10)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        with pytest.raises(Exception) as caught:
            zeo_rs.ClientStorage(listener.getsockname(), wait_timeout=2)
        assert "ClientDisconnected" in [c.__name__ for c in type(caught.value).__mro__]
    finally:
        listener.close()


# -- starting a server


def runzeo(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "zeo_rs.runzeo", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr


def test_port_in_use(server, tmp_path):
    status, text = runzeo("-a", "%s:%s" % server.address, "-f", tmp_path / "Data.fs")
    assert status == 2 and "in use" in text and str(server.address[1]) in text


def test_unix_socket_in_use_and_stale(tmp_path):
    with Server("rust", unix=True) as server:
        status, text = runzeo("-a", server.address, "-f", tmp_path / "Data.fs")
        assert status == 2 and "in use" in text
        # one that nobody listens on is in nobody's way
        server.kill()
        assert os.path.exists(server.address)
        server.start()
        assert server.stop() == 0
        assert not os.path.exists(server.address)


def test_no_data_fs(tmp_path):
    path = tmp_path / "Data.fs"
    path.write_bytes(b"not a database at all, but long enough to be one")
    status, text = runzeo("-a", "127.0.0.1:0", "-f", path)
    assert status == 2 and str(path) in text
    assert path.read_bytes() == b"not a database at all, but long enough to be one"


@pytest.mark.parametrize("remove_lock_file", [False, True])
def test_data_fs_of_another_process(server, remove_lock_file):
    """Also when somebody deleted the lock file by hand."""
    if remove_lock_file:
        os.remove(f"{server.data_fs()}.lock")
    status, text = runzeo("-a", "127.0.0.1:0", "-f", server.data_fs())
    assert status == 2 and "lock" in text.lower()
    if not remove_lock_file:
        assert str(server.process.pid) in text


def test_data_fs_open_in_zodb(tmp_path):
    storage = ZODBFileStorage(str(tmp_path / "Data.fs"))
    try:
        status, text = runzeo("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs")
        assert status == 2 and str(os.getpid()) in text
    finally:
        storage.close()


def test_damaged_data_fs(tmp_path):
    path = tmp_path / "Data.fs"
    storage = zeo_rs.FileStorage(str(path))
    for _ in range(5):
        _commit(storage)
    storage.close()
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)
    os.remove(f"{path}.index")
    status, text = runzeo("-a", "127.0.0.1:0", "-f", path)
    assert status == 2 and str(path) in text and path.read_bytes() == content


def _commit(storage):
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(storage.new_oid(), z64, b"x" * 100, "", t)
    storage.tpc_vote(t)
    storage.tpc_finish(t)
