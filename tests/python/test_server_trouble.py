"""A server whose storages or clients misbehave: who hangs, fails or floods concerns nobody else, and the log says what there is to say."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from rawpeer import Raw
from test_cli import Serving, run
from test_server import OID, Z64, log_of, resident, serving, vote, wait_until
from ZODB.MappingStorage import MappingStorage

import zeo_rs
from zeo_rs import _zeo
from zeo_rs.cli.status import ask
from zeo_rs.config import ConfigurationError, client_address, load_server_text
from zeo_rs.embedded import start_threaded

PATIENCE = 30


def get(address, path):
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


# -- storages in Python


class FailsOnce(MappingStorage):
    failures = 1
    aborted = 0

    def tpc_finish(self, transaction, func=lambda tid: None):
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the database went away")
        return super().tpc_finish(transaction, func)

    def tpc_abort(self, transaction):
        self.aborted += 1
        super().tpc_abort(transaction)


def test_a_storage_whose_tpc_finish_fails_is_told_to_abort():
    storage = FailsOnce()
    server = _zeo.Server([("127.0.0.1", 0)], [("1", storage)], {})
    try:
        with Raw(server.address) as one, Raw(server.address) as two:
            one.answer(vote(one, 1))
            with pytest.raises(RuntimeError, match="the database went away"):
                one.call("tpc_finish", 1)
            # else its commit lock would be held for ever
            two.answer(vote(two, 1))
            assert len(two.call("tpc_finish", 1)) == 8
            assert storage.aborted == 1
            assert two.call("server_status")["aborts"] == 1
    finally:
        server.stop()


UNSTOPPED = """
import ZODB.MappingStorage
from zeo_rs import _zeo
storage = ZODB.MappingStorage.MappingStorage()
storage.close = lambda: print("closed")
server = _zeo.Server([("127.0.0.1", 0)], [("1", storage)], {})
del server
"""


def test_a_server_that_nobody_stopped_ends_with_its_object():
    """Its threads need the GIL for the storage's close. In a process of its own: a deadlock that holds the GIL has no timeout."""
    done = subprocess.run([sys.executable, "-c", UNSTOPPED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "closed\n"), done.stderr


class CountsSlowly(MappingStorage):
    """Counting its objects takes until the test lets it."""

    def __init__(self):
        super().__init__()
        self.may_count = threading.Event()
        self.may_count.set()
        self.counting = threading.Semaphore(0)

    def __len__(self):
        if not self.may_count.is_set():
            self.counting.release()
            self.may_count.wait(PATIENCE)
        return 42


def test_who_watches_a_slow_storage_holds_up_nobody():
    storage = CountsSlowly()
    server = _zeo.Server(
        [("127.0.0.1", 0)], [("1", ("mappingstorage", "quick")), ("slow", storage)], {"http": ("127.0.0.1", 0), "workers": 2}
    )
    try:
        assert 'zeo_objects{storage="slow"} 42.0' in get(server.http_address, "/metrics")[1]
        storage.may_count.clear()
        with Raw(server.address) as peer:
            scrapes = [threading.Thread(target=get, args=(server.http_address, "/metrics")) for _ in range(4)]
            for scrape in scrapes:
                scrape.start()
            assert storage.counting.acquire(timeout=PATIENCE)
            # while it hangs: nobody waits for it, and what it said last is shown
            for path in ("/healthz", "/readyz"):
                assert get(server.http_address, path)[0] == 200
            assert peer.call("ping") is None
            for path in ("/metrics", "/", "/status.json"):
                status, text = get(server.http_address, path)
                assert status == 200 and "42" in text
            for scrape in scrapes:
                scrape.join(PATIENCE)
                assert not scrape.is_alive()
            assert not storage.may_count.is_set() and storage.counting.acquire(blocking=False) is False
    finally:
        storage.may_count.set()
        server.stop()


def test_a_front_whose_server_is_gone_is_not_ready(tmp_path):
    below = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs")
    storage = f"%import zeo_rs\n<clientstorage>\n  server {below.addresses[0]}\n  wait-timeout 2\n</clientstorage>"
    text = "<zeo>\n  address 127.0.0.1:0\n  http-address 127.0.0.1:0\n</zeo>\n" + storage
    front = start_threaded(text)
    try:
        assert get(front.http_address, "/readyz") == (200, "ready\n")
        assert below.end() == 0
        wait_until(lambda: get(front.http_address, "/readyz")[0] == 503)
        assert "storage 1: it is not connected to its server" in get(front.http_address, "/readyz")[1]
        assert get(front.http_address, "/healthz")[0] == 200
    finally:
        front.stop()


def test_a_front_commits_again_when_its_server_is_back(tmp_path):
    path = str(tmp_path / "below")
    below = Serving("-a", path, "-f", tmp_path / "Data.fs")
    storage = f"%import zeo_rs\n<clientstorage>\n  server {path}\n  wait-timeout 2\n</clientstorage>"
    front = start_threaded("<zeo>\n  address 127.0.0.1:0\n</zeo>\n" + storage)
    try:
        with Raw(front.address) as peer:
            peer.answer(vote(peer, 1))
            below.process.kill()
            below.process.communicate(timeout=60)
            with pytest.raises(RuntimeError, match="Disconnected"):
                peer.call("tpc_finish", 1)
        below = Serving("-a", path, "-f", tmp_path / "Data.fs")
        deadline = time.monotonic() + 60
        while True:
            # until it is connected; a vote that hangs ends in the timeout of the socket
            with contextlib.suppress(RuntimeError, EOFError, ConnectionError), Raw(front.address) as peer:
                peer.answer(vote(peer, 1))
                assert len(peer.call("tpc_finish", 1)) == 8
                break
            assert time.monotonic() < deadline
    finally:
        front.stop()
        assert below.end() == 0


# -- clients


def test_a_label_is_short_and_one_line_and_no_flood(tmp_path):
    with serving(tmp_path) as server, Raw(server.address) as peer:
        peer.cast("set_client_label", "x\n------\n2026-01-01T00:00:00 CRITICAL root \x1b[2J" + "L" * 1_000_000)
        for number in range(300):
            peer.cast("set_client_label", f"flood {number}")
        for _ in range(300):
            peer.cast("tpc_begin", 1, b"", b"", {}, None, " ")
        peer.call("ping")
        log = log_of(server, tmp_path)
    assert len(log) < 20_000
    assert not re.search(r"^2026-01-01T00:00:00 CRITICAL", log, re.M)
    assert r"label=x\n------\n2026" in log and "\x1b" not in log and r"\u{1b}[2J" in log
    assert 1 <= log.count("flood") + log.count("duplicate tpc_begin") <= 10


def received(tmp_path):
    """The files of uploads."""
    return [name for name in os.listdir(tmp_path / "blobs" / "tmp") if name.endswith(".received")]


def test_what_a_killed_server_was_receiving_is_removed_at_the_next_start(tmp_path):
    storage = f"<filestorage>\n  path {tmp_path}/Data.fs\n  blob-dir {tmp_path}/blobs\n</filestorage>"
    with serving(tmp_path, storage=storage) as server, Raw(server.address) as peer:
        peer.cast("tpc_begin", 1, b"", b"", {}, None, " ")
        peer.cast("storeBlobStart")
        peer.cast("storeBlobChunk", b"x" * 3_000_000)
        wait_until(lambda: received(tmp_path))
        server.process.kill()
        server.process.wait(30)
    assert received(tmp_path)
    with serving(tmp_path, storage=storage):
        assert received(tmp_path) == []


def test_blobs_are_taken_for_transactions_of_clients_that_may_write_only(tmp_path):
    storage = f"<filestorage>\n  path {tmp_path}/Data.fs\n  blob-dir {tmp_path}/blobs\n</filestorage>"
    with serving(tmp_path, storage=storage) as server:
        with Raw(server.address) as peer:
            peer.cast("storeBlobStart")
            with contextlib.suppress(OSError):  # if it is closed already
                peer.cast("storeBlobChunk", b"x" * 3_000_000)
            peer.until_closed()
        with Raw(server.address, register=False) as reader:
            reader.call("register", "1", True)
            with pytest.raises(RuntimeError, match="ReadOnlyError"):
                reader.call("storeBlobStart")
        assert received(tmp_path) == []
        log = log_of(server, tmp_path)
    assert "storeBlobStart without tpc_begin" in log


# -- what the log says


def test_the_log_begins_with_what_is_served(tmp_path):
    pid_file = tmp_path / "pid"
    server = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", "--json-log", "--pid-file", pid_file)
    with Raw(client_address(server.addresses[0])) as peer:
        peer.cast("set_client_label", "web 7")
        peer.call("ping")
    assert server.end() == 0
    lines = [json.loads(line) for line in server.stderr.splitlines()]
    messages = [line["message"] for line in lines]
    assert zeo_rs._zeo.__version__ in messages[0] and str(server.process.pid) in messages[0]
    assert any(str(pid_file) in message for message in messages)
    (opened,) = [line for line in lines if line["message"] == "storage opened"]
    assert (opened["storage"], opened["name"], opened["read_only"]) == ("1", str(tmp_path / "Data.fs"), False)
    (listening,) = [line for line in lines if "listening" in line["message"]]
    assert listening["address"] == server.addresses[0]
    (labelled,) = [line for line in lines if line.get("label") == "web 7"]
    assert labelled["client"].startswith("127.0.0.1:")


def test_a_pid_file_that_cannot_be_written_is_an_error_in_the_log(tmp_path):
    server = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", "--pid-file", tmp_path / "nowhere" / "pid")
    assert ask(client_address(server.addresses[0]), 20)["1"]
    assert server.end() == 0
    assert re.search(r"ERROR .*cannot write the pid file.*nowhere", server.stderr), server.stderr


# -- configuration

MEMORY = "<mappingstorage>\n</mappingstorage>\n"


def configured(keys, more=""):
    return load_server_text(f"<zeo>\n  address 127.0.0.1:0\n  {keys}\n</zeo>\n{MEMORY}{more}")


def test_a_runner_section_may_have_a_log():
    logger = "<logger access>\n  name x.y\n  <logfile>\n    path STDOUT\n  </logfile>\n</logger>"
    assert configured("", f"<runner>\n  program x\n  {logger}\n</runner>").storages


@pytest.mark.parametrize("key", ["invalidation-queue-size"])
def test_errors_name_the_key(key):
    with pytest.raises(ConfigurationError, match=f"{key} -1"):
        configured(f"{key} -1")


def test_errors_of_certificates_are_text(tmp_path):
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(ConfigurationError) as caught:
        configured(f"<ssl>\n    certificate {tmp_path}/x.pem\n    authenticate {tmp_path}/x.pem\n  </ssl>")
    assert re.fullmatch(r"<ssl>: TLS: .*x\.pem cannot be read as PEM: [^()]*", str(caught.value))


def test_arguments_that_zeos_server_function_takes():
    with pytest.warns(UserWarning, match="unknown options in zeo_conf are ignored: colour"):
        address, stop = zeo_rs.server(port=None, zeo_conf={"colour": "red", "loglevel": "DEBUG", "read_only": True})
    try:
        assert address[1] != 0 and "1" in ask(address, 20)
    finally:
        stop()


# -- commands


def test_watching_survives_a_restart_of_the_server(tmp_path):
    path = str(tmp_path / "s")
    server = Serving("-a", path, "-f", tmp_path / "Data.fs")
    watch = subprocess.Popen(
        [sys.executable, "-m", "zeo_rs.cli", "status", "--watch", "0.05", path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    guard = threading.Timer(120, watch.kill)
    guard.start()
    try:

        def until(text):
            for line in watch.stdout:
                if text in line:
                    return line
            raise AssertionError(f"it ended without {text!r}")

        assert re.match(r"-- \d{4}-\d\d-\d\d \d\d:\d\d:\d\d$", until("-- "))
        until("storage 1")
        assert server.end() == 0
        until("no status from")
        server = Serving("-a", path, "-f", tmp_path / "Data.fs")
        until("storage 1")
        watch.send_signal(signal.SIGINT)
        rest = watch.stdout.read()
        assert watch.wait(30) == 0 and "Traceback" not in rest
    finally:
        guard.cancel()
        watch.kill()
        watch.wait()
        watch.stdout.close()
        assert server.end() == 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tls")
    for name in ("server", "client"):
        subprocess.run(
            ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]
            + ["-subj", f"/CN={name}.example.com", "-keyout", directory / f"{name}.key", "-out", directory / f"{name}.pem"],
            check=True,
            capture_output=True,
            timeout=60,
        )
    return directory


def tls_keys(certificates):
    names = {"certificate": "server.pem", "key": "server.key", "authenticate": "client.pem"}
    return "<ssl>\n%s  </ssl>" % "".join(f"    {key} {certificates}/{name}\n" for key, name in names.items())


def test_commands_reach_a_server_with_tls(tmp_path, certificates):
    options = ["--ssl-certificate", certificates / "client.pem", "--ssl-key", certificates / "client.key"]
    options += ["--ssl-authenticate", certificates / "server.pem", "--ssl-server-hostname", "server.example.com"]
    with serving(tmp_path, tls_keys(certificates)) as server:
        address = server.addresses[0]
        status, out, _ = run("status", "--json", address, *options)
        assert status == 0 and json.loads(out)["1"]["connections"] == 0
        status, _, text = run("status", address, "--timeout", "20")
        assert status == 1 and "--ssl-certificate" in text
        status, _, text = run("status", address, *options[:-2])
        assert status == 1 and "127.0.0.1" in text  # the certificate is for another host
        status, _, text = run("status", address, *options[2:4])
        assert status == 2 and "--ssl-key needs --ssl-certificate" in text
        status, _, text = run("pack", "--server", address, *options)
        assert status == 0, text


def test_idle_connections_with_tls_are_cheap(tmp_path, certificates):
    import ssl

    context = ssl.create_default_context(cafile=certificates / "server.pem")
    context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    context.check_hostname = False
    with serving(tmp_path, tls_keys(certificates)) as server:
        peers = []

        def connect(count):
            for _ in range(count):
                peer = context.wrap_socket(socket.create_connection(server.address, PATIENCE))
                peer.recv(6)
                peer.sendall(b"\0\0\0\x02M5")
                peers.append(peer)

        connect(50)
        before = resident(server.process.pid)
        connect(300)
        growth = resident(server.process.pid) - before
        for peer in peers:
            peer.close()
    # 33 kB; with a configuration each: 43
    assert growth / 300 < 40, f"{growth / 300:.0f} kB a connection"
