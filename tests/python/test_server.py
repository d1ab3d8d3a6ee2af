"""A server process as its operator sees it: limits, log, sockets from systemd, memory, configuration; and embedded ones."""

import asyncio
import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import transaction
import ZConfig
import ZEO
import ZEO.nagios
import ZODB
import ZODB.event
from rawpeer import Raw
from test_cli import Serving, run

import zeo_rs
import zeo_rs.aio
from zeo_rs.cli.status import ask
from zeo_rs.config import client_address, load_server_text
from zeo_rs.events import Closed, Serving as ServingEvent

Z64 = bytes(8)
OID = bytes(7) + b"\x05"


@contextlib.contextmanager
def serving(tmp_path, *keys, storage=None, arguments=(), environment=None):
    """A server process of `<zeo>` with these keys; `log()` is what it has logged so far, once it was told to go on."""
    storage = storage or f"<filestorage>\n  path {tmp_path}/Data.fs\n</filestorage>"
    config = tmp_path / "zeo.conf"
    log = f"<eventlog>\n  level info\n  <logfile>\n    path {tmp_path}/log\n  </logfile>\n</eventlog>\n"
    config.write_text("<zeo>\n  address 127.0.0.1:0\n  %s\n</zeo>\n%s\n%s" % ("\n  ".join(keys), storage, log))
    server = Serving("-C", config, *arguments, environment=environment)
    server.address = client_address(server.addresses[0])
    try:
        yield server
    finally:
        if server.process.poll() is None:
            assert server.end() == 0, server.stderr


def log_of(server, tmp_path):
    """The whole log, after its end."""
    assert server.end() == 0
    return (tmp_path / "log").read_text()


def vote(peer, key, oid=OID, data=b"x", serial=Z64):
    """Begins, stores and asks for the vote; answers the id of that call."""
    peer.cast("tpc_begin", key, b"", b"", {}, None, " ")
    peer.cast("storea", oid, serial, data, key)
    return peer.send("vote", key)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- limits


def test_connections_are_limited_over_all_addresses(tmp_path):
    with serving(tmp_path, f"address {tmp_path}/s", "max-connections 2") as server:
        with Raw(server.address) as one, Raw(str(tmp_path / "s")) as two:
            for address in (server.address, str(tmp_path / "s")):
                with pytest.raises((EOFError, ConnectionError)):
                    Raw(address)
            assert one.call("ping") is None and two.call("ping") is None
        # a place is free again when the server has noticed
        wait_until(lambda: "1" in _status_or_nothing(server.address))
        assert "too many connections (max-connections)" in log_of(server, tmp_path)


def _status_or_nothing(address):
    try:
        return ask(address, 20)
    except (OSError, ValueError):
        return {}


def test_frames_transactions_and_iterators_are_limited(tmp_path):
    keys = ("max-frame-size 1MB", "max-transaction-size 2KB", "max-iterators 3")
    with serving(tmp_path, *keys) as server, Raw(server.address) as other:
        with Raw(server.address) as peer:
            peer.socket.sendall(b"\x00\x10\x00\x01")  # a frame of 1 MB and one byte
            peer.until_closed()
        with Raw(server.address) as peer:
            vote(peer, 1, data=b"x" * 4000)
            peer.until_closed()
        with Raw(server.address) as peer:
            iterators = [peer.call("iterator_start", None, None) for _ in range(3)]
            with pytest.raises(RuntimeError, match="more than 3 iterators are open"):
                peer.call("iterator_start", None, None)
            peer.call("iterator_gc", iterators[:1])
            peer.call("iterator_start", None, None)
        assert other.call("ping") is None
        log = log_of(server, tmp_path)
    assert "limit of 2048 bytes (max-transaction-size)" in log
    assert re.search(r"1048577.*1048576", log), log


