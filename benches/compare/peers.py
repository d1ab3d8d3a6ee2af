"""Peers beyond ZEO: RelStorage on a PostgreSQL of its own, and ZODB's FileStorage inside the client's process.

Both are columns for reference. A peer that cannot be had on this machine is shown as failed with the reason.
"""
import glob
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time

from . import data
from .harness import Failed, Worker, free_port, run_on

PEERS = (("relstorage", "postgresql"), ("zodb", "in-process"))           # (client, server), as harness.PAIRS
SETTINGS = {"shared_buffers": "512MB", "max_connections": "200", "max_wal_size": "4GB", "logging_collector": "off"}


def programs():
    """The directory of initdb and postgres."""
    found = shutil.which("initdb")
    places = [os.path.dirname(found)] if found else sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    for place in places:
        if os.path.exists(os.path.join(place, "initdb")) and os.path.exists(os.path.join(place, "postgres")):
            return place
    raise Failed("PostgreSQL is not installed (Debian: apt-get install postgresql)")


class Postgres:
    """A PostgreSQL server on an empty cluster; `addr` is its libpq connection string.

    PostgreSQL does not run as root: then its files and processes belong to the user `postgres`.
    """

    def __init__(self, directory):
        place, self.log = programs(), None
        self.user = None
        if os.geteuid() == 0:
            try:
                self.user = pwd.getpwnam("postgres")
            except KeyError:
                raise Failed("PostgreSQL does not run as root, and there is no user postgres") from None
            os.chown(directory, self.user.pw_uid, self.user.pw_gid)
            if self._run("test", "-w", directory).returncode:
                directory = tempfile.mkdtemp(prefix="postgres-")          # below a directory closed to other users
                os.chown(directory, self.user.pw_uid, self.user.pw_gid)
        self.directory, self.port = directory, free_port()
        cluster = os.path.join(directory, "cluster")
        made = self._run(f"{place}/initdb", "-D", cluster, "-A", "trust", "-U", "bench", "-E", "UTF8", "--locale=C")
        if made.returncode:
            raise Failed(f"initdb: {made.stderr.strip().splitlines()[-1:]}")
        settings = dict(SETTINGS, port=self.port, listen_addresses="127.0.0.1", unix_socket_directories=directory)
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        self.log = open(os.path.join(directory, "server.log"), "wb")
        self.process = subprocess.Popen([f"{place}/postgres", "-D", cluster, *options], stdin=subprocess.DEVNULL, stdout=self.log,
                                        stderr=self.log, cwd="/", **self._identity())
        self.addr = f"host=127.0.0.1 port={self.port} user=bench dbname=postgres"
        self._wait()

    def _identity(self):
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []} if self.user else {}

    def _run(self, *command):
        return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/", **self._identity())

    def _wait(self, timeout=60):
        import psycopg2
        deadline = time.monotonic() + timeout
        while True:
            try:
                psycopg2.connect(self.addr).close()
                return
            except psycopg2.OperationalError as exc:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"PostgreSQL did not start: {exc}") from None
                time.sleep(0.05)

    def analyze(self):
        """Statistics for the planner, as a database that has run for a day has them."""
        import psycopg2
        connection = psycopg2.connect(self.addr)
        try:
            connection.autocommit = True
            connection.cursor().execute("VACUUM ANALYZE")
        finally:
            connection.close()

    def cpu(self):
        """CPU seconds so far of all its processes, also those that have ended."""
        total = _stat(self.process.pid, True)
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                total += _stat(int(entry), False, parent=self.process.pid)
        return total

    def remove(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)                       # its fast shutdown
            self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _stat(pid, children, parent=None):
    """CPU seconds of a process if `parent` is its parent, with those of the children it has waited for if asked."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    if parent is not None and int(fields[1]) != parent:
        return 0.0
    return sum(map(int, fields[11:15 if children else 13])) / os.sysconf("SC_CLK_TCK")


class InProcess:
    """No server: the client opens this copy of the Data.fs itself."""

    def __init__(self, path):
        self.addr = path
        self.directory = os.path.dirname(path)

    def cpu(self):
        return 0.0

    def remove(self):
        shutil.rmtree(self.directory, ignore_errors=True)


class Missing:
    """Stands for a peer that could not be had; asking it for its address says why."""

    def __init__(self, reason):
        self.reason = reason

    @property
    def addr(self):
        raise Failed(self.reason)

    def remove(self):
        pass


def servers(bench, source):
    """The chosen peers with the content of `source`, by the name of the server."""
    made = {}
    for client, server in PEERS:
        if client not in bench.options.kinds:
            continue
        if client == "zodb":
            made[server] = InProcess(data.copy(source, bench.directory(client)))
            continue
        try:
            made[server] = Postgres(bench.directory(client))
        except (Failed, ImportError, OSError, subprocess.SubprocessError) as exc:
            made[server] = Missing(str(exc))
            continue
        filler = Worker(client)
        try:
            run_on([filler], made[server].addr, [("shootout.fill", {"source": source})], timeout=3600)
        finally:
            filler.close(30)
        made[server].analyze()
    return made
