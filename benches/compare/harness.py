"""Processes of a measurement: servers of either kind, pools of workers, a barrier, the clocks.

Times are taken inside the workers with `perf_counter_ns`, which is CLOCK_MONOTONIC and therefore comparable between the
processes of one machine; this process only starts them at one moment and collects what they report.
"""
import json
import os
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

KINDS = ("zeo", "rs")
PAIRS = (("zeo", "zeo"), ("rs", "rs"))                       # (client, server)
MIXED = PAIRS + (("zeo", "rs"), ("rs", "zeo"))

SERVER_CONF = """\
<zeo>
  address {address}
  msgpack true
  invalidation-queue-size {queue}
  {extra}
</zeo>
<filestorage 1>
  path {path}
  blob-dir {blobs}
</filestorage>
<eventlog>
  level WARNING
  <logfile>
    path {log}
  </logfile>
</eventlog>
"""
MODULES = {"zeo": "ZEO.runzeo", "rs": "zeo_rs.runzeo"}


class Failed(Exception):
    """A measurement that could not be made; its text goes into the table."""


def environment():
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(
        [os.path.dirname(HERE)] + [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]))
    env.setdefault("PYTHONWARNINGS", "ignore")
    return env


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def cpu_seconds(pid):
    """CPU time of a process with all its threads, to the nanosecond (clock_getcpuclockid(3) of another process)."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def use_memory(directory, size):
    """Fills the page cache with `size` bytes and empties it again.

    Pages that a virtual machine has not used for a while have to be found by its host when they are written to, which takes longer
    than anything else a transfer does. Who goes first would use those that are at hand, and the next one pay.
    """
    path, block = os.path.join(directory, "memory.tmp"), bytes(1 << 20)
    with open(path, "wb") as f:
        for _ in range(size >> 20):
            f.write(block)
    os.unlink(path)
    os.sync()


def memory(pid):
    """(resident now, resident at most, private now) in bytes."""
    with open(f"/proc/{pid}/status") as f:
        status = dict(line.split(":", 1) for line in f)
    kib = {k: int(v.split()[0]) for k, v in status.items() if k in ("VmRSS", "VmHWM", "RssAnon")}
    return kib["VmRSS"] * 1024, kib["VmHWM"] * 1024, kib["RssAnon"] * 1024


def forget_peak(pid):
    """Starts the peak of `memory` anew."""
    with open(f"/proc/{pid}/clear_refs", "w") as f:
        f.write("5")


def stop(process, grace=20):
    """SIGTERM by pid, SIGKILL after `grace` seconds."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(grace)