@pytest.mark.parametrize("how", ["limit", "timeout"])
def test_a_client_that_does_not_read_is_dropped_and_nobody_else_notices(tmp_path, how):
    # less than the invalidation of one transaction, which everybody is given the time to read
    key = "max-unread-invalidations 100KB" if how == "limit" else "peer-timeout 2"
    with serving(tmp_path, key) as server, Raw(server.address) as writer, Raw(server.address) as reader:
        sleeper = Raw(server.address)
        sleeper.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        # the invalidations of many objects, until the sockets' buffers are full and the server has to keep them
        oids = [number.to_bytes(8, "big") for number in range(1, 20_001)]
        serials = dict.fromkeys(oids, Z64)
        deadline = time.monotonic() + 240
        count = 0
        while ask(server.address, 20)["1"]["connections"] == 3:
            assert time.monotonic() < deadline
            count += 1
            writer.cast("tpc_begin", count, b"", b"", {}, None, " ")
            writer.cast_all(("storea", oid, serials[oid], b"x", count) for oid in oids)
            writer.call("vote", count)
            tid = writer.call("tpc_finish", count)
            serials = dict.fromkeys(oids, tid)
            assert reader.call("ping") is None
        assert reader.call("lastTransaction") == tid
        sleeper.close()
        log = log_of(server, tmp_path)
    assert ("does not read its invalidations" in log) == (how == "limit"), log


def test_a_silent_connection_is_closed(tmp_path):
    with serving(tmp_path, "handshake-timeout 0.5") as server:
        with socket.create_connection(server.address, 30) as silent:
            assert len(silent.recv(6)) > 0
            silent.settimeout(30)
            assert silent.recv(10) == b""


def test_a_thousand_idle_connections_are_cheap(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4096:
        pytest.skip("too few file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    try:
        with serving(tmp_path) as server:
            before = resident(server.process.pid)
            with contextlib.ExitStack() as stack:
                peers = [stack.enter_context(Raw(server.address)) for _ in range(1000)]
                # each has said something and been answered; all of them have read an invalidation
                first = peers[0]
                first.answer(vote(first, 1))
                tid = first.call("tpc_finish", 1)
                assert all(peer.call("lastTransaction") == tid for peer in peers)
                used = resident(server.process.pid) - before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    print(f"1000 idle connections: {used / 1024:.1f} MB")
    assert used < 50 * 1024


def resident(pid):
    """kB"""
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1])


# -- log


def test_slow_operations_are_logged(tmp_path):
    with serving(tmp_path, "slow-operation 0.2") as server, Raw(server.address) as one, Raw(server.address) as two:
        one.cast("set_client_label", "web 7")
        two.cast("set_client_label", "batch")
        one.answer(vote(one, 1))
        waiting = vote(two, 1)
        wait_until(lambda: ask(server.address, 20)["1"]["waiting"] == 1)
        time.sleep(0.3)
        one.call("tpc_abort", 1)
        two.answer(waiting)
        two.call("tpc_abort", 1)
        log = log_of(server, tmp_path)
    # on a busy machine others may be slow as well
    (line,) = (line for line in re.findall(r".*slow operation.*", log) if "label=batch" in line and "call=vote" in line)
    assert "storage=1" in line and "client=127.0.0.1:" in line
    assert float(re.search(r"seconds=([\d.]+)", line)[1]) >= 0.2


def test_slow_loads_name_their_object_and_do_not_flood(tmp_path):
    keys = ("slow-operation 0.0000000001", "http-address 127.0.0.1:0")
    with serving(tmp_path, *keys) as server, Raw(server.address) as peer:
        for _ in range(500):
            with pytest.raises(RuntimeError):
                peer.call("loadBefore", OID, b"\x7f" + b"\xff" * 7)
        log = log_of(server, tmp_path)
    lines = re.findall(r".*slow operation.*", log)
    assert 1 <= len(lines) <= 20
    assert any("call=loadBefore" in line and "oid=" in line and "tid=" in line for line in lines), log


def test_no_slow_operations_if_told_so(tmp_path):
    with serving(tmp_path, "slow-operation 5", arguments=("--slow-operation", "0")) as server, Raw(server.address) as peer:
        peer.call("ping")
        assert "slow operation" not in log_of(server, tmp_path)


def test_a_transaction_that_holds_its_locks_too_long(tmp_path):
    # long enough to finish, on a busy machine, what was just voted
    with serving(tmp_path, "transaction-timeout 4") as server, Raw(server.address) as one, Raw(server.address) as two:
        one.cast("set_client_label", "web 7")
        one.answer(vote(one, 1))
        waiting = vote(two, 1)
        two.answer(waiting)  # when the other is gone
        one.until_closed()
        two.call("tpc_finish", 1)
        log = log_of(server, tmp_path)
    (line,) = re.findall(r".*transaction timeout.*", log)
    assert "CRITICAL" in line and "label=web 7" in line and "storage=1" in line
    assert float(re.search(r"age=([\d.]+)s", line)[1]) >= 4
    assert "client=127.0.0.1:" in line


