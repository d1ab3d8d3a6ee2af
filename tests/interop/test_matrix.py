"""What applications do, for every pairing of servers, encodings and clients."""

import pytest
from peers import KINDS, Client, RemoteError, Server
from ZODB.utils import u64, z64


def raises(name, call, *args):
    with pytest.raises(RemoteError) as caught:
        call(*args)
    assert name in caught.value.kinds, caught.value
    return caught.value


# -- one client


def test_commit_and_read(client, key):
    tid = client.set(key, "värde")
    assert client.get(key) == "värde"
    assert client.storage_call("lastTransaction") == tid
    client.set(key, "y" * 300_000)
    assert client.get(key) == "y" * 300_000


def test_object_of_several_frames(client, key):
    client.set(key, "z" * 9_000_000)
    assert client.get(key) == "z" * 9_000_000


def test_undo_and_history(client, key):
    client.set(key, 1, "first " + key)
    client.set(key, 2, "second " + key)
    client.set(key, 3, "third " + key)
    client.undo("third " + key)
    assert client.get(key) == 2
    assert client.undo_descriptions()[:4] == [
        "undo third " + key,
        "third " + key,
        "second " + key,
        "first " + key,
    ]
    history = client.history(key)
    assert [h[1] for h in history] == ["undo third " + key, "third " + key, "second " + key, "first " + key]
    assert history[0][2] == 0 < history[1][2]


def test_undo_of_a_changed_object_is_refused(client, key):
    client.set(key, 1, "first " + key)
    client.set(key, 2, "second " + key)
    client.set(key, 3, "third " + key)
    raises("UndoError", client.undo, "second " + key)
    assert client.get(key) == 3


def test_iteration(client, key):
    client.set(key, 1)
    tid = client.set(key, 2, "iterated")
    transactions = client.iterate()
    tids = [t[0] for t in transactions]
    assert tids == sorted(tids)
    found = transactions[-1]
    assert (found[0], found[1], found[3]) == (tid, " ", b"iterated")
    assert len(found[5]) == 1 and found[5][0][1] == tid
    assert client.iterate(tid, tid) == [found]
    assert client.iterate(tid)[0] == found


def test_record_iternext(client, key):
    client.set(key, 1)
    records = client.record_iternext()
    assert records[0][0] == z64
    assert len(records) == client.storage_len()
    for oid, tid, data in records[:20]:
        assert client.storage_call("load", oid) == (data, tid)


def test_storage_conflict_and_read_check(client):
    oid = client.new_oids(1)[0]
    first = client.store(oid, z64, 1)
    second = client.store(oid, first, 2)
    raises("ConflictError", client.store, oid, first, 3)
    raises("ReadConflictError", client.check_current, oid, first)
    client.check_current(oid, second)
    assert client.storage_call("getTid", oid) == second
    assert client.storage_call("loadBefore", oid, second)[1:] == (first, second)
    assert client.storage_call("loadSerial", oid, first) == client.storage_call("loadBefore", oid, second)[0]


def test_unknown_objects(client):
    oid = client.new_oids(1)[0]
    raises("POSKeyError", client.storage_call, "load", oid)
    raises("POSKeyError", client.storage_call, "loadSerial", oid, z64)


def test_delete_object(client):
    oid = client.new_oids(1)[0]
    first = client.store(oid, z64, 1)
    raises("ConflictError", client.delete, oid, z64)
    deleted = client.delete(oid, first)
    raises("POSKeyError", client.storage_call, "load", oid)
    assert client.storage_call("loadBefore", oid, deleted)[1:] == (first, deleted)


def test_blobs(client, key):
    for content in (b"", b"blob", bytes(range(256)) * 20_000):
        client.put_blob(key, content)
        assert client.get_blob(key) == content


def test_new_oids_are_new(clients):
    one, two = clients
    oids = one.new_oids(250) + two.new_oids(250)
    assert len(set(oids)) == 500


# -- two clients


def test_clients_see_each_other(clients, key):
    one, two = clients
    one.set(key, 0)
    assert two.wait_for(key, 0)
    for i in range(1, 21, 2):
        one.set(key, i)
        assert two.wait_for(key, i)
        two.set(key, i + 1)
        assert one.wait_for(key, i + 1)


def test_write_conflict(clients, key):
    one, two = clients
    one.set(key, 0)
    assert two.wait_for(key, 0)
    one.begin(key)
    two.begin(key)
    one.change(key, "one")
    two.change(key, "two")
    one.commit()
    raises("ConflictError", two.commit)
    assert two.wait_for(key, "one")


def test_a_transaction_keeps_its_view(clients, key):
    one, two = clients
    one.set(key, "old")
    other = key + " other"
    one.set(other, "old")
    assert two.wait_for(other, "old")
    assert two.begin(key) == "old"
    one.set(key, "new")
    one.set(other, "new")
    # a transaction that has begun reads what was current then, however late it asks
    assert two.read(other) == "old"
    two.change(other, "too late")
    raises("ConflictError", two.commit)
    assert two.wait_for(other, "new")


