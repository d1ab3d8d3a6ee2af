"""The life of a client in its process: events, forks, ends of interpreters, `server_sync`, closing."""

import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import transaction
import ZODB
import ZODB.event
from peers import Proxy, Server
from test_clientstorage import after, commit, opened, until
from ZODB.utils import p64, z64

import zeo_rs
from zeo_rs.clientstorage import ClientStorage
from zeo_rs.exceptions import ClientDisconnected
from zeo_rs.interfaces import StaleCache

#: Closing takes a second at most; the rest is for a machine that does much else.
CLOSED = 10


@pytest.fixture(scope="module")
def server():
    with Server("rust", blobs=False) as server:
        yield server


def python(code, *args, **options):
    """Runs a program in a process of its own; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=100,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# -- events


@pytest.mark.parametrize("kind", ["rust", "zeo"])
def test_a_stale_cache_is_announced(kind, tmp_path):
    """A cache file that missed more than the server remembers: the event names the storage, then nothing old is left."""
    path = str(tmp_path / "cache")
    with Server(kind, blobs=False, options="invalidation-queue-size 5") as server:
        with opened(server.address) as other:
            oid, kept = other.new_oid(), other.new_oid()
            tid = commit(other, (oid, z64, b"0"), (kept, z64, b"kept"))
            with opened(server.address, cache=path) as storage:
                assert [storage.load(one)[0] for one in (oid, kept)] == [b"0", b"kept"]
            for number in range(20):
                tid = commit(other, (oid, tid, b"%d" % number))
        events = []

        def subscriber(event):
            if isinstance(event, StaleCache):
                events.append((event.storage, event.storage.cache_stats()["revisions"]))

        ZODB.event.notify, before = subscriber, ZODB.event.notify
        try:
            with opened(server.address, cache=path) as storage:
                assert events == [(storage, 2)]
                assert storage.lastTransaction() == tid
                assert storage.cache_stats()["revisions"] == 0
                assert storage.load(oid) == (b"19", tid)
        finally:
            ZODB.event.notify = before
        server.kill()


# -- server_sync


def test_with_server_sync_a_new_transaction_sees_every_commit(server):
    with opened(server.address, server_sync=True) as reading, opened(server.address) as writing:
        reader, writer = ZODB.DB(reading), ZODB.DB(writing)
        manager = transaction.TransactionManager()
        connection = reader.open(manager)
        for number in range(200):
            with writer.transaction() as other:
                other.root()["synced"] = number
            manager.begin()
            assert connection.root()["synced"] == number
        connection.close()
        assert reading.sync == reading.ping
    with opened(server.address) as storage:
        assert storage.sync() is None and storage.sync != storage.ping


def test_server_sync_with_zeos_server_asks_it():
    """ZEO's server may answer before it has told of a commit; what can be had is that it is asked at all."""
    with Server("zeo", blobs=False) as server:
        with opened(server.address, server_sync=True, wait_timeout=10) as storage:
            before = storage.lastTransaction()
            storage.sync()
            with opened(server.address) as other:
                tid = commit(other, (other.new_oid(), z64, b"x"))
            assert tid > before
            until(lambda: storage.sync() is None and storage.lastTransaction() == tid, "the commit")
        server.kill()
        with pytest.raises((ClientDisconnected, TypeError)):  # closed: there is no sync any more
            storage.sync()


# -- processes


def test_workers_forked_from_a_parent_that_has_used_it(server):
    """As gunicorn with --preload and uWSGI do: a database opened and used before the fork."""
    out, err = python(
        """
        import os, sys, transaction, zeo_rs
        from BTrees.OOBTree import OOBTree
        db = zeo_rs.DB((sys.argv[1], int(sys.argv[2])), wait_timeout=60)
        with db.transaction() as connection:
            connection.root()["workers"] = OOBTree()
        children = []
        for worker in range(5):
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    for number in range(10):
                        for attempt in transaction.manager.attempts(50):
                            with attempt:
                                connection = db.open(transaction.manager)
                                connection.root()["workers"][worker, number] = os.getpid()
                            connection.close()
                    db.close()
                    status = 0
                finally:
                    os._exit(status)
            children.append(child)
        print([os.waitpid(child, 0)[1] for child in children])
        with db.transaction() as connection:
            connection.root()["parent"] = 1
        db.storage.sync()
        with db.transaction() as connection:
            seen = dict(connection.root()["workers"])
        print(len(seen), len(set(seen.values())), os.getpid() in seen.values())
        db.close()
        """,
        *server.address,
    )
    assert out.split("\n")[:2] == ["[0, 0, 0, 0, 0]", "50 5 False"], (out, err)