def test_who_holds_and_who_waits(tmp_path):
    with serving(tmp_path, "http-address 127.0.0.1:0") as server, Raw(server.address) as one, Raw(server.address) as two:
        one.cast("set_client_label", "web 7")
        two.cast("set_client_label", "batch")
        one.answer(vote(one, 1))
        waiting = vote(two, 1)
        wait_until(lambda: one.call("server_status")["waiting"] == 1)
        status = one.call("server_status")
        (holder, waiter) = status["locks"]
        assert "(web 7)" in holder["client"] and not holder["waiting"] and holder["objects"] == 1
        assert "(batch)" in waiter["client"] and waiter["waiting"]
        shown = run("status", server.addresses[0])[1]
        assert re.search(r"\(web 7\) holds 1 object for [\d.]+ s", shown), shown
        assert re.search(r"\(batch\) waits for 1 object for [\d.]+ s", shown), shown
        one.call("tpc_abort", 1)
        two.answer(waiting)


def test_scans_do_not_fill_the_log(tmp_path):
    with serving(tmp_path) as server:
        for number in range(100):
            with socket.create_connection(server.address, 30) as scan:
                if number % 3 == 1:
                    scan.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                    scan.recv(100)
                elif number % 3 == 2:
                    scan.sendall(b"\x16\x03\x01\x00\xa5\x01\x00")
                    scan.recv(100)
            if number % 10 == 0:
                ask(server.address, 20)
        log = log_of(server, tmp_path)
    # the first few say what comes; whoever only looks whether the port is open, or asks `ruok`, is in no line
    assert 1 <= log.count("127.0.0.1:") - log.count("listening") <= 15, log


def test_a_label_with_lines_is_one_line_of_a_json_log(tmp_path):
    server = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", "--json-log")
    with Raw(client_address(server.addresses[0])) as peer:
        peer.cast("set_client_label", 'a\n"b" \u00e9')
        peer.call("ping")
    assert server.end() == 0
    lines = [json.loads(line) for line in server.stderr.splitlines()]
    (line,) = [line for line in lines if line["message"] == "client label"]
    assert line["label"] == 'a\\n"b" \u00e9' and line["client"].startswith("127.0.0.1:"), line


# -- sockets from systemd


#: puts inherited descriptors where systemd does, and says whose they are
SHIM = """
import os, sys
sockets, listen_pid, command = sys.argv[1].split(), sys.argv[2], sys.argv[3:]
for at, number in enumerate(map(int, sockets)):
    os.dup2(number, 3 + at)
    os.close(number)
os.environ["LISTEN_PID"] = listen_pid or str(os.getpid())
os.execv(sys.executable, [sys.executable, *command])
"""


class Activated:
    """A server process that was started as systemd does it: with listening sockets from descriptor 3 on."""

    def __init__(self, tmp_path, sockets, names, keys=(), listen_pid=None):
        config = tmp_path / "zeo.conf"
        config.write_text("<zeo>\n%s\n</zeo>\n<mappingstorage>\n</mappingstorage>\n" % "\n".join(keys))
        reading, writing = os.pipe()
        # high numbers, so that nothing is overwritten on the way to 3, 4, ...
        spare = [os.dup2(number, 200 + at) for at, number in enumerate([*(s.fileno() for s in sockets), writing])]
        *numbers, ready = map(str, spare)
        command = ["-m", "zeo_rs.cli", "serve", "-C", str(config), "--ready-fd", ready]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SHIM, " ".join(numbers), str(listen_pid or ""), *command],
            pass_fds=spare,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": ":".join(names)},
        )
        for number in (*spare, writing):
            os.close(number)
        with os.fdopen(reading) as ready:
            self.addresses = ready.read().split()

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        _, self.stderr = self.process.communicate(timeout=60)
        return self.process.returncode


def listening(family=socket.AF_INET, address=("127.0.0.1", 0)):
    sock = socket.socket(family)
    sock.bind(address)
    sock.listen(100)
    return sock


