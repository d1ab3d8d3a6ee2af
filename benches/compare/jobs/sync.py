"""Keeping clients up to date: subscribers to invalidations, clients that come back with an old cache."""
import selectors
import socket
import struct
import time
from time import perf_counter_ns

import msgpack
from ZODB.utils import p64, u64, z64

from compare.worker import client

from .commits import commit, payload


def _frame(*message):
    body = msgpack.packb(message, use_bin_type=True)
    return struct.pack(">I", len(body)) + body


class _Subscriber:
    """A connection that registers and from then on only listens: what an idle client is to the server."""

    def __init__(self, addr):
        self.sock = socket.create_connection(tuple(addr), 60)
        self.buffer = b""
        self._frame()                                         # the greeting
        self.sock.sendall(struct.pack(">I", 2) + b"M5" + _frame(1, False, "register", ("1", True)))
        reply = msgpack.unpackb(self._frame())
        if reply[2] != ".reply":
            raise RuntimeError(f"register was answered {reply}")
        self.sock.setblocking(False)

    def _frame(self):
        while (frame := self.take()) is None:
            data = self.sock.recv(65536)
            if not data:
                raise RuntimeError("server closed the connection")
            self.buffer += data
        return frame

    def take(self):
        if len(self.buffer) < 4:
            return None
        end = 4 + int.from_bytes(self.buffer[:4], "big")
        if len(self.buffer) < end:
            return None
        frame, self.buffer = self.buffer[4:end], self.buffer[end:]
        return frame


def subscribers(kind, addr, connections, commits):
    """Receives `commits` invalidations on every connection; reports when the last connection had each."""
    clients = [_Subscriber(addr) for _ in range(connections)]
    try:
        yield
        arrived, seen, left = {}, {}, connections * commits
        with selectors.EpollSelector() as selector:
            for subscriber in clients:
                selector.register(subscriber.sock, selectors.EVENT_READ, subscriber)
            while left:
                ready = selector.select(60)
                if not ready:
                    raise RuntimeError(f"{left} invalidations did not arrive within 60 s")
                for key, _ in ready:
                    subscriber = key.data
                    data = subscriber.sock.recv(65536)
                    now = perf_counter_ns()
                    if not data:
                        raise RuntimeError("server closed the connection")
                    subscriber.buffer += data
                    while (frame := subscriber.take()) is not None:
                        tid = msgpack.unpackb(frame)[3][0].hex()
                        arrived[tid] = now
                        seen[tid] = seen.get(tid, 0) + 1
                        left -= 1
        return {"arrived": arrived, "complete": all(n == connections for n in seen.values())}
    finally:
        for subscriber in clients:
            subscriber.sock.close()


def marked_commits(kind, addr, count, pause):
    """`count` one-object commits with a pause after each; reports when each tpc_finish was called."""
    storage = client(kind, addr)
    try:
        oid, tid, finishing = storage.new_oid(), z64, {}
        yield
        begin = perf_counter_ns()
        for i in range(count):
            started = perf_counter_ns()
            tid = commit(storage, [(oid, tid, payload(250, i))])
            finishing[tid.hex()] = started
            if pause:
                time.sleep(pause)
        return {"begin": begin, "end": perf_counter_ns(), "count": count, "started": finishing}
    finally:
        storage.close()


def idle(kind, addr, connections):
    """Holds registered connections, to see what they cost the server."""
    clients = [_Subscriber(addr) for _ in range(connections)]
    yield
    for subscriber in clients:
        subscriber.sock.close()
    return {}


def rewrite(kind, addr, first, transactions, each):
    """Commits new revisions of existing objects."""
    storage = client(kind, addr)
    try:
        yield
        for number in range(transactions):
            oids = [p64(first + number * each + i) for i in range(each)]
            commit(storage, [(oid, storage.load(oid)[1], payload(250, number)) for oid in oids])
        return {}
    finally:
        storage.close()


def fill(kind, addr, first, count, var):
    """Fills a persistent cache and closes it."""
    storage = client(kind, addr, client="bench", var=var)
    try:
        yield
        for number in range(count):
            storage.load(p64(first + number))
        return {"last": u64(storage.lastTransaction())}
    finally:
        storage.close()


def reconnect(kind, addr, unchanged, changed, var):
    """Opens a client on a persistent cache that missed commits; ends when a changed object has been read."""
    yield
    begin = perf_counter_ns()
    storage = client(kind, addr, client="bench", var=var)
    try:
        storage.load(p64(changed))
        end = perf_counter_ns()
        times = []
        for number in range(100):
            start = perf_counter_ns()
            storage.load(p64(unchanged + number))
            times.append(perf_counter_ns() - start)
        # no round trip is that short, and no hit so long that the fastest of a hundred is not
        if min(times) > 12_000:
            raise RuntimeError("the cache was not kept: objects that had not changed came from the server")
        return {"begin": begin, "end": end}
    finally:
        storage.close()
