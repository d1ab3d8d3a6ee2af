"""Everything that ZEO 6.2's client offers its callers is here too: found by looking at the installed class."""

import contextlib
import inspect

import pytest
import ZEO
import ZEO.ClientStorage
import ZEO.Exceptions
import ZEO.interfaces
import zope.interface
from peers import Server
from test_clientstorage import opened, until

import zeo_rs
import zeo_rs.exceptions
import zeo_rs.interfaces
from zeo_rs.clientstorage import ClientStorage

THEIRS = ZEO.ClientStorage.ClientStorage

#: Public names of theirs that are not here, with the reason.
NOT_HERE = {
    "info": "called by the connection for a message of the server; here the native half does that",
    "receiveBlobStart": "the same",
    "receiveBlobChunk": "the same",
    "receiveBlobStop": "the same",
    "set_server_addr": "called by its own notify_connected; the address is known before",
    "tpc_end": "gives its commit lock back; the native half has it",
}


def public(kind):
    return {name for name in dir(kind) if not name.startswith("_")}


def test_every_public_name():
    missing = public(THEIRS) - public(ClientStorage)
    assert missing == set(NOT_HERE), "an entry of NOT_HERE that is not needed, or a name that is missing"


def test_the_constructor_takes_the_same_arguments():
    theirs = inspect.signature(THEIRS.__init__).parameters
    ours = inspect.signature(ClientStorage.__init__).parameters
    expected = [name for name in theirs if not name.startswith("_")]
    assert list(ours)[: len(expected)] == expected  # by position, too
    for name in expected:
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize("name", sorted(public(THEIRS) - set(NOT_HERE)))
def test_methods_take_the_same_arguments(name):
    method = getattr(THEIRS, name)
    if not inspect.isfunction(method):
        assert not callable(method) or inspect.isclass(method) or callable(getattr(ClientStorage, name))
        return
    theirs = list(inspect.signature(method).parameters.values())[1:]
    ours = list(inspect.signature(getattr(ClientStorage, name)).parameters.values())[1:]
    assert len(ours) >= len(theirs)
    for their, our in zip(theirs, ours):
        assert our.name == their.name
        assert (our.default is inspect.Parameter.empty) == (their.default is inspect.Parameter.empty), our.name
    for more in ours[len(theirs) :]:
        assert more.default is not inspect.Parameter.empty


def test_interfaces_of_the_class():
    assert set(zope.interface.implementedBy(THEIRS)) <= set(zope.interface.implementedBy(ClientStorage))


@pytest.mark.parametrize("module", ["Exceptions", "interfaces"])
def test_modules(module):
    theirs = getattr(ZEO, module)
    ours = {"Exceptions": zeo_rs.exceptions, "interfaces": zeo_rs.interfaces}[module]
    for name in public(theirs):
        their, our = getattr(theirs, name), getattr(ours, name)
        if inspect.isclass(their) and issubclass(their, BaseException):
            assert [c.__name__ for c in our.__mro__] == [c.__name__ for c in their.__mro__]


def test_the_package():
    for name in ("DB", "client", "connection", "server"):
        assert callable(getattr(ZEO, name)) and callable(getattr(zeo_rs, name))


@pytest.mark.parametrize("kind", ["rust", "zeo"])
def test_attributes_of_an_open_storage(kind, tmp_path):
    options = {"blob_dir": str(tmp_path / "blobs"), "server_sync": True}
    with Server(kind) as server:
        with contextlib.closing(THEIRS(server.address, **options)) as theirs, opened(server.address, **options) as ours:
            until(lambda: set(zope.interface.providedBy(theirs)) <= set(zope.interface.providedBy(ours)), "interfaces")
            names = {name for name in vars(theirs) if not name.startswith("_")}
            assert {"blob_dir", "protocol_version", "server_sync"} <= names
            for name in sorted(names):
                assert hasattr(ours, name), name
                if isinstance(getattr(theirs, name), (str, bytes, bool, int)):
                    assert getattr(ours, name) == getattr(theirs, name), name
            for question in ("getName", "sortKey", "supportsUndo", "getSize", "isReadOnly", "is_connected", "__len__"):
                assert getattr(ours, question)() == getattr(theirs, question)(), question
        server.kill()


def test_subclasses_are_told_of_connections_as_by_zeo():
    def watching(base):
        class Watching(base):
            def notify_connected(self, conn, info):
                super().notify_connected(conn, info)
                self.told.append((conn.get_peername()[:2], conn.protocol_version, bool(conn.is_read_only()), set(info)))

            def notify_disconnected(self):
                super().notify_disconnected()
                self.told.append("disconnected")

            told = ()

            def __init__(self, *args, **kw):
                self.told = []
                super().__init__(*args, **kw)

        return Watching

    seen = []
    with Server("rust", blobs=False) as server:
        for base in (THEIRS, ClientStorage):
            storage = watching(base)(server.address)
            storage.close()
            until(lambda storage=storage: storage.told[-1] == "disconnected" or base is THEIRS, "the end")
            seen.append(storage.told[:1])
    # What our server says to our client only, the other does not mind.
    seen[0][0][3].discard("zeo_rs_local")
    assert seen[0] == seen[1] and seen[1][0][0] == server.address


def test_subclasses_may_take_invalidations():
    from ZODB.utils import z64

    from test_clientstorage import commit

    class Taking(ClientStorage):
        taken = ()

        def invalidateTransaction(self, tid, oids):
            self.taken += ((tid, list(oids)),)
            super().invalidateTransaction(tid, oids)

        def invalidateCache(self):
            self.taken += ("cache",)
            super().invalidateCache()

    with Server("rust", blobs=False) as server, opened(server.address) as other:
        with contextlib.closing(Taking(server.address)) as storage:
            oid = other.new_oid()
            tid = commit(other, (oid, z64, b"x"))
            until(lambda: (tid, [oid]) in storage.taken, "the invalidation")
            assert "cache" in storage.taken  # of the connection being new
