"""The engine in-process beside ZODB's own FileStorage: no sockets, one Python process each."""
from . import data
from .harness import run_on


def run(bench):
    objects = bench.size(20_000, 1_000_000, 10_000_000)
    source = data.database(bench.data_dir, objects)
    for step in bench.steps(opened, index_memory, load, load_beside_commits, iterate, commit, pack):
        step(bench, source, objects)


def engines(bench):
    return [kind for kind in ("zodb", "rs") if kind in bench.options.kinds or kind == "zodb" and "zeo" in bench.options.kinds]


def job(bench, kind, name, path, timeout=1800, **arguments):
    worker = bench.fresh_worker(kind)
    try:
        report, = run_on([worker], ("", 0), [(f"engine.{name}", dict(arguments, path=path))], timeout)
        return report
    finally:
        worker.close()


def copies(bench, source):
    return {kind: data.copy(source, bench.directory(kind)) for kind in engines(bench)}


def reading(bench, source):
    """Seconds to read the whole file out of the page cache."""
    return bench.limits.pread(source, 1 << 20) * data.size(source) / (1 << 20)


def opened(bench, source, objects):
    paths = copies(bench, source)
    for index in (True, False):
        bench.alternate("FileStorage", f"open {'with' if index else 'without'} index, {objects} objects", "ms",
                        lambda kind: job(bench, kind, "opened", paths[kind], index=index)["ns"] / 1e6, engines(bench),
                        rounds=min(3, bench.rounds), target=">= 1x" if index else ">= 8x",
                        limit=None if index else lambda: reading(bench, source) * 1e3,
                        note="" if index else "limit: reading the file from the page cache")


def index_memory(bench, source, objects):
    few = bench.size(20_000, 300_000)
    for what, database, count, target in (("sequential", source, objects, "<= 10 bytes"),
                                          ("random", data.scattered(bench.data_dir, few), few, "<= 24 bytes")):
        paths = copies(bench, database)
        bench.alternate("FileStorage", f"memory of an open storage, an object, {what} oids", "bytes",
                        lambda kind: job(bench, kind, "index_memory", paths[kind])["bytes"] / count, engines(bench),
                        rounds=1, target=target)


def load(bench, source, objects):
    paths, count = copies(bench, source), bench.size(5000, 100_000)
    bench.alternate("FileStorage", "loadBefore, 1 thread", "us",
                    lambda kind: job(bench, kind, "load", paths[kind], first=data.first_leaf(objects), objects=objects,
                                     count=count)["ns"] / count / 1e3, engines(bench), target=">= 3x",
                    limit=lambda: bench.limits.pread(source, 300) * 1e6, note="limit: one pread of the same bytes")


def load_beside_commits(bench, source, objects):
    paths, seconds = copies(bench, source), bench.size(1, 3)
    bench.alternate("FileStorage", "loadBefore, 4 threads beside a committing one", {"": "1/s", "commits": "1/s", "p99": "us"},
                    lambda kind: job(bench, kind, "beside", paths[kind], first=data.first_leaf(objects), objects=objects,
                                     seconds=seconds, threads=4)["rates"], engines(bench),
                    better={"": "higher", "commits": "higher"}, target={"": ">= 10x"})


def iterate(bench, source, objects):
    paths = copies(bench, source)
    bench.alternate("FileStorage", f"iterate all records, {objects} objects", "ms",
                    lambda kind: job(bench, kind, "iterate", paths[kind])["ns"] / 1e6, engines(bench),
                    rounds=min(3, bench.rounds), target=">= 5x",
                    limit=lambda: reading(bench, source) * 1e3,
                    note="limit: reading the file from the page cache")


def commit(bench, source, objects):
    paths = copies(bench, source)
    for count, target in ((1, ""), (10_000, ">= 5x")):
        bench.alternate("FileStorage", f"commit of {count} object{'s' * (count > 1)}", "us" if count == 1 else "ms",
                        lambda kind: job(bench, kind, "commit", paths[kind], count=count)["ns"] / (1e3 if count == 1 else 1e6),
                        engines(bench), target=target, limit=lambda: bench.limits.sync(count * 300) * (1e6 if count == 1 else 1e3),
                        note="limit: one write of the bytes with fdatasync")


def pack(bench, source, objects):
    for gc, target in ((True, ">= 10x"), (False, ">= 5x")):
        def measure(kind):
            path = data.copy(source, bench.directory(kind))
            report = job(bench, kind, "pack", path, gc=gc)
            data.remove(path)
            return {"": report["ns"] / 1e6, "memory": report["bytes"] / 1e6}
        bench.alternate("FileStorage", f"pack {'with' if gc else 'without'} gc, {objects} objects",
                        {"": "ms", "memory": "MB"}, measure, engines(bench), rounds=min(2, bench.rounds),
                        target={"": target, "memory": "below ZODB's"}, note="memory: growth at the peak")
