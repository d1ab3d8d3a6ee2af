"""Any storage can be served: each kind that a configuration file can name, behind our server, to clients of both kinds."""

import contextlib
import os
import subprocess
import sys
import threading
import time

import pytest
import transaction
import ZODB
from BTrees.OOBTree import OOBTree
from peers import Server
from persistent.mapping import PersistentMapping
from ZEO.ClientStorage import ClientStorage as ZEOClientStorage
from ZODB.blob import Blob
from ZODB.POSException import ConflictError
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid
from ZODB.utils import p64
from ZODB.utils import z64

import zeo_rs

PATIENCE = 30

OVER_FILE = "<demostorage>\n  <filestorage changes>\n    path {dir}/changes.fs\n  </filestorage>\n</demostorage>"

FILE = "<filestorage>\n  path {dir}/Data.fs\n</filestorage>"
OURS = "%import zeo_rs\n<clientstorage>\n  server {below}\n  blob-dir {dir}/fan-out\n</clientstorage>"
KINDS = {
    "filestorage": FILE,
    "mappingstorage": "<mappingstorage>\n</mappingstorage>",
    "demostorage": "<demostorage>\n</demostorage>",
    "demostorage-over-file": "<demostorage>\n  <filestorage base>\n    path {dir}/base.fs\n  </filestorage>\n"
    "  <filestorage changes>\n    path {dir}/changes.fs\n  </filestorage>\n</demostorage>",
    "zlibstorage": "%import zc.zlibstorage\n<zlibstorage>\n" + FILE + "\n</zlibstorage>",
    "blobstorage": "<blobstorage>\n  blob-dir {dir}/blobs\n" + FILE + "\n</blobstorage>",
    "zlib-over-blobstorage": "%import zc.zlibstorage\n<zlibstorage>\n<blobstorage>\n  blob-dir {dir}/blobs\n"
    + FILE
    + "\n</blobstorage>\n</zlibstorage>",
    # fan-out: a server behind ours
    "zeo-client-of-zeo": "<zeoclient>\n  server {below}\n  blob-dir {dir}/fan-out\n</zeoclient>",
    "our-client-of-ours": OURS,
    "our-client-of-zeo": OURS,
}
BELOW = {"zeo-client-of-zeo": "zeo", "our-client-of-ours": "rust", "our-client-of-zeo": "zeo"}
FAN_OUT = sorted(BELOW)
CLIENTS = {"zeo": ZEOClientStorage, "rust": zeo_rs.ClientStorage}


@contextlib.contextmanager
def served(kind, directory):
    """`(address of our server, server below or None)`"""
    with contextlib.ExitStack() as stack:
        below = stack.enter_context(Server(BELOW[kind])) if kind in BELOW else None
        text = KINDS[kind].format(dir=directory, below=below and "%s:%s" % below.address)
        if kind == "demostorage-over-file":
            base = zeo_rs.FileStorage(f"{directory}/base.fs")
            ZODB.DB(base).close()
        address, stop = zeo_rs.server(storage_conf=text)
        stack.callback(stop)
        yield address, below


@pytest.fixture(params=sorted(KINDS))
def kind(request):
    return request.param


@pytest.fixture(params=sorted(CLIENTS), ids=lambda kind: f"{kind}-client")
def connect(request):
    opened = []

    def connect(address, **options):
        storage = CLIENTS[request.param](address, wait_timeout=PATIENCE, **options)
        opened.append(storage)
        return storage

    yield connect
    for storage in opened:
        storage.close()


