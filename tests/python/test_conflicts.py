"""Conflicts: what a server does about them, seen from a client."""

import pytest
import ZODB
from BTrees.Length import Length
from persistent.mapping import PersistentMapping
from ZODB.Connection import TransactionMetaData
from ZODB.POSException import ConflictError

import zeo_rs
from zeo_rs import _served


@pytest.fixture
def storage(tmp_path):
    address, stop = zeo_rs.server(str(tmp_path / "Data.fs"))
    storage = zeo_rs.ClientStorage(address, wait_timeout=60)
    try:
        yield storage
    finally:
        storage.close()
        stop()


@pytest.fixture
def objects(storage):
    """`(oid, serial)` of a mapping and of a counter; both have been changed since."""
    db = ZODB.DB(storage)
    with db.transaction() as conn:
        conn.root()["mapping"], conn.root()["counter"] = PersistentMapping(), Length(1)
    with db.transaction() as conn:
        both = [conn.root()["mapping"], conn.root()["counter"]]
        for obj in both:
            obj._p_activate()
        found = [(obj._p_oid, obj._p_serial) for obj in both]
    with db.transaction() as conn:
        conn.root()["mapping"]["a"] = 1
        conn.root()["counter"].change(4)
    return found


def commit(storage, oid, serial, data):
    txn = TransactionMetaData()
    storage.tpc_begin(txn)
    try:
        storage.store(oid, serial, data, "", txn)
        resolved = storage.tpc_vote(txn)
        storage.tpc_finish(txn)
        return resolved
    except BaseException:
        storage.tpc_abort(txn)
        raise


def test_a_class_that_resolves_nothing_is_looked_up_once(storage, objects, monkeypatch):
    asked = []
    resolve = _served.resolve
    monkeypatch.setattr(_served, "resolve", lambda *args: asked.append(args[0]) or resolve(*args))
    (mapping, old), (counter, first) = objects
    old_data = storage.loadSerial(mapping, old)
    for _ in range(3):
        with pytest.raises(ConflictError) as raised:
            commit(storage, mapping, old, old_data)
        assert raised.value.class_name == "persistent.mapping.PersistentMapping"
        assert raised.value.serials == (storage.getTid(mapping), old)
    assert asked == [mapping]
    # One that resolves is asked each time.
    data = storage.loadSerial(counter, first)
    for count in (2, 3):
        assert commit(storage, counter, first, data) == [counter]
        assert asked == [mapping] + [counter] * (count - 1)


def test_the_next_transaction_follows_a_conflict_at_once(storage, objects):
    (mapping, old), _ = objects
    data = storage.loadSerial(mapping, old)
    with pytest.raises(ConflictError):
        commit(storage, mapping, old, data)
    # The refused one was ended on both sides, and holds nothing.
    assert not commit(storage, mapping, storage.getTid(mapping), data)
