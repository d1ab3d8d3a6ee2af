"""What went wrong in the field, over real servers and clients: each test is a story of docs/stories.md."""

import contextlib
import os
import random
import signal
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import transaction
import ZEO.ClientStorage
import ZODB
import ZODB.blob
from BTrees.check import check
from BTrees.OOBTree import OOBTree
from peers import START, Client, Proxy, RemoteError, Server, connect
from persistent.mapping import PersistentMapping
from ZODB.Connection import TransactionMetaData
from ZODB.MappingStorage import MappingStorage
from ZODB.POSException import ConflictError, POSKeyError, StorageError, UndoError
from ZODB.utils import maxtid, p64, u64, z64

import zeo_rs
from zeo_rs import _zeo
from zeo_rs.exceptions import ClientDisconnected

CLIENTS = {"zeo": ZEO.ClientStorage.ClientStorage, "rust": zeo_rs.ClientStorage}
PAIRS = [("rust", "zeo", "Z5"), ("zeo", "rust", "M5"), ("rust", "rust", "M5")]


@pytest.fixture(params=PAIRS, ids=lambda p: f"{p[0]}-server-{p[1]}-client-{p[2]}")
def pair(request):
    """`serve(**options of Server)` and `open(address, **options of ClientStorage)`; everything is closed at the end."""
    kind, client, encoding = request.param
    with contextlib.ExitStack() as stack:

        def serve(**options):
            server = stack.enter_context(Server(kind, encoding, **options))
            # ZEO's server under uvloop does not always stop when asked to
            stack.callback(server.kill)
            return server

        def open_storage(address, **options):
            storage = CLIENTS[client](address, **{"wait_timeout": START} | options)
            stack.callback(storage.close)
            return storage

        yield SimpleNamespace(server=kind, client=client, serve=serve, open=open_storage, proxy=lambda address: stack.enter_context(Proxy(address)))


def until(true, what):
    deadline = time.monotonic() + START
    while not true():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.01)


def commit(storage, *stores):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    try:
        for oid, serial, data in stores:
            storage.store(oid, serial, data, "", txn)
        storage.tpc_vote(txn)
    except BaseException:
        storage.tpc_abort(txn)
        raise
    return storage.tpc_finish(txn)


def in_threads(*calls):
    """Runs them side by side; raises the first error."""
    errors = []

    def guarded(call):
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * START)
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "hangs"


# ---- A: ordering


def test_a_database_that_another_client_has_just_created(pair):
    """ZODB looks for the root as of `lastTransaction()`, which must not be from before the root was created."""
    if (pair.server, pair.client) != ("rust", "rust"):
        pytest.skip("ZEO's client does not ask, and ZEO's server now and then answers before it tells of a commit")
    server = pair.serve()
    proxy = pair.proxy(server.address)
    storage = pair.open(proxy.address)
    proxy.hold()
    ZODB.DB(pair.open(server.address))
    sent = proxy.sent

    def release():
        until(lambda: proxy.sent > sent, "a question to the server")
        proxy.release()

    def open_database():
        database = ZODB.DB(storage)
        with database.transaction() as connection:
            assert connection.root() == {}

    in_threads(release, open_database)


def test_an_object_that_was_not_there_is_seen_once_it_is(pair):
    server = pair.serve()
    one, two = pair.open(server.address), pair.open(server.address)
    oid = one.new_oid()
    for _ in range(2):
        with pytest.raises(POSKeyError):
            two.load(oid)
    tid = commit(one, (oid, z64, b"created"))
    until(lambda: two.lastTransaction() == tid, "the invalidation")
    assert two.load(oid)[:2] == (b"created", tid)