def test_commits_loads_conflicts(kind, connect, tmp_path):
    with served(kind, tmp_path) as (address, _):
        one, two = ZODB.DB(connect(address)), ZODB.DB(connect(address))
        with one.transaction() as connection:
            root = connection.root()
            root["tree"], root["map"] = OOBTree(), PersistentMapping(n=0)
        managers = transaction.TransactionManager(), transaction.TransactionManager()
        a, b = (db.open(manager) for db, manager in zip((one, two), managers, strict=True))
        # news reach the other
        two.storage.ping()
        managers[1].begin()
        assert b.root()["map"]["n"] == 0
        one.storage.ping()
        managers[0].begin()
        # trees are merged, by storages that can do that (ZODB's MappingStorage cannot)
        a.root()["tree"]["a"], b.root()["tree"]["b"] = 1, 2
        managers[0].commit()
        with pytest.raises(ConflictError) if kind == "mappingstorage" else contextlib.nullcontext():
            managers[1].commit()
        managers[1].abort()
        with two.transaction() as connection:
            merged = {"a": 1} if kind == "mappingstorage" else {"a": 1, "b": 2}
            assert dict(connection.root()["tree"]) == merged
        # what cannot be merged is not
        for connection, manager in zip((a, b), managers, strict=True):
            manager.begin()
        managers[0].begin()
        a.root()["map"]["n"] = 1
        stale = b.root()["map"]
        stale["n"] = 2
        managers[0].commit()
        with pytest.raises(ConflictError):
            managers[1].commit()
        managers[1].abort()
        # and nobody is held up
        b.root()["map"]["n"] = 3
        managers[1].commit()
        a.close()
        b.close()
        one.storage.ping()
        with one.transaction() as connection:
            assert connection.root()["map"]["n"] == 3
        assert two.storage.lastTransaction() == one.storage.lastTransaction()
        with pytest.raises(POSKeyError):
            one.storage.loadBefore(p64(1 << 40), maxtid)
        one.close()
        two.close()


def test_what_a_storage_can_do_its_clients_can(kind, connect, tmp_path):
    with served(kind, tmp_path) as (address, _):
        storage = connect(address)
        db = ZODB.DB(storage)
        for number in range(3):
            with db.transaction() as connection:
                connection.root()["n"] = number
                connection.transaction_manager.get().note(f"number {number}")
        data, tid, end = storage.loadBefore(z64, maxtid)
        older = storage.loadBefore(z64, tid)
        assert end is None and older[2] == tid and storage.loadSerial(z64, older[1]) == older[0]
        history = [entry["tid"] for entry in storage.history(z64, 2)]
        assert history == [tid, older[1]]
        if db.supportsUndo():
            (entry,) = db.undoInfo(0, 1)
            assert entry["description"] in ("number 2", b"number 2")
            db.undo(entry["id"])
            transaction.commit()
            with db.transaction() as connection:
                assert connection.root()["n"] == 1
        else:
            assert kind in ("mappingstorage", "demostorage", "demostorage-over-file")
        if "blob" in kind or kind in BELOW:
            with contextlib.closing(connect(address, blob_dir=str(tmp_path / "cache"))) as with_blobs:
                db2 = ZODB.DB(with_blobs)
                with db2.transaction() as connection:
                    connection.root()["blob"] = Blob(b"x" * 200_000)
                with db2.transaction() as connection:
                    with connection.root()["blob"].open() as file:
                        assert file.read() == b"x" * 200_000
                db2.close()
        if kind != "demostorage-over-file":  # ZODB's fails: 'DemoStorage' object has no attribute '_temporary_changes'
            db.pack()
        with db.transaction() as connection:
            assert "n" in connection.root()
        db.close()


@pytest.mark.parametrize("fan_out", FAN_OUT)
def test_commits_below_reach_the_clients_in_order(fan_out, connect, tmp_path):
    with served(fan_out, tmp_path) as (address, below):
        direct = ZODB.DB(CLIENTS[below.kind](below.address, wait_timeout=PATIENCE))
        with direct.transaction() as connection:
            connection.root()["a"], connection.root()["b"] = PersistentMapping(n=0), PersistentMapping(n=0)
        storage = connect(address)
        told, complete = [], threading.Event()
        db = ZODB.DB(storage)
        adapter = db._mvcc_storage
        invalidate = adapter.invalidate

        def watch(tid, oids, *rest):
            told.append(tid)
            invalidate(tid, oids, *rest)
            if tid == last:
                complete.set()

        adapter.invalidate = watch
        storage.registerDB(adapter)
        # both through the server above and past it, by turns
        last = None
        tids = []
        for number in range(1, 21):
            with direct.transaction() as connection:
                connection.root()["a"]["n"] = connection.root()["b"]["n"] = number
            tids.append(direct.storage.lastTransaction())
        last = tids[-1]
        if last not in told:
            assert complete.wait(PATIENCE)
        assert [tid for tid in told if tid in set(tids)] == sorted(tids) == tids
        with db.transaction() as connection:
            assert connection.root()["a"]["n"] == connection.root()["b"]["n"] == 20
        # and back
        with db.transaction() as connection:
            connection.root()["a"]["n"] = 21
        deadline = time.monotonic() + PATIENCE
        while True:
            with direct.transaction() as connection:
                if connection.root()["a"]["n"] == 21:
                    break
            assert time.monotonic() < deadline
        db.close()
        direct.close()