def test_sockets_of_systemd_are_served(tmp_path):
    path = str(tmp_path / "s")
    with listening() as tcp, listening(socket.AF_UNIX, path) as unix, listening() as http:
        # a client that comes before the server has started waits in the socket
        early = socket.create_connection(tcp.getsockname(), 30)
        server = Activated(tmp_path, [tcp, unix, http], ["zeo", "zeo", "http"])
        try:
            assert early.recv(6)[4:] in (b"M5", b"Z5")
            early.close()
            assert server.addresses == ["%s:%s" % tcp.getsockname(), path], server.process.poll()
            for address in (tcp.getsockname(), path):
                with Raw(address) as peer:
                    assert peer.call("ping") is None
            with socket.create_connection(http.getsockname(), 30) as operator:
                operator.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                assert operator.recv(100).startswith(b"HTTP/1.0 200")
        finally:
            assert server.end() == 0, server.stderr
        # they are systemd's: the next start serves the same ones
        assert os.path.exists(path)
        server = Activated(tmp_path, [tcp, unix, http], ["zeo", "zeo", "http"])
        with Raw(path) as peer:
            assert peer.call("ping") is None
        assert server.end() == 0, server.stderr


def test_a_socket_of_systemd_takes_the_place_of_its_address(tmp_path):
    path = str(tmp_path / "s")
    with listening() as tcp, listening(socket.AF_UNIX, path) as unix:
        port = tcp.getsockname()[1]
        keys = [f"address localhost:{port}", "address 127.0.0.1:0", f"address {path}"]
        server = Activated(tmp_path, [tcp, unix], ["", ""], keys)
        try:
            assert len(server.addresses) == 3, server.process.poll()
            assert server.addresses[0] == f"localhost:{port}" and server.addresses[2] == path
            for address in (tcp.getsockname(), client_address(server.addresses[1]), path):
                with Raw(address) as peer:
                    assert peer.call("ping") is None
        finally:
            assert server.end() == 0, server.stderr
        assert os.path.exists(path)


def test_sockets_for_another_process_are_not_taken(tmp_path):
    with listening() as tcp:
        server = Activated(tmp_path, [tcp], [""], ["address 127.0.0.1:0"], listen_pid=1)
        try:
            assert len(server.addresses) == 1
            assert client_address(server.addresses[0]) != tcp.getsockname()
        finally:
            assert server.end() == 0, server.stderr


# -- configuration


def zeo_schema():
    return ZConfig.loadSchema(os.path.join(os.path.dirname(ZEO.__file__), "schema.xml"))


#: a value of each key of ZEO's `<zeo>` that is none of the usual kinds
VALUES = {
    "address": "127.0.0.1:8100",
    "pid-filename": "/tmp/zeo.pid",
    "certificate": "{cert}",
    "key": "{cert}",
    "authenticate": "DYNAMIC",
    "password-function": "zeo_rs.config.at_least_one",
    "program": "/bin/true",
    "directory": "/tmp",
    "socket-name": "/tmp/zdsock",
    "exit-codes": "0,2",
    "user": "nobody",
    "umask": "022",
    "transcript": "/tmp/transcript",
    "logfile": "/tmp/log",
    "path": "STDOUT",
    "prompt": "zeo>",
    "start-test-program": "/bin/true",
    "python": "/usr/bin/python3",
    "zdrun": "/bin/true",
    "level": "info",
    "style": "classic",
    "format": "%(message)s",
    "dateformat": "%H",
    "formatter": "logging.Formatter",
    "when": "D",
    "encoding": "utf-8",
}


def keys_of(schema, kind):
    for name, info in schema.gettype(kind):
        if name not in (None, "*", "+") and not info.issection():
            yield name, info, VALUES.get(name, "1")


