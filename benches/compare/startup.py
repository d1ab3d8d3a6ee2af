"""Start of a server with and without an index, its memory, pack through a client."""
import os
import subprocess
import sys
import time

from . import data
from .harness import KINDS, Server, environment, forget_peak, memory


def run(bench):
    objects = bench.size(20_000, 1_000_000, 10_000_000)
    source = data.database(bench.data_dir, objects)
    for step in bench.steps(start, pack):
        step(bench, source, objects)


def imports_seconds():
    """A bare interpreter that imports what every server needs of ZODB: nothing written in Python starts faster."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import ZODB.config, zdaemon.zdoptions"], env=environment(), check=True)
    return time.perf_counter() - begin


def start(bench, source, objects):
    paths = {kind: data.copy(source, bench.directory(kind)) for kind in KINDS if kind in bench.options.kinds}
    for index in (True, False):
        def measure(kind):
            path = paths[kind]
            if not index and os.path.exists(path + ".index"):
                os.unlink(path + ".index")
            server = Server(kind, path, timeout=900)
            try:
                return {"": server.started_in * 1e3, "server memory": memory(server.pid)[0] / 1e6}
            finally:
                server.close()
        bench.alternate("start and pack", f"server start {'with' if index else 'without'} index, {objects} objects",
                        {"": "ms", "server memory": "MB"}, measure, list(paths), rounds=min(3, bench.rounds),
                        limit={"": lambda: imports_seconds() * 1e3}, note="limit: importing ZODB.config in a bare interpreter")


def pack(bench, source, objects):
    def measure(client, server):
        target = bench.server(server, source, timeout=900)
        try:
            forget_peak(target.pid)
            before = memory(target.pid)[0]
            report, = bench.run(client, target, [("latency.pack", {})], timeout=1800)
            return {"": (report["end"] - report["begin"]) / 1e6, "server memory": (memory(target.pid)[1] - before) / 1e6}
        finally:
            bench.discard([target])
    bench.alternate("start and pack", f"pack with gc, {objects} objects, seen from a client",
                    {"": "ms", "server memory": "MB"}, measure, bench.pairs(), rounds=min(2, bench.rounds),
                    target={"": ">= 10x", "server memory": "below ZODB's"}, note="memory: growth at the peak")