def test_old_revisions_are_the_same_from_the_cache_and_from_a_packed_server(pair):
    """A cached old revision may outlive a pack; it is never taken for one of another time."""
    server = pair.serve()
    warm, cold = pair.open(server.address), pair.open(server.address)
    oid, tids = warm.new_oid(), [z64]
    # ZODB's root, so that pack keeps the object
    record = b"\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03}X\x01\x00\x00\x00xX\x01\x00\x00\x00%ds."
    root = commit(warm, (z64, z64, b"\x80\x03cpersistent.mapping\nPersistentMapping\n.\x80\x03}X\x01\x00\x00\x00oC\x08" + oid + b"c__main__\nA\n\x86Qs."))
    for number in range(5):
        tids.append(commit(warm, (oid, tids[-1], record % number)))
    revisions = list(zip(tids[1:], [*tids[2:], None]))
    for tid, end in revisions:
        assert warm.loadBefore(oid, p64(u64(tid) + 1))[1:] == (tid, end)
    warm.pack(time.time() + 1, lambda data: [])
    for number, (tid, end) in enumerate(revisions):
        for storage in warm, cold:
            for before in (p64(u64(tid) + 1), end or maxtid):
                try:
                    found = storage.loadBefore(oid, before)
                except POSKeyError:
                    found = None
                if found is not None:
                    assert found[:2] == (record % number, tid)
    assert cold.load(oid)[:2] == warm.load(oid)[:2] == (record % 4, tids[-1])
    assert root < tids[1]


def test_nobody_sees_half_of_a_transaction_that_splits_buckets(pair):
    server = pair.serve()
    writing, reading = ZODB.DB(pair.open(server.address)), pair.open(server.address)
    with writing.transaction() as connection:
        connection.root()["tree"] = OOBTree()
        connection.root()["size"] = PersistentMapping(size=0)
    until(lambda: reading.lastTransaction() == writing.storage.lastTransaction(), "the tree")
    reading, done = ZODB.DB(reading), threading.Event()

    def write():
        try:
            manager = transaction.TransactionManager()
            connection = writing.open(manager)
            keys = [f"key {number}" for number in range(1200)]
            random.Random(0).shuffle(keys)
            for at in range(0, len(keys), 30):
                manager.begin()
                connection.root()["tree"].update({key: at for key in keys[at : at + 30]})
                connection.root()["size"]["size"] += 30
                manager.commit()
            connection.close()
        finally:
            done.set()

    def read():
        manager, seen = transaction.TransactionManager(), set()
        connection = reading.open(manager)
        while not (done.is_set() and seen and max(seen) == 1200):
            manager.begin()
            tree = connection.root()["tree"]
            tree._check()
            check(tree)
            assert len(tree) == connection.root()["size"]["size"]
            seen.add(len(tree))
        connection.close()

    in_threads(write, read)


def test_a_demo_storage_shows_nothing_of_what_was_undone():
    conf = "<demostorage>\n  <mappingstorage base>\n  </mappingstorage>\n  <filestorage changes>\n    path %s/changes.fs\n  </filestorage>\n</demostorage>"
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(__import__("tempfile").TemporaryDirectory())
        address, stop = zeo_rs.server(storage_conf=conf % directory)
        stack.callback(stop)
        for kind in CLIENTS.values():
            storage = kind(address, wait_timeout=START)
            stack.callback(storage.close)
            database = ZODB.DB(storage)
            with database.transaction() as connection:
                connection.root()["undone"] = PersistentMapping()
            with database.transaction() as connection:
                oid = connection.root()["undone"]._p_oid
            assert storage.load(oid)
            database.undo(database.undoInfo()[0]["id"])
            transaction.commit()
            with pytest.raises(POSKeyError):
                storage.load(oid)
            with database.transaction() as connection:
                assert "undone" not in connection.root()


# ---- B: the cache


def test_a_reconnect_with_several_storages_of_one_server(pair):
    """What one storage was told while a client was away says nothing about the other one."""
    server = pair.serve(storages=("1", "2"))
    proxy = pair.proxy(server.address)
    away = [pair.open(proxy.address, storage=name) for name in "12"]
    there = [pair.open(server.address, storage=name) for name in "12"]
    oid = p64(5)
    tids = [commit(storage, (oid, z64, b"old")) for storage in there]
    for storage, tid in zip(away, tids):
        until(lambda: storage.lastTransaction() == tid, "the invalidation")
        assert storage.load(oid)[:2] == (b"old", tid)
    proxy.cut()
    for storage in away:
        until(lambda: not storage.is_connected(), "the disconnect")
    new = commit(there[1], (oid, tids[1], b"new"))
    proxy.restore()
    until(lambda: away[1].lastTransaction() == new, "the verification")
    until(away[0].is_connected, "the reconnect")
    assert away[0].lastTransaction() == tids[0]
    assert away[0].load(oid)[:2] == (b"old", tids[0])
    assert away[1].load(oid)[:2] == (b"new", new)