@pytest.mark.parametrize("kind", ["zeo", "ssl", "runner", "eventlog", "logfile"])
def test_every_key_of_zeos_schema_is_accepted(kind, tmp_path):
    cert = os.path.join(os.path.dirname(__file__), "..", "fixtures", "tls", "server-and-key.pem")
    schema = zeo_schema()
    keys = list(keys_of(schema, kind))
    assert keys
    for name, info, value in keys:
        value = value.format(cert=cert) if "{cert}" in value else value
        if info.datatype is schema.registry.get("boolean"):
            value = "yes"
        inner = f"{name} {value}"
        if kind == "ssl":
            given = {"certificate": cert, "authenticate": "DYNAMIC", name: value}
            given.update(key=cert)
            inner = "\n".join(f"{key} {value}" for key, value in given.items())
        zeo = "address 1" if (kind, name) != ("zeo", "address") else ""
        sections = {"zeo": inner if kind == "zeo" else "", "runner": "program /bin/true", "logfile": "path STDOUT"}
        if kind == "ssl":
            sections["zeo"] = f"<ssl>\n{inner}\n</ssl>"
        if kind == "runner":
            sections["runner"] = "\n".join(dict.fromkeys(["program /bin/true", inner])) if name != "program" else inner
        if kind == "logfile":
            # rotation needs a number of old files
            more = {"old-files": "max-size 1MB", "when": "old-files 2", "max-size": "old-files 2", "interval": "when D\nold-files 2"}
            more = more.get(name, "")
            sections["logfile"] = inner if name == "path" else f"path {tmp_path}/log\n{inner}\n{more}"
        text = (
            f"<zeo>\n{zeo}\n{sections['zeo']}\n</zeo>\n<mappingstorage>\n</mappingstorage>\n"
            f"<runner>\n{sections['runner']}\n</runner>\n"
            f"<eventlog>\n{inner if kind == 'eventlog' else ''}\n<logfile>\n{sections['logfile']}\n</logfile>\n</eventlog>\n"
        )
        settings = load_server_text(text)
        assert settings.storages and not settings.warnings, name


def test_defaults_are_those_of_zeo():
    """But for the transaction timeout, which is unsafe in ZEO (docs/operations.md)."""
    text = "<zeo>\naddress 1\n</zeo>\n<mappingstorage>\n</mappingstorage>\n"
    ours = load_server_text(text).options
    for name, info in zeo_schema().gettype("zeo"):
        if name in ("read-only", "invalidation-queue-size", "client-conflict-resolution"):
            default = info.getdefault().convert(info.datatype)
            assert ours[name.replace("-", "_")] == default, name
    assert "invalidation_age" not in ours and "transaction_timeout" not in ours


def test_every_option_is_documented():
    here = os.path.dirname(__file__)
    with open(os.path.join(here, "..", "..", "docs", "operations.md")) as file:
        page = file.read()
    from zeo_rs import config

    missing = [name for name, *_ in keys_of(config.schema(), "zeo") if f"`{name}`" not in page and "auth" not in name]
    assert not missing
    options = set(re.findall(r"(--[a-z][a-z-]+|(?<=[ \[])-[A-Za-z]\b)", run("serve", "--help")[1]))
    assert not [option for option in options if f"`{option}" not in page]


def test_nagios_finds_its_fields(tmp_path, capsys):
    with serving(tmp_path) as server:
        address = "%s:%s" % server.address
        assert ZEO.nagios.main([address]) == 1 and "Empty storage '1'" in capsys.readouterr().out
        connection = zeo_rs.connection(server.address)
        connection.root()["x"] = 1
        transaction.commit()
        status = tmp_path / "status"
        for _ in range(2):
            assert not ZEO.nagios.main(["-m", "-s", str(status), address])
        out = capsys.readouterr().out
        connection.close()
    for name in ("active_txns", "connections", "waiting", "aborts", "commits", "conflicts", "conflicts_resolved", "loads", "stores"):
        assert f"{name}=" in out


# -- embedded


@pytest.fixture
def events(monkeypatch):
    """What is told to `zope.event`, which need not be installed."""
    found = []
    monkeypatch.setattr(ZODB.event, "notify", found.append)
    return found


def server_events(events):
    return [event for event in events if isinstance(event, (ServingEvent, Closed))]


def test_events(events):
    address, stop = zeo_rs.server()
    (serving_,) = server_events(events)
    assert type(serving_) is ServingEvent and serving_.address == address == serving_.server.address
    assert serving_.server.status()["1"]["connections"] == 0
    stop()
    stop()
    _, closed = server_events(events)
    assert type(closed) is Closed and closed.server is serving_.server


def test_a_subscriber_that_fails_stops_the_server(monkeypatch):
    addresses = []

    def fail(event):
        if isinstance(event, ServingEvent):
            addresses.append(event.address)
            raise RuntimeError("not now")

    monkeypatch.setattr(ZODB.event, "notify", fail)
    with pytest.raises(RuntimeError, match="not now"):
        zeo_rs.server()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(addresses[0])


