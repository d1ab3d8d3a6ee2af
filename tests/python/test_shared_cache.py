"""The cache that a server shares with the clients of its machine (`shared-cache-size`): what is found there is right, and nobody else notices."""

import contextlib
import threading

import pytest
import transaction
import ZEO
import ZODB
from persistent.mapping import PersistentMapping
from rawpeer import Raw
from test_local_socket import free_port, opened, over_tls, status_of, watched
from test_server import serving, wait_until
from ZODB.POSException import ConflictError
from ZODB.utils import p64, u64, z64

import zeo_rs

KEY = "zeo_rs_shelf"
OBJECTS = 50
#: one cache that keeps nothing worth speaking of, so that everything is loaded
TINY = 2000


def fill(address):
    """Commits some objects; their oids."""
    with contextlib.closing(ZODB.DB(zeo_rs.ClientStorage(address, wait_timeout=60))) as database:
        with database.transaction() as connection:
            for number in range(OBJECTS):
                connection.root()[number] = PersistentMapping(n=number)
        with database.transaction() as connection:
            return [connection.root()[number]._p_oid for number in range(OBJECTS)]


def load_all(storage, oids):
    return [storage.load(oid) for oid in oids]


def shared(storage):
    return storage.cache_stats()["shared"]


def test_what_one_client_has_loaded_others_find_without_asking(tmp_path):
    with watched(tmp_path) as server:
        oids = fill(server.address)
        with opened(server.address) as first, opened(server.address) as second, opened(server.address) as third:
            loaded = load_all(first, oids)
            assert shared(first) == 0
            asked = status_of(server)["loads"]
            assert load_all(second, oids) == loaded
            assert shared(second) == OBJECTS
            third.prefetch(oids, p64(u64(third.lastTransaction()) + 1))
            assert third.cache_stats()["stores"] == OBJECTS
            assert load_all(third, oids) == loaded
            assert status_of(server)["loads"] == asked
            # what was found is in the cache now
            assert load_all(second, oids) == loaded
            assert shared(second) == OBJECTS


def test_a_commit_takes_it_away(tmp_path):
    with watched(tmp_path) as server:
        oids = fill(server.address)
        with contextlib.closing(ZODB.DB(zeo_rs.ClientStorage(server.address))) as database, opened(server.address) as reader:
            old = load_all(reader, oids)
            before = reader.lastTransaction()
            with opened(server.address, cache_size=TINY) as other:
                with database.transaction() as connection:
                    connection.root()[7]["n"] = "new"
                tid = database.storage.lastTransaction()
                wait_until(lambda: reader.lastTransaction() >= tid and other.lastTransaction() >= tid)
                for storage in (reader, other, reader, other):
                    data, serial = storage.load(oids[7])
                    assert serial == tid and b"new" in data
                # as of then it is what it was, whatever lies there
                assert other.loadBefore(oids[7], p64(u64(before) + 1)) == (*old[7], tid)
                assert other.load(oids[8]) == old[8]
                assert shared(other) > 0


def test_many_readers_never_see_half_a_transaction_nor_go_back(tmp_path):
    """Two objects that are always changed together, by two writers; every reader loads everything, always."""
    commits = 150
    with watched(tmp_path) as server:
        fill(server.address)
        failures, done, seen = [], threading.Event(), []

        def database(**options):
            return contextlib.closing(ZODB.DB(zeo_rs.ClientStorage(server.address, wait_timeout=60, **options)))

        def write(one, two):
            try:
                with database() as mine:
                    for _ in range(commits):
                        while True:
                            with contextlib.suppress(ConflictError), mine.transaction() as connection:
                                root = connection.root()
                                root[one]["n"] = root[two]["n"] = root[one]["n"] + 1
                                break
            except BaseException as error:
                failures.append(error)

        def read():
            try:
                with database(cache_size=TINY) as mine:
                    connection = mine.open(transaction_manager := transaction.TransactionManager())
                    last = {}
                    while not done.is_set():
                        transaction_manager.begin()
                        connection.cacheMinimize()
                        root = connection.root()
                        for one, two in ((1, 2), (3, 4)):
                            values = root[one]["n"], root[two]["n"]
                            assert values[0] == values[1], values
                            assert values[0] >= last.get(one, values[0]), (values, last)
                            last[one] = values[0]
                    transaction_manager.abort()
                    connection.close()
                    seen.append(shared(mine.storage))
            except BaseException as error:
                failures.append(error)

        with database() as mine, mine.transaction() as connection:
            for number in range(5):
                connection.root()[number]["n"] = 0
        writers = [threading.Thread(target=write, args=pair) for pair in ((1, 2), (3, 4), (1, 2))]
        readers = [threading.Thread(target=read) for _ in range(4)]
        for thread in (*writers, *readers):
            thread.start()
        for thread in writers:
            thread.join(120)
        done.set()
        for thread in readers:
            thread.join(60)
        assert not failures
        assert len(seen) == len(readers) and min(seen) > 0, seen