# ---- C: two-phase commit


@pytest.mark.parametrize("client_kind", CLIENTS)
def test_a_client_that_hangs_after_its_vote(client_kind):
    """Others go on after the transaction timeout; the one that wakes up later is told that it has not committed.

    (ZEO's server logs the timeout, and under uvloop keeps the lock of the stopped client all the same.)
    """
    with Server("rust", options="transaction-timeout 2") as server:
        with Client(client_kind, server.address) as hung, Client(client_kind, server.address) as other:
            oid = hung.new_oids(1)[0]
            first = hung.store(oid, z64, 1)
            hung.begin_and_store(oid, first, 2, vote=True)
            os.kill(hung.process.pid, signal.SIGSTOP)
            try:
                second = other.store(oid, first, 3)
            finally:
                os.kill(hung.process.pid, signal.SIGCONT)
            with pytest.raises(RemoteError) as raised:
                hung.finish()
            assert "StorageError" in raised.value.kinds
            hung.give_up()
            hung.reconnect_wait()
            assert hung.storage_call("load", oid)[1] == second
            hung.store(oid, second, 4)


def test_a_conflict_of_blobs_holds_up_nobody(pair, tmp_path):
    server = pair.serve()
    storages = [pair.open(server.address, blob_dir=str(tmp_path / str(number))) for number in range(3)]
    one, two, three = [ZODB.DB(storages[0])] + [None, None]
    with one.transaction() as connection:
        connection.root()["blob"] = ZODB.blob.Blob(b"first")
    for storage in storages[1:]:
        until(lambda: storage.lastTransaction() == storages[0].lastTransaction(), "the blob")
    two, three = ZODB.DB(storages[1]), ZODB.DB(storages[2])
    managers = [transaction.TransactionManager() for _ in range(2)]
    connections = [db.open(manager) for db, manager in zip((one, two), managers)]
    for manager, connection in zip(managers, connections):
        manager.begin()
        with connection.root()["blob"].open("w") as file:
            file.write(os.urandom(200_000))
    managers[0].commit()
    with pytest.raises(ConflictError):
        managers[1].commit()
    managers[1].abort()
    # the third, and the one that failed, go through
    until(lambda: storages[2].lastTransaction() == storages[0].lastTransaction(), "the commit")
    with three.transaction() as connection:
        with connection.root()["blob"].open("w") as file:
            file.write(b"third")
    until(lambda: storages[1].lastTransaction() == storages[2].lastTransaction(), "the third commit")
    managers[1].begin()
    with connections[1].root()["blob"].open() as file:
        assert file.read() == b"third"
    with connections[1].root()["blob"].open("w") as file:
        file.write(b"fourth")
    managers[1].commit()
    for connection in connections:
        connection.close()


class Broken(MappingStorage):
    """Fails where it is told to."""

    fails = None

    def _may_fail(self, where):
        if self.fails == where:
            type(self).fails = None
            raise ZeroDivisionError(f"{where} as planned")

    def store(self, *args):
        self._may_fail("store")
        return super().store(*args)

    def tpc_vote(self, *args):
        self._may_fail("vote")
        return super().tpc_vote(*args)

    def tpc_begin(self, *args):
        self._may_fail("begin")
        return super().tpc_begin(*args)


@pytest.mark.parametrize("kind", CLIENTS)
@pytest.mark.parametrize("where", ["begin", "store", "vote"])
def test_an_error_of_the_storage_frees_its_locks(kind, where):
    server = _zeo.Server([("127.0.0.1", 0)], [("1", Broken())])
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        one, two = (CLIENTS[kind](server.address, wait_timeout=START) for _ in range(2))
        stack.callback(one.close)
        stack.callback(two.close)
        oid = one.new_oid()
        first = commit(one, (oid, z64, b"first"))
        Broken.fails = where
        with pytest.raises(Exception) as raised:
            commit(one, (oid, first, b"fails"))
        assert "as planned" in str(raised.value)
        second = commit(two, (oid, first, b"second"))
        until(lambda: one.lastTransaction() == second, "the invalidation")
        third = commit(one, (oid, second, b"third"))
        assert one.load(oid)[:2] == (b"third", third)