def test_arguments_of_zeos_server_function(tmp_path, capsys):
    address, stop = zeo_rs.server(
        path=str(tmp_path / "Data.fs"),
        blob_dir=str(tmp_path / "blobs"),
        zeo_conf={"invalidation_queue_size": 5, "max_connections": 7},
        port=("127.0.0.1", 0),
        show_config=True,
        protocol=b"M5",
        name="x",
        debug=True,
    )
    out = capsys.readouterr().out
    assert "invalidation-queue-size 5" in out and f"path {tmp_path}/Data.fs" in out
    with Raw(address) as peer:
        assert peer.greeting == b"M5"
        assert ["ZODB.interfaces", "IBlobStorage"] in [list(i) for i in peer.call("get_info")["interfaces"]]
    stop(stop_timeout=30)
    with pytest.raises(ValueError, match="not spoken"):
        zeo_rs.server(protocol=b"Z3101")
    log = tmp_path / "child.log"
    address, stop = zeo_rs.server(threaded=False, protocol="Z5", log=str(log), start_timeout=60)
    with Raw(address) as peer:
        assert peer.greeting == b"Z5"
    stop()
    assert "listening" in log.read_text()


def test_a_server_in_an_asyncio_program(tmp_path, events):
    async def main():
        async with zeo_rs.aio.serve(str(tmp_path / "Data.fs"), zeo_conf={"msgpack": True}) as server:
            async with await zeo_rs.aio.connect(server.address) as storage:
                assert await storage.last_transaction() == Z64
            assert server.status()["1"]["commits"] == 0
            # a synchronous client in a thread, while this loop goes on
            ticks = 0
            work = asyncio.ensure_future(asyncio.to_thread(commit, server.address))
            while not work.done():
                await asyncio.sleep(0)
                ticks += 1
            assert await work == 1 and ticks > 1
            return server.address

    def commit(address):
        database = zeo_rs.DB(address)
        with database.transaction() as connection:
            connection.root()["x"] = 1
        with database.transaction() as connection:
            found = connection.root()["x"]
        database.close()
        return found

    address = asyncio.run(asyncio.wait_for(main(), 60))
    assert [type(event) for event in server_events(events)] == [ServingEvent, Closed]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    storage = zeo_rs.FileStorage(str(tmp_path / "Data.fs"))
    assert len(storage) == 1
    storage.close()


def test_a_cancelled_server_is_stopped(tmp_path, events):
    async def main():
        inside = asyncio.Event()

        async def server():
            async with zeo_rs.aio.serve(str(tmp_path / "Data.fs")):
                inside.set()
                await asyncio.sleep(3600)

        for wait in (True, False):
            inside.clear()
            task = asyncio.ensure_future(server())
            # at work, or in the middle of its start
            await (inside.wait() if wait else asyncio.sleep(0))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # the file is free
            storage = zeo_rs.FileStorage(str(tmp_path / "Data.fs"))
            storage.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_errors_come_out_of_the_async_context():
    async def main():
        async with zeo_rs.aio.serve(storage_conf="<nonsense>\n</nonsense>"):
            raise AssertionError("it must not start")

    with pytest.raises(Exception, match="nonsense"):
        asyncio.run(main())


def test_a_storage_of_another_package_need_not_keep_its_section(tmp_path, monkeypatch):
    """Its factory has `name` and `open()`; `config`, which ZODB's have, is nobody's promise."""
    package = tmp_path / "needs_no_section"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from ZODB.MappingStorage import MappingStorage\n"
        "class Factory:\n"
        "    def __init__(self, section): self.name = section.getSectionName()\n"
        "    def open(self): return MappingStorage()\n"
    )
    (package / "component.xml").write_text(
        '<component><import package="ZODB"/><sectiontype name="plainstorage" datatype="needs_no_section.Factory"'
        ' implements="ZODB.storage"/></component>'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    address, stop = zeo_rs.server(storage_conf="%import needs_no_section\n<plainstorage>\n</plainstorage>")
    try:
        with contextlib.closing(zeo_rs.ClientStorage(address, wait_timeout=60)) as storage:
            assert storage.is_connected()
    finally:
        stop()
