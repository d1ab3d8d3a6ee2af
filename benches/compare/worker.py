"""The client side of a measurement: a process that runs one job after the other.

A line of JSON names the job; its generator prepares up to the first `yield` (reported as ready), goes on at the line "go", and
returns its report. `python -m compare.worker` is started by harness.py only.
"""
import importlib
import json
import sys
import threading

JOBS = ("application", "blobs", "commits", "engine", "latency", "loads", "shootout", "sync")


class Database:
    """What a storage wants to be registered with: it takes invalidations and keeps none."""

    def __init__(self):
        self.transform_record_data = self.untransform_record_data = lambda data: data
        self.invalidated = None

    def invalidate(self, tid, oids, version=""):
        if self.invalidated is not None:
            self.invalidated(tid, oids)

    def invalidateCache(self):
        pass


def client(kind, addr, **options):
    """A storage as a thread of an application uses it, connected; its calls are ClientStorage's.

    ZEO's and ours are ClientStorages with an in-memory (rs) or temporary (zeo) cache unless `client` is given; a peer of peers.py is
    given those calls.
    """
    storage = database_storage(kind, addr, **options)
    if kind == "relstorage":
        return _RelStorage(storage)
    storage.registerDB(Database())
    return storage


def database_storage(kind, addr, **options):
    """A storage for `ZODB.DB`."""
    if kind == "relstorage":
        from relstorage.adapters.postgresql import PostgreSQLAdapter
        from relstorage.options import Options
        from relstorage.storage import RelStorage
        settings = Options(keep_history=True, cache_local_mb=200)         # as the others: with history, a cache of 200 MB
        return RelStorage(PostgreSQLAdapter(dsn=addr, options=settings), options=settings)
    if kind == "zodb":
        from ZODB.FileStorage import FileStorage
        return FileStorage(addr)
    if kind == "zeo":
        import uvloop  # noqa: F401  ZEO takes it when it can be imported; without it the comparison would be unfair
        from ZEO.ClientStorage import ClientStorage
    else:
        from zeo_rs import ClientStorage
    options.setdefault("cache_size", 200 << 20)
    options.setdefault("wait_timeout", 60)
    return ClientStorage(addr if isinstance(addr, str) else tuple(addr), **options)


class _RelStorage:
    """RelStorage with a connection of its own for each thread, as a ZODB connection has one.

    `load` is what a ZODB connection calls there for the state of its view, so it stands for `loadBefore`.
    """

    def __init__(self, storage):
        self._storage, self._made, self._local = storage, [], threading.local()

    def _instance(self):
        try:
            return self._local.instance
        except AttributeError:
            instance = self._local.instance = self._storage.new_instance()
            self._made.append(instance)
            instance.poll_invalidations()
            return instance

    def loadBefore(self, oid, before):
        return self._instance().load(oid)

    def __getattr__(self, name):
        return getattr(self._instance(), name)

    def close(self):
        for instance in self._made:
            instance.close()
        self._storage.close()


def job(name):
    family, _, function = name.partition(".")
    if family not in JOBS:
        raise ValueError(f"no job {name}")
    return getattr(importlib.import_module(f"compare.jobs.{family}"), function)


def say(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def serve():
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        try:
            work = job(request["job"])(request["kind"], request["addr"], **request["args"])
            next(work)
            say("ready")
            if not sys.stdin.readline():
                return
            try:
                work.send(None)
            except StopIteration as done:
                say(done.value)
            else:
                raise RuntimeError(f"{request['job']} yields twice")
        except Exception as exc:
            text = f"{type(exc).__name__}: {exc}"
            say({"error": text[:300]})


def main():
    # as the requests of a web server: not on the main thread, where Python runs signal handlers
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