# ---- D: life of connections


def sockets_of(port):
    """The TCP sockets of this process that are connected to `port`."""
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(fd))) as sock:
                    if sock.family in (socket.AF_INET, socket.AF_INET6) and port in (
                        sock.getpeername()[1],
                        sock.getsockname()[1],
                    ):
                        yield sock


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux only")
def test_both_ends_have_the_kernel_look_for_dead_peers_and_send_small_messages_at_once():
    """A half-open connection is found by probes and unacknowledged data; requests do not wait for acknowledgements."""
    server = _zeo.Server([("127.0.0.1", 0)], [("1", MappingStorage())], {"local_socket": False})
    storage = zeo_rs.ClientStorage(server.address, wait_timeout=START)
    try:
        storage.ping()
        ends = []
        for sock in sockets_of(server.address[1]):
            ends.append(sock.getpeername())
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            idle, interval, count = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert idle + interval * count <= 60
            assert 0 < sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) <= 60_000
        assert len(ends) == 2
    finally:
        storage.close()
        server.stop()


@pytest.mark.parametrize("encoding", ["Z5", "M5"])
def test_thousands_of_connections_that_say_nothing(encoding):
    """As of a port scan: nobody is kept from working, no descriptor is kept, and the log does not grow."""
    with Server("rust", encoding) as server, Client("zeo", server.address) as client:
        client.set("flood", 0)
        logged = server.log().count("\n")
        descriptors = f"/proc/{server.process.pid}/fd"
        before = len(os.listdir(descriptors))
        for number in range(2000):
            sock = connect(server.address)
            if number % 3 == 1:
                sock.sendall(b"\x16\x03\x01\x02\x00\x01")
            sock.close()
            if number % 500 == 0:
                client.set("flood", number)
        client.set("flood", "done")
        assert client.get("flood") == "done"
        until(lambda: len(os.listdir(descriptors)) <= before + 5, "the sockets are closed")
        assert server.log().count("\n") - logged < 100


@pytest.mark.parametrize("kind", ["zeo", "rust"])
def test_a_client_waits_for_a_unix_socket_that_is_not_there_yet(kind):
    with Server(kind, unix=True) as server:
        server.stop()
        if os.path.exists(server.address):
            os.remove(server.address)
        found = []

        def wait():
            storage = zeo_rs.ClientStorage(server.address, wait_timeout=START)
            found.append(storage.is_connected())
            storage.close()

        in_threads(wait, server.start)
        assert found == [True]


# ---- E: blobs


def test_blobs_loaded_side_by_side_on_one_connection_are_not_mixed(pair, tmp_path):
    server = pair.serve()
    writer = pair.open(server.address, blob_dir=str(tmp_path / "writer"))
    contents = [bytes([number]) * 300_000 for number in range(6)]
    with ZODB.DB(writer).transaction() as connection:
        for number, content in enumerate(contents):
            connection.root()[number] = ZODB.blob.Blob(content)
    with writer_connection(writer) as connection:
        blobs = [(connection.root()[number]._p_oid, connection.root()[number]._p_serial) for number in range(6)]
        if None in blobs[0] or blobs[0][1] == z64:
            blobs = [(oid, writer.getTid(oid)) for oid, _ in blobs]
    reader = pair.open(server.address, blob_dir=str(tmp_path / "reader"))

    def load(oid, serial, content):
        with open(reader.loadBlob(oid, serial), "rb") as file:
            assert file.read() == content

    in_threads(*(lambda a=(*blob, content): load(*a) for blob, content in zip(blobs, contents)))


@contextlib.contextmanager
def writer_connection(storage):
    """A connection of a database on `storage` that closes neither."""
    connection = ZODB.DB(storage).open(transaction.TransactionManager())
    try:
        yield connection
    finally:
        connection.close()