def test_conflicts_of_trees_are_resolved(clients, key):
    one, two = clients
    one.resolve_prepare(key)
    one.set(key + " ready", 1)
    assert two.wait_for(key + " ready", 1)
    one.resolve_change(key, "one")
    two.resolve_change(key, "two")
    one.commit()
    two.commit()
    one.set(key + " ready", 2)
    assert two.wait_for(key + " ready", 2)
    two.set(key + " ready", 3)
    assert one.wait_for(key + " ready", 3)
    assert one.resolve_read(key) == two.resolve_read(key) == (["one", "two"], 2)


def test_blobs_of_the_other(clients, key):
    one, two = clients
    one.put_blob(key, b"from one" * 10_000)
    one.set(key + " ready", 1)
    assert two.wait_for(key + " ready", 1)
    assert two.get_blob(key) == b"from one" * 10_000


def test_undo_reaches_the_other(clients, key):
    one, two = clients
    one.set(key, 1)
    one.set(key, 2, "to be undone " + key)
    assert two.wait_for(key, 2)
    two.undo("to be undone " + key)
    assert one.wait_for(key, 1)


def test_race(clients):
    """Transactions that change two objects together, from both sides: nobody ever sees only one of the changes."""
    one, two = clients
    one.set("race1", 0)
    one.set("race2", 0)
    one.set("race ready", 1)
    assert two.wait_for("race2", 0)
    one.send("race", 150)
    two.send("race", 150)
    assert one.receive() == [] and two.receive() == []
    assert one.set("race done", 1)
    assert two.wait_for("race done", 1)
    assert one.get("race1") == one.get("race2") == two.get("race1") == two.get("race2") > 0


def test_race_of_four(server):
    kinds = KINDS * 2
    clients = []
    try:
        clients.extend(Client(kind, server.address) for kind in kinds)
        clients[0].set("race1", 0)
        clients[0].set("race2", 0)
        for client in clients:
            assert client.wait_for("race2", 0)
        for client in clients:
            client.send("race", 100)
        assert [client.receive() for client in clients] == [[]] * 4
    finally:
        for client in clients:
            client.close()


# -- life of a server


@pytest.fixture(params=KINDS, ids=lambda p: f"{p}-client")
def client_kind(request):
    return request.param


def test_reconnect(server, client_kind):
    """A client outlives a restart, and what the server was told meanwhile by others reaches it."""
    with Client(client_kind, server.address) as one:
        one.set("reconnect", 1)
        assert server.stop() == 0
        server.start()
        with Client("zeo", server.address) as two:
            two.set("reconnect", 2)
        one.reconnect_wait()
        assert one.wait_for("reconnect", 2)
        one.set("reconnect", 3)
        assert one.get("reconnect") == 3


def test_killed_server(server, client_kind):
    """What was acknowledged is there after kill -9."""
    with Client(client_kind, server.address) as one:
        tids = [u64(one.set("killed", i)) for i in range(5)]
        server.kill()
        server.start()
        one.reconnect_wait()
        assert one.get("killed") == 4
        assert one.seen_tid() == tids[-1]
        one.set("killed", 5)


@pytest.mark.parametrize("voted", [False, True], ids=["stored", "voted"])
def test_transaction_does_not_survive_a_disconnect(server, client_kind, voted):
    with Client(client_kind, server.address) as one:
        oid = one.new_oids(1)[0]
        first = one.store(oid, z64, 1)
        one.begin_and_store(oid, first, 2, vote=voted)
        server.kill()
        server.start()
        with pytest.raises(RemoteError) as caught:
            if not voted:
                one.vote()
            one.finish()
        assert {"StorageError", "StorageTransactionError"} & set(caught.value.kinds), caught.value
        one.give_up()
        one.reconnect_wait()
        assert one.storage_call("load", oid)[1] == first
        # and it is not in the way of the next
        second = one.store(oid, first, 3)
        assert one.storage_call("load", oid)[1] == second


@pytest.mark.parametrize("kind", KINDS)
def test_persistent_caches_do_not_mix(server, kind, tmp_path):
    """A client with a cache file starts again with what changed meanwhile verified."""
    with Client(kind, server.address, cache=str(tmp_path / "cache")) as one:
        one.set("cached", 1)
    with Client("zeo", server.address) as other:
        other.set("cached", 2)
    with Client(kind, server.address, cache=str(tmp_path / "cache")) as one:
        assert one.get("cached") == 2


@pytest.mark.parametrize("first,second", [("zeo", "rust"), ("rust", "zeo")])
def test_servers_take_over_each_others_files(first, second, tmp_path):
    with Server(first, "M5", directory=tmp_path) as server, Client("zeo", server.address) as client:
        client.set("kept", 1, "first")
        client.put_blob("blob", b"content")
        client.set("kept", 2, "second")
    with Server(second, "M5", directory=tmp_path) as server, Client("zeo", server.address) as client:
        assert client.get("kept") == 2
        assert client.get_blob("blob") == b"content"
        client.undo("second")
        assert client.get("kept") == 1
        client.pack()
        client.set("kept", 3)
    with Server(first, "Z5", directory=tmp_path) as server, Client("zeo", server.address) as client:
        assert client.get("kept") == 3
        assert client.get_blob("blob") == b"content"


def test_pack_beside_clients(server, client_kind):
    with Client(client_kind, server.address) as one, Client("zeo", server.address) as two:
        for i in range(5):
            one.set("packed", i)
        one.pack()
        assert one.get("packed") == 4
        assert two.wait_for("packed", 4)
        two.set("packed", 5)
        assert one.wait_for("packed", 5)