def test_a_client_of_a_killed_server_finds_what_the_next_one_has(tmp_path):
    address = "127.0.0.1", free_port()
    with opened_later(address) as storage:
        with serving(tmp_path, "address %s:%s" % address) as server:
            oids = fill(address)
            wait_until(storage.is_connected)
            old = load_all(storage, oids)
            with opened(address) as other:
                assert load_all(other, oids) == old
            server.process.kill()
            server.process.wait(60)
        wait_until(lambda: not storage.is_connected())
        with serving(tmp_path, "address %s:%s" % address):
            with contextlib.closing(ZODB.DB(zeo_rs.ClientStorage(address, wait_timeout=60))) as database:
                with database.transaction() as connection:
                    connection.root()[7]["n"] = "new"
            wait_until(storage.is_connected)
            wait_until(lambda: b"new" in storage.load(oids[7])[0])
            assert storage.load(oids[8]) == old[8]


def opened_later(address):
    return contextlib.closing(zeo_rs.ClientStorage(address, wait=False, wait_timeout=60))


# -- who shares it


def test_it_can_be_switched_off(tmp_path):
    with watched(tmp_path, "shared-cache-size 0") as server:
        oids = fill(server.address)
        with opened(server.address) as first, opened(server.address) as second:
            assert load_all(first, oids) == load_all(second, oids)
            assert shared(first) == shared(second) == 0


@pytest.mark.parametrize("size", ["1KB", "-1", "2000GB", "some"])
def test_a_size_that_makes_no_sense_is_refused(tmp_path, size):
    with pytest.raises(AssertionError, match="0 .none., or 1MB to 1024GB"), serving(tmp_path, f"shared-cache-size {size}"):
        pass


def test_who_stays_with_tcp_has_none(tmp_path):
    with watched(tmp_path, "local-socket false") as server:
        oids = fill(server.address)
        with opened(server.address) as first, opened(server.address) as second:
            assert load_all(first, oids) == load_all(second, oids)
            assert shared(second) == 0
        with Raw(server.address) as peer:
            assert KEY not in peer.call("get_info")


def test_at_a_unix_address(tmp_path):
    """Our client gets it there, too; ZEO's takes the answer and leaves the descriptor. It is handed over once."""
    path = str(tmp_path / "s")
    with serving(tmp_path, f"address {path}"):
        oids = fill(path)
        with opened(path) as first, opened(path) as second, contextlib.closing(ZEO.client(path, wait_timeout=60)) as theirs:
            assert load_all(first, oids) == load_all(second, oids) == [theirs.load(oid) for oid in oids]
            assert shared(second) == OBJECTS
            assert KEY in theirs._info
        with Raw(path) as peer:
            assert peer.call("get_info")[KEY] == [1, 64 << 20]
            assert KEY not in peer.call("get_info")


def test_over_tls_there_is_none():
    with over_tls() as peer:
        assert KEY not in peer.call("get_info")


def test_storages_in_python_share_none(tmp_path):
    """What they answer may be older than what they have told."""
    storage = "<zlibstorage>\n  <filestorage>\n    path %s/Data.fs\n  </filestorage>\n</zlibstorage>" % tmp_path
    with serving(tmp_path, storage=f"%import zc.zlibstorage\n{storage}") as server:
        oids = fill(server.address)
        with opened(server.address) as first, opened(server.address) as second:
            assert load_all(first, oids) == load_all(second, oids)
            assert shared(second) == 0


def test_every_process_of_the_machine(tmp_path):
    """The root, loaded by another process before."""
    with watched(tmp_path) as server:
        fill(server.address)
        with opened(server.address) as first:
            expected = first.load(z64)
        with opened(server.address) as second:
            assert second.load(z64) == expected and shared(second) == 1
