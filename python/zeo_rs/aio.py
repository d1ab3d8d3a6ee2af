"""The asyncio API: loads, history, iteration, packing and news of a ZEO server, for programs that are not ZODB applications; and a server.

>>> async def main(addr):                                       # doctest: +SKIP
...     async with await zeo_rs.aio.connect(addr) as storage:
...         data, tid, end_tid = await storage.load(oid)

It shares connection and cache with the synchronous ``ClientStorage`` under it (``AsyncStorage.storage``), which may be
used at the same time. Oids and tids are 8 bytes, big-endian. Errors are those of ``ClientStorage``.
"""

import asyncio
import contextlib
import time
from typing import NamedTuple

from ZODB.utils import maxtid

from . import _zeo
from .clientstorage import ClientStorage

__all__ = ["AsyncStorage", "Invalidation", "PackProgress", "connect", "serve"]

#: Seconds between two looks at the progress of a pack.
LOOK_EVERY = 0.2


class Invalidation(NamedTuple):
    """One transaction of another client. ``tid`` and ``oids`` are ``None`` after a reconnect that may have missed some."""

    tid: bytes | None
    oids: list[bytes] | None


class PackProgress(NamedTuple):
    """How far a pack is. ``phase`` is ``"done"`` in the last one."""

    phase: str
    bytes_done: int
    bytes_total: int


async def connect(addr, **options):
    """An ``AsyncStorage`` on a ``ClientStorage(addr, **options)`` of its own, once it is connected."""
    storage = await asyncio.to_thread(ClientStorage, addr, **options)
    return AsyncStorage(storage, close=True)


@contextlib.asynccontextmanager
async def serve(path=None, blob_dir=None, storage_conf=None, zeo_conf=None, port=0, ssl=None):
    """A server beside an asyncio program, until the end of the ``async with``. The arguments are those of ``zeo_rs.server``.

    >>> async with zeo_rs.aio.serve("Data.fs", port=8100) as server:     # doctest: +SKIP
    ...     print(server.address, server.status())

    It has threads of its own: neither keeps the event loop busy nor waits for it. At the end, and if it is cancelled at any
    time, it is stopped in good order: clients that have voted may finish, storages are closed.
    """
    from .embedded import configuration, start_threaded

    text = configuration(path, blob_dir, storage_conf, zeo_conf, port)
    server = await _to_its_end(start_threaded, lambda server: server.stop(), text, ssl)
    try:
        yield server
    finally:
        await _to_its_end(server.stop, lambda _: None)


async def _to_its_end(function, undo, *args):
    """``function(*args)`` in a thread. A cancellation waits for it, and for ``undo(result)``."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        result = await work
        await asyncio.to_thread(undo, result)
        raise


class AsyncStorage:
    """A ``ClientStorage`` for asyncio. ``close``: it is closed with this, otherwise it stays as it was."""

    def __init__(self, storage, close=False):
        self.storage = storage
        self._close = close
        self._client = _zeo.AsyncClient(storage)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc_info):
        await self.close()

    async def close(self):
        """Closes the storage, if it is this object's own."""
        if self._close:
            await self._client.run(self.storage.close)

    async def load(self, oid, before=maxtid):
        """The revision just before ``before``: ``(data, tid, end tid or None)``; ``None`` if it is younger.

        Raises ``POSKeyError`` for an object that does not exist.
        """
        return await self._client.load(oid, before)

    async def load_many(self, oids, before=maxtid):
        """``{oid: (data, tid, end tid or None)}`` in a few round trips; what does not exist is missing."""
        return await self._client.load_many(oids, before)

    async def last_transaction(self):
        """Tid of the newest transaction of the server."""
        await self._client.run(self.storage.ping)
        return self.storage.lastTransaction()

    async def history(self, oid, size=1):
        """The newest ``size`` revisions, as ``IStorageHistory`` describes them."""
        return await self._client.run(lambda: self.storage.history(oid, size))

    async def iterate(self, start=None, stop=None):
        """Asynchronous iterator of ``(transaction, [record, ...])`` with ``start <= tid <= stop``."""
        transactions = await self._client.run(lambda: self.storage.iterator(start, stop))

        def following():
            for transaction in transactions:
                return transaction, list(transaction)
            return None

        try:
            while (found := await self._client.run(following)) is not None:
                yield found
        finally:
            transactions.close()

    async def pack(self, before=None):
        """Packs up to the Unix time ``before`` (now). Asynchronous iterator of ``PackProgress``; ends with the pack.

        A ZEO server tells nothing on the way; then only the last one comes.
        """
        before = time.time() if before is None else before
        work = asyncio.ensure_future(self._client.run(lambda: self.storage.pack(before)))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=LOOK_EVERY)
                pack = None if work.done() else (await self.status()).get("pack")
                if pack:
                    yield PackProgress(pack["phase"], pack["bytes_done"], pack["bytes_total"])
        finally:
            # the server goes on even if nobody waits for it; its error is raised here
            with contextlib.suppress(asyncio.CancelledError):
                await work
        yield PackProgress("done", 0, 0)

    async def status(self):
        """The server's status of this storage, as ``ClientStorage.server_status``."""
        return await self._client.run(self.storage.server_status)

    async def invalidations(self):
        """Asynchronous iterator of ``Invalidation``: the transactions of other clients from now on, in order."""
        loop = asyncio.get_running_loop()
        queue = asyncio.Queue()

        def watch(tid, oids):
            with contextlib.suppress(RuntimeError):  # the loop has ended, the watcher goes next
                loop.call_soon_threadsafe(queue.put_nowait, Invalidation(tid, oids and list(oids)))

        self.storage._watchers += (watch,)
        try:
            while True:
                yield await queue.get()
        finally:
            self.storage._watchers = tuple(w for w in self.storage._watchers if w is not watch)