@pytest.mark.parametrize("fan_out", FAN_OUT)
def test_a_race_through_both_levels(fan_out, connect, tmp_path):
    """Writers above and below keep two objects equal; nobody ever sees them differ."""
    with served(fan_out, tmp_path) as (address, below):
        direct = CLIENTS[below.kind]
        db = ZODB.DB(direct(below.address, wait_timeout=PATIENCE))
        with db.transaction() as connection:
            connection.root()["a"], connection.root()["b"] = PersistentMapping(n=0), PersistentMapping(n=0)
        db.close()
        failures = []

        def work(storage):
            db = ZODB.DB(storage)
            try:
                for number in range(25):
                    manager = transaction.TransactionManager()
                    connection = db.open(manager)
                    try:
                        a, b = connection.root()["a"], connection.root()["b"]
                        if a["n"] != b["n"]:
                            failures.append((a["n"], b["n"]))
                            return
                        a["n"] = b["n"] = a["n"] + 1
                        manager.commit()
                    except ConflictError:
                        manager.abort()
                    finally:
                        connection.close()
            except Exception as error:
                failures.append(repr(error))
            finally:
                db.close()

        storages = [connect(address), connect(address), direct(below.address, wait_timeout=PATIENCE)]
        threads = [threading.Thread(target=work, args=(storage,)) for storage in storages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
            assert not thread.is_alive()
        assert not failures


# -- conflict resolution


CLASSES = """
from persistent import Persistent


class Counter(Persistent):
    value = 0

    def _p_resolveConflict(self, old, committed, new):
        return {'value': committed['value'] + new['value'] - old.get('value', 0)}
"""

INCREMENT_TWICE = """
import sys, transaction, ZODB
from ZODB.POSException import ConflictError
if sys.argv[1] == 'zeo':
    from ZEO.ClientStorage import ClientStorage
else:
    from zeo_rs import ClientStorage
from application_of_the_test import Counter

address = ('127.0.0.1', int(sys.argv[2]))
one, two = ZODB.DB(ClientStorage(address)), ZODB.DB(ClientStorage(address))
with one.transaction() as connection:
    connection.root()['counter'] = Counter()
    connection.root()['counter'].value = 0
two.storage.ping()
managers = transaction.TransactionManager(), transaction.TransactionManager()
a, b = (db.open(manager) for db, manager in zip((one, two), managers))
a.root()['counter'].value += 1
b.root()['counter'].value += 10
managers[0].commit()
try:
    managers[1].commit()
except ConflictError:
    managers[1].abort()
    # nothing is held: the next one goes on
    b.root()['counter'].value += 100
    managers[1].commit()
a.close(), b.close()
with two.transaction() as connection:
    print(connection.root()['counter'].value)
one.close(), two.close()
"""


@pytest.mark.parametrize("client", sorted(CLIENTS))
@pytest.mark.parametrize("where", ["server", "client", "nowhere"])
@pytest.mark.parametrize("storage", ["file", "python"])
def test_conflicts_with_classes_and_without(where, client, storage, tmp_path):
    """The application's class is importable in the server, or only in the client that is asked, or the server has to give up."""
    (tmp_path / "application_of_the_test.py").write_text(CLASSES)
    def environment(with_classes):
        paths = [os.environ.get("PYTHONPATH", "")] + [str(tmp_path)] * with_classes
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    (tmp_path / "zeo.conf").write_text(
        f"<zeo>\n  address 127.0.0.1:0\n  client-conflict-resolution {'yes' if where == 'client' else 'no'}\n</zeo>\n"
        + (FILE if storage == "file" else OVER_FILE).format(dir=tmp_path)
    )
    reading, writing = os.pipe()
    server = subprocess.Popen(
        [sys.executable, "-m", "zeo_rs.runzeo", "-C", str(tmp_path / "zeo.conf"), "--ready-fd", str(writing)],
        pass_fds=[writing],
        env=environment(where == "server"),
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as ready:
            port = ready.readline().strip().rpartition(":")[2]
        done = subprocess.run(
            [sys.executable, "-c", INCREMENT_TWICE, client, port],
            env=environment(True),
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
    finally:
        server.terminate()
        assert server.wait(PATIENCE) == 0
    assert done.stdout.strip() == ("101" if where == "nowhere" else "11"), done.stderr