def test_an_interpreter_ends_with_threads_at_work(server):
    """Daemon threads that load, commit and wait; nothing is closed. No crash, no complaint, no waiting."""
    with opened(server.address) as storage:
        commit(storage, (p64(77), z64, b"x"))
    out, err = python(
        """
        import sys, threading, time
        from ZODB.Connection import TransactionMetaData
        from ZODB.utils import p64
        from zeo_rs import ClientStorage
        storage = ClientStorage((sys.argv[1], int(sys.argv[2])), cache_size=0)
        silent = ClientStorage(("127.0.0.1", 1), wait=False)
        busy = threading.Semaphore(0)
        def load():
            while True:
                storage.load(p64(77))
                busy.release()
        def write():
            while True:
                txn = TransactionMetaData()
                storage.tpc_begin(txn)
                storage.store(storage.new_oid(), bytes(8), b"y", "", txn)
                storage.tpc_vote(txn)
                storage.tpc_finish(txn, lambda tid: busy.release())
        for target in (load, load, write):
            threading.Thread(target=target, daemon=True).start()
        for _ in range(300):
            busy.acquire()
        print("enough")
        """,
        *server.address,
    )
    assert out == "enough\n" and "Fatal" not in err and "panicked" not in err, err


def test_an_atexit_function_may_still_use_and_close_it(server):
    out, err = python(
        """
        import atexit, sys
        from zeo_rs import ClientStorage
        storage = ClientStorage((sys.argv[1], int(sys.argv[2])))
        def last():
            storage.ping()
            storage.close()
            print("closed")
        atexit.register(last)
        """,
        *server.address,
    )
    assert (out, err) == ("closed\n", "")


def test_a_sub_interpreter_is_refused_and_told_why():
    out, _ = python(
        """
        import importlib
        for name in ("_interpreters", "_xxsubinterpreters"):
            try:
                interpreters = importlib.import_module(name)
                break
            except ImportError:
                pass
        other = interpreters.create()
        code = '''
        try:
            import zeo_rs
        except ImportError as error:
            print(error, flush=True)
        '''
        import textwrap
        try:
            interpreters.run_string(other, textwrap.dedent(code))
        finally:
            interpreters.destroy(other)
        import zeo_rs
        print(zeo_rs.ClientStorage.__name__)
        """
    )
    first, second = out.splitlines()
    assert "sub-interpreter" in first and "WSGIApplicationGroup %{GLOBAL}" in first and second == "ClientStorage"


# -- connections