@pytest.mark.parametrize("server_kind", ["zeo", "rust"])
def test_a_blob_cache_smaller_than_a_blob(server_kind, tmp_path, caplog):
    """Cleaned all the time while eight threads read: nobody gets an empty file or none."""
    with Server(server_kind, "M5") as server:
        options = {"wait_timeout": START, "blob_cache_size": 20_000, "blob_cache_size_check": 1}
        storage = zeo_rs.ClientStorage(server.address, blob_dir=str(tmp_path / "blobs"), **options)
        database = ZODB.DB(storage)
        with database.transaction() as connection:
            for number in range(5):
                connection.root()[number] = ZODB.blob.Blob(bytes([number]) * 50_000)
        with database.transaction() as connection:
            oids = [connection.root()[number]._p_oid for number in range(5)]
        serial = storage.lastTransaction()

        def read(seed):
            chosen = random.Random(seed)
            for _ in range(40):
                number = chosen.randrange(5)
                with storage.openCommittedBlobFile(oids[number], serial) as file:
                    assert file.read() == bytes([number]) * 50_000

        in_threads(*(lambda seed=seed: read(seed) for seed in range(8)))
        database.close()
    assert "LockError" not in caplog.text


def test_a_blob_from_another_filesystem(pair, tmp_path):
    """A consumed file cannot be renamed into the blob directory then; it is copied."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == os.stat(tmp_path).st_dev:
        pytest.skip("there is no other filesystem")
    server = pair.serve()
    for shared in False, True:
        directory = str(server.directory / "blobs-1") if shared else str(tmp_path / "blobs")
        database = ZODB.DB(pair.open(server.address, blob_dir=directory, shared_blob_dir=shared))
        source = f"/dev/shm/zeo-rs-{os.getpid()}-{shared}"
        with open(source, "wb") as file:
            file.write(b"elsewhere" * 10_000)
        try:
            with database.transaction() as connection:
                blob = connection.root()[f"blob {shared}"] = ZODB.blob.Blob()
                blob.consumeFile(source)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(source)
        with database.transaction() as connection:
            with connection.root()[f"blob {shared}"].open() as file:
                assert file.read() == b"elsewhere" * 10_000


# ---- F: what is kept exactly


def test_extensions_are_kept_to_the_byte(pair, tmp_path):
    """Through a client, a server, its file and a copy to another server."""
    extension = {"when": 1.5, "what": ("a", b"\x00\xff"), "deep": {"tuple": (1, None, "ü")}}
    servers = [pair.serve(), pair.serve()]
    one, two = (pair.open(server.address) for server in servers)
    txn = TransactionMetaData("usér", "descriptión", extension)
    one.tpc_begin(txn)
    one.store(one.new_oid(), z64, b"data", "", txn)
    one.tpc_vote(txn)
    one.tpc_finish(txn)
    two.copyTransactionsFrom(one)
    found = [next(iter(storage.iterator())) for storage in (one, two)]
    for record in found:
        assert (record.user, record.description) == ("usér".encode(), "descriptión".encode())
        assert record.extension == extension
    assert found[0].tid == found[1].tid
    for server in servers:
        server.kill()
    files = [ZODB.FileStorage.FileStorage(str(server.data_fs()), read_only=True) for server in servers]
    try:
        bytes_ = [next(iter(file.iterator())).extension_bytes for file in files]
        assert bytes_[0] == bytes_[1] == txn.extension_bytes
    finally:
        for file in files:
            file.close()


# ---- G: resources


def resident(pid):
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS")) // 1024


def test_packs_undos_and_closed_connections_leave_nothing_in_memory():
    """MB that the server and the client grow by in a hundred rounds, after the first ten."""
    with Server("rust", "M5") as server:
        storage = zeo_rs.ClientStorage(server.address, wait_timeout=START)
        database = ZODB.DB(storage)
        with database.transaction() as connection:
            connection.root()["x"] = PersistentMapping(data=b"")
        before = None
        for number in range(110):
            if number == 10:
                before = resident(server.process.pid), resident(os.getpid())
            for _ in range(2):
                with database.transaction() as connection:
                    connection.root()["x"]["data"] = os.urandom(200_000)
            database.undo(database.undoInfo()[0]["id"])
            transaction.commit()
            with pytest.raises((UndoError, StorageError)):
                database.undo(b"bm9uc2Vuc2U=")
                transaction.commit()
            transaction.abort()
            list(storage.iterator())
            database.pack()
            zeo_rs.ClientStorage(server.address, wait_timeout=START).close()
        grown = resident(server.process.pid) - before[0], resident(os.getpid()) - before[1]
        database.close()
    # 100 rounds of 600 kB, were they kept
    assert max(grown) < 30, f"server, client: {grown} MB"
