"""The client side of a measurement: a process that runs one job after the other.

A line of JSON names the job; its generator prepares up to the first `yield` (reported as ready), goes on at the line "go", and
returns its report. `python -m compare.worker` is started by harness.py only.
"""
import importlib
import json
import sys

JOBS = ("application", "blobs", "commits", "engine", "latency", "loads", "sync")


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
    """A connected ClientStorage of one kind with an in-memory (rs) or temporary (zeo) cache unless `client` is given."""
    if kind == "zeo":
        import uvloop  # noqa: F401  ZEO takes it when it can be imported; without it the comparison would be unfair
        from ZEO.ClientStorage import ClientStorage
    else:
        from zeo_rs import ClientStorage
    options.setdefault("cache_size", 200 << 20)
    options.setdefault("wait_timeout", 60)
    storage = ClientStorage(tuple(addr), **options)
    storage.registerDB(Database())
    return storage


def job(name):
    family, _, function = name.partition(".")
    if family not in JOBS:
        raise ValueError(f"no job {name}")
    return getattr(importlib.import_module(f"compare.jobs.{family}"), function)


def say(message):
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main():
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


if __name__ == "__main__":
    main()