def test_half_open_connections_are_probed():
    """The kernel is told to find a peer that has vanished within 20 seconds; what it does then cannot be tried without root."""
    before = set(os.listdir("/proc/self/fd"))
    # ZEO's server: with ours the client would leave TCP.
    with Server("zeo", blobs=False) as server, opened(server.address):
        for name in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.family == socket.AF_INET and sock.getpeername() == server.address:
                    break
        else:
            pytest.fail("no connection")
        with socket.socket(fileno=os.dup(int(name))) as sock:
            tcp = socket.IPPROTO_TCP
            idle, every, count = (
                sock.getsockopt(tcp, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            )
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert idle + every * count <= 30
            assert 0 < sock.getsockopt(tcp, socket.TCP_USER_TIMEOUT) <= 30_000


def test_ipv6(tmp_path):
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("this machine has no IPv6")
    address, stop = zeo_rs.server(str(tmp_path / "Data.fs"), port=("::1", 0))
    try:
        assert address[0] == "::1"
        for server in (address, [address], [("127.0.0.1", 1), address]):
            with opened(server) as storage:
                assert storage.is_connected()
                assert str(address[1]) in storage.sortKey()
        factory, _ = zeo_rs.resolve_uri(f"zeo://[::1]:{address[1]}")
        with contextlib.closing(factory()) as storage:
            assert storage.is_connected()
    finally:
        stop()


def silent_listener():
    return socket.create_server(("127.0.0.1", 0))


def state_nobody(server, stack):
    return ClientStorage(("127.0.0.1", 1), wait=False)


def state_silent(server, stack):
    listener = stack.enter_context(silent_listener())
    storage = ClientStorage(listener.getsockname(), wait=False)
    stack.enter_context(listener.accept()[0])
    return storage


def state_unresolvable(server, stack):
    return ClientStorage(("no-such-host.invalid", 1), wait=False)


def state_connected(server, stack):
    return ClientStorage(server.address)


def state_in_a_transaction(server, stack):
    from ZODB.Connection import TransactionMetaData

    storage = ClientStorage(server.address)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(storage.new_oid(), z64, b"x", "", txn)
    return storage


def state_voted(server, stack):
    from ZODB.Connection import TransactionMetaData

    storage = ClientStorage(server.address)
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    storage.store(storage.new_oid(), z64, b"x", "", txn)
    storage.tpc_vote(txn)
    return storage


def state_with_waiting_calls(server, stack):
    """Loads that wait for an answer which never comes, and calls that wait for a connection."""
    proxy = stack.enter_context(Proxy(server.address))
    storage = ClientStorage(proxy.address)
    proxy.cut()
    started = threading.Barrier(5)

    def call():
        started.wait()
        with pytest.raises(ClientDisconnected):
            storage.load(p64(123456))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
        stack.callback(thread.join)
    started.wait()
    return storage


def state_reconnecting(server, stack):
    proxy = stack.enter_context(Proxy(server.address))
    storage = ClientStorage(proxy.address)
    proxy.cut()
    until(lambda: not storage.is_connected(), "the disconnect")
    return storage


def state_closed(server, stack):
    storage = ClientStorage(server.address)
    storage.close()
    return storage


STATES = [function for name, function in list(globals().items()) if name.startswith("state_")]


@pytest.mark.parametrize("state", STATES, ids=lambda function: function.__name__.removeprefix("state_"))
def test_close_is_quick(state, server):
    with contextlib.ExitStack() as stack:
        storage = state(server, stack)
        since = time.monotonic()
        storage.close()
        assert time.monotonic() - since < CLOSED
        assert not storage.is_connected()
        with pytest.raises(ClientDisconnected):
            storage.loadBefore(p64(1), after(p64(1)))


def test_duplicate_loads_in_flight_are_sent_once(server):
    """Threads that want the same objects at once, and a prefetch of them on the way."""
    with opened(server.address) as other:
        oids = [other.new_oid() for _ in range(300)]
        tid = commit(other, *((oid, z64, b"x" * 100) for oid in oids))
    with opened(server.address) as storage:
        before = storage.server_status()["loads"]
        ready = threading.Barrier(8)

        def load():
            ready.wait()
            for oid in oids:
                assert storage.loadBefore(oid, after(tid))[0] == b"x" * 100

        threads = [threading.Thread(target=load) for _ in range(7)]
        for thread in threads:
            thread.start()
        storage.prefetch(oids, after(tid))
        ready.wait()
        for thread in threads:
            thread.join()
        # 2400 were wanted; a thread may have looked into the cache just before an answer came, and asked just after
        assert len(oids) <= storage.server_status()["loads"] - before <= 2 * len(oids)


def test_prefetch_of_a_zodb_connection(server):
    with opened(server.address) as other:
        db = ZODB.DB(other)
        with db.transaction() as connection:
            from persistent.mapping import PersistentMapping

            connection.root()["many"] = many = PersistentMapping()
            for number in range(500):
                many[number] = PersistentMapping({"n": number})
    with opened(server.address) as storage:
        db = ZODB.DB(storage)
        with db.transaction() as connection:
            many = connection.root()["many"]
            many._p_activate()
            objects = list(many.values())
            before = storage.cache_stats()["revisions"]
            connection.prefetch(objects)
            until(lambda: storage.cache_stats()["revisions"] == before + 500, "the prefetch")
            misses = storage.cache_stats()["misses"]
            assert sum(one["n"] for one in objects) == sum(range(500))
            assert storage.cache_stats()["misses"] == misses


class Holding(Proxy):
    """A proxy that takes what clients send at once, whether the server reads or not: that depends on its answers being taken."""

    def _copy(self, source, target, upwards):
        if not upwards:
            return super()._copy(source, target, upwards)
        chunks = queue.SimpleQueue()
        threading.Thread(target=self._write, args=(chunks, target), daemon=True).start()
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                self.sent += len(data)
                chunks.put(data)
        chunks.put(b"")

    @staticmethod
    def _write(chunks, target):
        with contextlib.suppress(OSError):
            while data := chunks.get():
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("kind", ["rust", "zeo"])
def test_a_prefetch_of_ten_thousand_is_one_round_trip(kind):
    """Every request is on its way before the first answer is let through; then the loads need nothing more."""
    number = 10_000
    with Server(kind, blobs=False) as server:
        with opened(server.address) as other:
            oids = [other.new_oid() for _ in range(number)]
            tid = commit(other, *((oid, z64, b"x" * 100) for oid in oids))
        with Holding(server.address) as proxy, opened(proxy.address) as storage:
            proxy.hold()
            # a request has an oid and a tid twice: as its name and as its arguments
            wanted = proxy.sent + number * 32
            storage.prefetch(oids, after(tid))
            until(lambda: proxy.sent >= wanted, "the last request, before any answer")
            proxy.release()
            until(lambda: storage.cache_stats()["revisions"] == number, "the answers")
            misses = storage.cache_stats()["misses"]
            assert all(storage.loadBefore(oid, after(tid))[0] == b"x" * 100 for oid in oids)
            assert storage.cache_stats()["misses"] == misses
        server.kill()


# -- threads and signals


def test_the_last_transaction_never_stops_the_interpreter(server):
    """While one thread asks for it all the time, another commits, with a callback that wants the GIL before the tid moves."""
    with opened(server.address) as storage:
        ended = threading.Event()
        longest = [0]

        def ask():
            while not ended.is_set():
                since = time.monotonic()
                for _ in range(100):
                    storage.lastTransaction()
                longest[0] = max(longest[0], time.monotonic() - since)

        asking = [threading.Thread(target=ask) for _ in range(2)]
        for thread in asking:
            thread.start()
        try:
            oid, tid = storage.new_oid(), z64
            for number in range(300):
                tid = commit(storage, (oid, tid, b"%d" % number))
        finally:
            ended.set()
            for thread in asking:
                thread.join()
        # it used to wait 5 seconds with the GIL, for a callback that wanted it
        assert longest[0] < 4


def test_a_thread_that_waits_to_begin_stops_nobody(tmp_path):
    """Its transaction has the turn. Others are told at once that it is not theirs, and Ctrl-C ends their waiting."""
    from ZODB.Connection import TransactionMetaData
    from ZODB.POSException import StorageTransactionError

    with Server("rust", blobs=False) as server:
        with opened(server.address, wait_timeout=60, blob_dir=str(tmp_path / "blobs")) as storage:
            server.kill()
            until(lambda: not storage.is_connected(), "the disconnect")
            first, second = TransactionMetaData(), TransactionMetaData()
            ended = []

            def begin():
                try:
                    storage.tpc_begin(first)
                except ClientDisconnected:
                    ended.append("disconnected")

            beginning = threading.Thread(target=begin)
            beginning.start()

            def has_turn():
                # whoever has it, a signal ends the waiting of this thread
                with alarm(0.3), pytest.raises(Alarm):
                    storage.tpc_begin(second)
                return True

            assert has_turn() and has_turn()
            blob = tmp_path / "blob"
            blob.write_bytes(b"x")
            for misuse in (
                lambda: storage.store(p64(1), z64, b"x", "", second),
                lambda: storage.storeBlob(p64(1), z64, b"x", str(blob), "", second),
                lambda: storage.undo(z64, second),
                lambda: storage.tpc_vote(second),
            ):
                with pytest.raises(StorageTransactionError):
                    misuse()
            storage.tpc_abort(second)
            assert beginning.is_alive() and not ended, "the answers waited for it"
            storage.close()
            beginning.join(CLOSED)
            assert ended == ["disconnected"]


class Alarm(Exception):
    pass


@contextlib.contextmanager
def alarm(seconds):
    """What Ctrl-C does, after a while."""

    def handler(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("blob", [False, True], ids=["stores", "a blob"])
def test_a_signal_ends_what_the_server_does_not_read(tmp_path, blob):
    from ZODB.Connection import TransactionMetaData

    with Server("rust") as server:
        with opened(server.address, blob_dir=str(tmp_path / "blobs")) as storage:
            txn = TransactionMetaData()
            storage.tpc_begin(txn)
            # a server that hangs
            server.process.send_signal(signal.SIGSTOP)
            try:
                with alarm(1), pytest.raises(Alarm):
                    if blob:
                        file = tmp_path / "blob"
                        with file.open("wb") as large:
                            large.truncate(200 << 20)
                        storage.storeBlob(p64(1), z64, b"x", str(file), "", txn)
                    for number in range(2000):
                        storage.store(p64(number), z64, bytes(100_000), "", txn)
                storage.tpc_abort(txn)
            finally:
                server.process.send_signal(signal.SIGCONT)
            # the connection was given up in the middle of a message; the next one is as good
            oid = storage.new_oid()
            tid = commit(storage, (oid, z64, b"afterwards"))
            assert storage.load(oid) == (b"afterwards", tid)


def test_another_thread_can_abort_and_load_behind_an_upload_that_is_not_read(tmp_path):
    from ZODB.Connection import TransactionMetaData

    with Server("rust") as server:
        with opened(server.address, blob_dir=str(tmp_path / "blobs")) as storage:
            txn = TransactionMetaData()
            storage.tpc_begin(txn)
            file = tmp_path / "blob"
            with file.open("wb") as large:
                large.truncate(200 << 20)
            server.process.send_signal(signal.SIGSTOP)
            try:
                ended = queue.Queue()

                def upload():
                    try:
                        storage.storeBlob(p64(1), z64, b"x", str(file), "", txn)
                    except ClientDisconnected:
                        ended.put("disconnected")

                uploading = threading.Thread(target=upload)
                uploading.start()
                until(lambda: storage.blob_stats()["transfers"], "the upload")
                for wait in (lambda: storage.load(p64(5)), lambda: storage.tpc_abort(txn)):
                    with alarm(0.3), pytest.raises(Alarm):
                        wait()
                assert uploading.is_alive()
                storage.close()
                assert ended.get(timeout=CLOSED) == "disconnected"
                uploading.join(CLOSED)
            finally:
                server.process.send_signal(signal.SIGCONT)


class Together(Proxy):
    """A proxy that lets go at once all it held up."""

    def _copy(self, source, target, upwards):
        if upwards:
            return super()._copy(source, target, upwards)
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self._lets_pass.wait()
                with contextlib.suppress(BlockingIOError):
                    data += source.recv(65536, socket.MSG_DONTWAIT)
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


class Told:
    """A database that notes of what it is told, and on which thread."""

    def __init__(self, error=None):
        self.told, self.threads, self._error = [], set(), error

    def invalidate(self, tid, oids):
        self.threads.add(threading.current_thread())
        if self._error is not None:
            raise self._error
        self.told.append(tid)

    def invalidateCache(self):
        self.threads.add(threading.current_thread())
        self.told.append("cache")


def commits_behind_invalidations(address, db, enough, meanwhile=lambda: None):
    """Rounds of a commit whose vote is answered behind the invalidation by another client's, until there were enough; another thread
    does something `meanwhile`."""
    with Together(address) as proxy, opened(proxy.address) as storage, opened(address) as other:
        oid, mine = other.new_oid(), storage.new_oid()
        tid = own = z64
        storage.ping()
        storage._db = db
        for number in range(50):
            proxy.hold()
            tid = commit(other, (oid, tid, b"%d" % number))
            sent = proxy.sent

            def let_go(sent=sent):
                try:
                    until(lambda: proxy.sent > sent, "the vote")
                    meanwhile()
                finally:
                    proxy.release()

            letting_go = threading.Thread(target=let_go)
            letting_go.start()
            own = commit(storage, (mine, own, b"%d" % number))
            told = db.told.copy()
            assert storage.lastTransaction() == own > tid
            letting_go.join()
            yield tid, told
            if enough():
                return


def on_a_thread(work):
    """Runs it on a thread of its own; raises what it raises."""
    raised = []

    def run():
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def test_a_thread_that_waits_behind_an_invalidation_tells_the_database(server):
    db = Told()

    def work():
        expected = []
        for tid, told in commits_behind_invalidations(server.address, db, lambda: threading.current_thread() in db.threads):
            expected.append(tid)
            assert told == expected
        assert threading.current_thread() in db.threads

    on_a_thread(work)


def test_the_main_thread_never_tells_the_database(server):
    assert threading.current_thread() is threading.main_thread()
    db, expected = Told(), []
    for tid, told in commits_behind_invalidations(server.address, db, lambda: len(db.told) == 20):
        expected.append(tid)
        assert told == expected
    assert len(expected) == 20 and threading.main_thread() not in db.threads


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_database_that_fails_on_a_callers_thread_forgets_everything(server, error):
    """That thread's commit has nothing to do with it."""
    db = Told(error)

    def work():
        for number, (_, told) in enumerate(
            commits_behind_invalidations(server.address, db, lambda: threading.current_thread() in db.threads), 1
        ):
            assert told == ["cache"] * number
        assert threading.current_thread() in db.threads

    on_a_thread(work)


def test_no_signal_is_lost_where_the_main_thread_waits_behind_an_invalidation(server):
    """Its handler runs when the call has returned: in there it could not raise, nor use the storage."""
    # in a process of its own, where nobody has asked yet which thread is the main one
    out, _ = python(
        """
        import signal, sys, threading
        sys.path.insert(0, sys.argv[3])
        from test_client_life import Told, commits_behind_invalidations
        class Alarm(Exception):
            pass
        def handler(number, frame):
            raise Alarm
        signal.signal(signal.SIGUSR1, handler)
        def meanwhile():
            # taken by this thread: it interrupts no system call of the main one, which is to run the handler
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        try:
            for _ in commits_behind_invalidations((sys.argv[1], int(sys.argv[2])), Told(), lambda: True, meanwhile):
                print("lost")
        except Alarm:
            print("raised")
        """,
        *server.address,
        os.path.dirname(__file__),
    )
    assert out == "raised\n"


def test_one_deadline_for_everything_that_closing_waits_for(server, tmp_path, monkeypatch):
    """A callback that does not return, and a check of the blobs that does not."""
    from zeo_rs import blobcache

    go_on, called = threading.Event(), threading.Event()
    monkeypatch.setattr(blobcache, "check_size", lambda *args: go_on.wait(60))

    class Database:
        def invalidate(self, tid, oids):
            called.set()
            go_on.wait(60)

        def invalidateCache(self):
            pass

    waited = []
    join = threading.Thread.join
    monkeypatch.setattr(threading.Thread, "join", lambda thread, timeout=None: waited.append(timeout) or join(thread, timeout))
    with opened(server.address) as other, opened(server.address, blob_dir=str(tmp_path), blob_cache_size=1000) as storage:
        storage._db = Database()
        commit(other, (other.new_oid(), z64, b"x"))
        assert called.wait(60)
        since = time.monotonic()
        storage.close()
        took = time.monotonic() - since
        go_on.set()
    assert took < CLOSED
    assert 0 <= waited[0] < 0.6, "the check gets what the connection has left of the second"


def test_a_forked_child_goes_where_the_parent_was_sent(server):
    with Server("rust", blobs=False) as moved:
        with opened(moved.address, wait_timeout=60) as storage:
            storage.new_addr(server.address)
            moved.kill()
            until(lambda: storage.is_connected() and storage._server_addr == server.address, "the other server")
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    storage.ping()
                    os.write(writer, repr(storage._server_addr).encode())
                finally:
                    os._exit(0)
            os.close(writer)
            with open(reader) as pipe:
                assert pipe.read() == repr(server.address)
            os.waitpid(child, 0)


@pytest.mark.parametrize("options", [{"cache": "there"}, {"client": "there", "var": "."}], ids=["cache", "client"])
def test_a_cache_that_would_be_a_directory_is_refused(server, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there-1.zrc"):
        os.mkdir(name)
    before = sorted(os.listdir())
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        ClientStorage(server.address, blob_dir="blobs", **options)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("address", [[], (), b"localhost", [b"localhost"]], ids=repr)
def test_what_is_no_address_is_refused(address, tmp_path):
    with pytest.raises(ValueError, match="address"):
        ClientStorage(address, wait=False, blob_dir=str(tmp_path / "blobs"))
    assert not os.listdir(tmp_path)


def test_the_cache_file_is_free_after_closing_though_a_child_has_it_open(server, tmp_path, caplog):
    path = str(tmp_path / "cache")
    reader, writer = os.pipe()
    with opened(server.address, cache=path) as storage:
        oid = storage.new_oid()
        commit(storage, (oid, z64, b"x"))
        assert storage.load(oid)[0] == b"x"
        child = os.fork()
        if child == 0:
            try:
                os.close(writer)
                os.read(reader, 1)
            finally:
                os._exit(0)
    try:
        with opened(server.address, cache=path) as storage:
            assert storage.cache_stats()["revisions"] == 1, "it got a temporary cache"
    finally:
        os.close(writer)
        os.close(reader)
        os.waitpid(child, 0)


def test_a_child_logs_though_its_parent_was_logging_at_the_fork(server):
    """Forks while threads of the parent log all the time; no child may wait for a lock that such a thread had."""
    out, _ = python(
        """
        import logging, os, sys, threading
        logging.basicConfig(level=logging.CRITICAL)
        logging.getLogger("zeo_rs").setLevel(logging.DEBUG)
        logging.getLogger("zeo_rs").addFilter(lambda record: False)
        from zeo_rs import ClientStorage
        from zeo_rs.exceptions import ClientDisconnected
        silent = [ClientStorage(("127.0.0.1", 1), wait=False) for _ in range(20)]
        statuses = []
        for _ in range(50):
            for storage in silent:
                storage.new_addr(("127.0.0.1", 1))  # they try again at once, and say that it failed
            child = os.fork()
            if child == 0:
                ClientStorage((sys.argv[1], int(sys.argv[2]))).close()
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
        print(set(statuses), flush=True)
        os._exit(0)
        """,
        *server.address,
    )
    assert out == "{0}\n"


# -- what ZEO's class does


def test_the_arguments_have_zeos_names():
    import inspect

    from ZEO.ClientStorage import ClientStorage as Original

    names = ("deleteObject", "store", "storeBlob", "tpc_abort", "tpc_begin", "tpc_finish", "tpc_vote", "undo", "undoInfo", "undoLog")
    for name in names:
        ours, theirs = (
            [(parameter.name, parameter.default) for parameter in inspect.signature(getattr(cls, name)).parameters.values()]
            for cls in (ClientStorage, Original)
        )
        if name == "tpc_finish":  # the default of ZEO is a function that does nothing
            ours[-1] = theirs[-1] = ("f", None)
        assert ours == theirs, name


def test_a_read_only_storage_says_so_at_every_step(server, tmp_path):
    from ZODB.Connection import TransactionMetaData
    from ZODB.POSException import ReadOnlyError

    blob = tmp_path / "blob"
    blob.write_bytes(b"x")
    txn = TransactionMetaData()
    with opened(server.address, read_only=True, blob_dir=str(tmp_path / "blobs")) as storage:
        for step in (
            lambda: storage.tpc_begin(txn),
            lambda: storage.store(p64(1), z64, b"x", "", txn),
            lambda: storage.storeBlob(p64(1), z64, b"x", str(blob), "", txn),
            lambda: storage.tpc_vote(txn),
            lambda: storage.tpc_finish(txn),
            lambda: storage.undo(z64, txn),
        ):
            with pytest.raises(ReadOnlyError):
                step()
        storage.tpc_abort(txn)
        assert blob.exists()