class Server:
    """A server process of one kind on one Data.fs."""

    def __init__(self, kind, path, queue=100, timeout=120, unix=False, shared_cache=True):
        self.kind, self.path = kind, path
        self.directory = os.path.dirname(path)
        self.addr = os.path.join(self.directory, "socket") if unix else ("127.0.0.1", free_port())
        log = os.path.join(self.directory, "server.log")
        conf = os.path.join(self.directory, "zeo.conf")
        with open(conf, "w") as f:
            extra = "shared-cache-size 0" if kind == "rs" and not shared_cache else ""
            f.write(SERVER_CONF.format(extra=extra, address=self.addr if unix else "%s:%s" % self.addr, path=path, queue=queue, log=log,
                                       blobs=os.path.join(self.directory, "blobs")))
        self.log = open(log + ".out", "wb")
        started = time.perf_counter_ns()
        self.process = subprocess.Popen([sys.executable, "-m", MODULES[kind], "-C", conf], env=environment(),
                                        stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.started_in = (self._wait(timeout) - started) / 1e9

    @property
    def pid(self):
        return self.process.pid

    def cpu(self):
        """CPU seconds so far."""
        return cpu_seconds(self.pid)

    def _wait(self, timeout):
        """Waits for the greeting, polling every millisecond, because the start is itself measured."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise Failed(f"{self.kind} server ended with status {self.process.returncode}: {self.tail()}")
            try:
                with self._connect() as sock:
                    sock.settimeout(timeout)
                    if sock.recv(6)[4:5] in (b"M", b"Z"):
                        return time.perf_counter_ns()
            except OSError:
                pass
            time.sleep(0.001)
        stop(self.process, 1)
        raise Failed(f"{self.kind} server did not listen within {timeout} s: {self.tail()}")

    def _connect(self):
        if isinstance(self.addr, tuple):
            return socket.create_connection(self.addr, 5)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(self.addr)
        except OSError:
            sock.close()
            raise
        return sock

    def tail(self):
        self.log.flush()
        with open(self.log.name, "rb") as f:
            lines = f.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"

    def close(self):
        stop(self.process)
        self.log.close()

    def remove(self):
        """Ends it and deletes its files."""
        self.close()
        shutil.rmtree(self.directory, ignore_errors=True)


class Worker:
    """A subprocess that runs jobs of worker.py; it prepares, waits for the start, works and reports."""

    def __init__(self, kind):
        self.kind = kind
        self.stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, "-m", "compare.worker"], env=environment(), bufsize=0,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr)
        self.buffer = b""

    @property
    def pid(self):
        return self.process.pid

    def send(self, message):
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Failed(f"{self.kind} worker is gone: {self._errors()}") from None

    def receive(self, timeout=300):
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.buffer:
                if not selector.select(max(0, deadline - time.monotonic())):
                    self.close(1)
                    raise Failed(f"{self.kind} worker did not answer within {timeout} s")
                data = os.read(self.process.stdout.fileno(), 1 << 20)
                if not data:
                    self.close(1)
                    raise Failed(f"{self.kind} worker is gone: {self._errors()}")
                self.buffer += data
        line, self.buffer = self.buffer.split(b"\n", 1)
        message = json.loads(line)
        if isinstance(message, dict) and "error" in message:
            raise Failed(f"{self.kind} client: {message['error']}")
        return message

    def _errors(self):
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1][:300] if lines else f"status {self.process.poll()}"

    @property
    def alive(self):
        return self.process.poll() is None

    def close(self, grace=5):
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(grace)
        except subprocess.TimeoutExpired:
            stop(self.process, grace)


class Bench:
    """What a family of measurements gets: options, databases, servers, workers, the list of results."""

    def __init__(self, options):
        self.options = options
        self.data_dir = options.data
        self.work_dir = tempfile.mkdtemp(prefix="run-", dir=options.data)
        self.results, self.idle, self.servers = [], {}, []
        self.limits, self.chosen, self.broken = None, set(), False

    # sizes ------------------------------------------------------------------------------------------------------
    def size(self, quick, normal, large=None):
        if self.options.quick:
            return quick
        return large if self.options.large and large is not None else normal

    @property
    def rounds(self):
        return self.options.rounds or self.size(2, 5)

    # processes --------------------------------------------------------------------------------------------------
    def directory(self, name):
        return tempfile.mkdtemp(prefix=name + "-", dir=self.work_dir)

    def server(self, kind, source, index=True, **kw):
        from . import data
        server = Server(kind, data.copy(source, self.directory(kind), index), **kw)
        self.servers.append(server)
        return server

    def both(self, source, **kw):
        """One server of each kind, each on its own copy."""
        return {kind: self.server(kind, source, **kw) for kind in KINDS if kind in self.options.kinds}

    def all(self, source, **kw):
        """Those and the peers beyond ZEO."""
        from . import peers
        made = peers.servers(self, source)
        self.servers += made.values()
        return {**self.both(source, **kw), **made}

    def discard(self, servers):
        for server in servers.values() if isinstance(servers, dict) else servers:
            server.remove()
            if server in self.servers:
                self.servers.remove(server)

    def workers(self, kind, count):
        pool = self.idle.setdefault(kind, [])
        pool[:] = [worker for worker in pool if worker.alive]
        while len(pool) < count:
            pool.append(Worker(kind))
        return pool[:count]

    def fresh_worker(self, kind):
        return Worker(kind)

    def run(self, kind, server, jobs, timeout=300, during=None):
        """Runs one job a worker: all prepare, all start together; returns what each reports.

        `jobs` is a list of (name, arguments). `during()` is called once they have been started.
        """
        workers = self.workers(kind, len(jobs))
        return run_on(workers, server.addr, jobs, timeout, during)

    def steps(self, *functions):
        """Calls those of a family's functions that `--only FAMILY.FUNCTION` chose; without it all of them."""
        for function in functions:
            if not self.chosen or function.__name__ in self.chosen:
                yield function

    def pairs(self, mixed=False):
        kinds = self.options.kinds
        return [pair for pair in (MIXED if mixed else PAIRS) if pair[0] in kinds and pair[1] in kinds]

    def peers(self, servers, shared=False):
        """The pairs of those peers (peers.py) that are among the servers; with `shared` those that have a server to share."""
        from .peers import PEERS
        return [pair for pair in PEERS if pair[1] in servers and not (shared and pair[0] == "zodb")]

    # results ----------------------------------------------------------------------------------------------------
    def alternate(self, family, name, unit, measure, pairs, better="lower", limit=None, target="", rounds=None,
                  scale=1.0, note=""):
        """Measures A B A B ...: `measure(client kind, server kind)` returns a number, or a dict of numbers by suffix.

        Before each round `limit()` is measured, or those of a dict by suffix; the other texts may be such dicts as well.
        """
        values, errors, limits = {}, {}, {}
        for _ in range(rounds or self.rounds):
            for suffix, function in (limit if isinstance(limit, dict) else {"": limit}).items():
                if function is not None:
                    limits.setdefault(suffix, []).append(function() * scale)
            for pair in pairs:
                key = "/".join(pair) if isinstance(pair, tuple) else pair
                if key in errors:
                    continue
                try:
                    got = measure(*pair) if isinstance(pair, tuple) else measure(pair)
                except Failed as exc:
                    errors[key] = str(exc)
                    print(f"  {name} {key}: {exc}", flush=True)
                    continue
                for suffix, value in (got if isinstance(got, dict) else {"": got}).items():
                    values.setdefault(suffix, {}).setdefault(key, []).append(value * scale)
        for suffix in values or {"": {}}:
            targets = target if isinstance(target, dict) else {"": target}
            units = unit if isinstance(unit, dict) else {}
            betters = better if isinstance(better, dict) else {}
            self.results.append({
                "family": family, "name": f"{name} {suffix}".strip(), "note": note,
                "unit": units.get(suffix, unit if isinstance(unit, str) else ""),
                "better": betters.get(suffix, better if isinstance(better, str) else "lower"),
                "values": values.get(suffix, {}), "errors": errors,
                "limit": statistics.median(limits[suffix]) if suffix in limits else None, "target": targets.get(suffix, ""),
            })
            from . import report
            print("  " + report.line(self.results[-1]), flush=True)

    def close(self):
        for pool in self.idle.values():
            for worker in pool:
                worker.close()
        for server in self.servers:
            server.remove()
        shutil.rmtree(self.work_dir, ignore_errors=True)


def run_on(workers, addr, jobs, timeout=300, during=None):
    """One job a worker; what `Bench.run` does, for workers of different kinds. `addr`: of all, or a tuple of one each."""
    addrs = addr if isinstance(addr[0], tuple) else (addr,) * len(workers)
    try:
        for worker, addr, (name, arguments) in zip(workers, addrs, jobs):
            worker.send({"job": name, "kind": worker.kind, "addr": addr, "args": arguments})
        for worker in workers:
            worker.receive(timeout)
        for worker in workers:
            worker.send("go")
        if during is not None:
            during()
        return [worker.receive(timeout) for worker in workers]
    except BaseException:
        for worker in workers:                      # their conversation is out of step: start new ones next time
            worker.close(0.1)
        raise


def throughput(reports):
    """Operations a second of workers that ran side by side: all of the work over the whole time."""
    begin = min(r["begin"] for r in reports)
    end = max(r["end"] for r in reports)
    return sum(r["count"] for r in reports) / ((end - begin) / 1e9)
