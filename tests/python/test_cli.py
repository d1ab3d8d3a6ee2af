"""The command line and the configuration files of servers."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import transaction
import ZODB.config

import zeo_rs
from zeo_rs.cli.status import ask
from zeo_rs.config import ConfigurationError, client_address, load_server_text, server_address

STORAGE = "<mappingstorage>\n</mappingstorage>\n"


def run(*arguments, module="zeo_rs.cli"):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


class Serving:
    """A `zeo-rs serve` process."""

    def __init__(self, *arguments, environment=None):
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zeo_rs.cli", "serve", *map(str, arguments), "--ready-fd", str(writing)],
            pass_fds=[writing],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        os.close(writing)
        with os.fdopen(reading) as ready:
            self.addresses = ready.read().split()
        if not self.addresses:
            raise AssertionError(self.process.communicate()[1])

    def end(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        _, self.stderr = self.process.communicate(timeout=60)
        return self.process.returncode


# -- addresses and configuration


@pytest.mark.parametrize(
    "text,server,client",
    [
        ("8100", ("", 8100), ("127.0.0.1", 8100)),
        ("db.example.org:8100", ("db.example.org", 8100), ("db.example.org", 8100)),
        ("[::1]:8100", ("::1", 8100), ("::1", 8100)),
        (":8100", ("", 8100), ("127.0.0.1", 8100)),
        ("/run/zeo.sock", "/run/zeo.sock", "/run/zeo.sock"),
        ("./zeo.sock", "./zeo.sock", "./zeo.sock"),
        ("localhost", ("localhost", 0), None),
        ("host:port", None, None),
        ("host:70000", None, None),
    ],
)
def test_addresses(text, server, client):
    for parse, expected in ((server_address, server), (client_address, client)):
        if expected is None:
            with pytest.raises(ValueError, match=re.escape(repr(text))):
                parse(text)
        else:
            assert parse(text) == expected


def test_every_key_of_a_server(tmp_path, monkeypatch):
    monkeypatch.delenv("ZEO_MSGPACK", raising=False)
    monkeypatch.setenv("WHERE", str(tmp_path))
    settings = load_server_text(
        f"""
        %define DIR {tmp_path}
        %import zc.zlibstorage
        <zeo>
          address 127.0.0.1:8100
          read-only yes
          invalidation-queue-size 7
          invalidation-age 3.5
          transaction-timeout 11
          pid-filename $DIR/zeo.pid
          client-conflict-resolution true
          msgpack on
        </zeo>
        <filestorage>
          path $DIR/Data.fs
          blob-dir $DIR/blobs
          quota 1MB
          pack-gc off
        </filestorage>
        <zlibstorage 2>
          <filestorage>
            path $(WHERE)/other.fs
          </filestorage>
        </zlibstorage>
        <mappingstorage memory>
        </mappingstorage>
        <runner>
          program /usr/bin/runzeo -C x
          daemon true
          <environment>
            A b
          </environment>
        </runner>
        <eventlog>
          level debug
          <logfile>
            path STDOUT
          </logfile>
        </eventlog>
        """
    )
    assert settings.addresses == [("127.0.0.1", 8100)]
    assert {name: value for name, value in settings.options.items() if name != "inherit"} == {
        "read_only": True,
        "invalidation_queue_size": 7,
        "invalidation_age": 3.5,
        "transaction_timeout": 11,
        "client_conflict_resolution": True,
        "msgpack": True,
    }
    assert settings.pid_filename == f"{tmp_path}/zeo.pid"
    assert [name for name, _ in settings.storages] == ["1", "2", "memory"]
    assert settings.eventlog is not None and settings.warnings == []
    storage = settings.storages[0][1].open()
    assert type(storage) is zeo_rs.FileStorage and storage.blob_dir == f"{tmp_path}/blobs"
    storage.close()
    # also within a wrapper
    wrapper = settings.storages[1][1].open()
    assert type(wrapper.base) is zeo_rs.FileStorage
    wrapper.close()


def test_msgpack_of_the_environment(monkeypatch):
    text = "<zeo>\naddress 1\n%s</zeo>\n" + STORAGE
    monkeypatch.setenv("ZEO_MSGPACK", "1")
    assert load_server_text(text % "").options["msgpack"]
    assert not load_server_text(text % "msgpack false\n").options["msgpack"]


def test_legacy_keys_warn():
    keys = "monitor-address 1\nauthentication-protocol digest\nauthentication-database x\nauth-realm y\n"
    settings = load_server_text(f"<zeo>\naddress 1\n{keys}</zeo>\n{STORAGE}")
    assert len(settings.warnings) == 4 and all("no security" in text for text in settings.warnings)


@pytest.mark.parametrize(
    "text,complaint",
    [
        ("<zeo>\naddress 1\nfrobnicate 2\n</zeo>\n" + STORAGE, "frobnicate"),
        ("<zeo>\naddress 1\n</zeo>\n", "storage"),
        ("<zeo>\n</zeo>\n" + STORAGE, "address"),
        (STORAGE, "zeo"),
        ("<zeo>\naddress 1\n</zeo>\n" + STORAGE * 2, "more than one storage has no name"),
        ("<zeo>\naddress 1\n</zeo>\n" + STORAGE + "<mappingstorage 1>\n</mappingstorage>", "called 1"),
        ("<zeo>\naddress host:x\n</zeo>\n" + STORAGE, "host:x"),
        ("<zeo>\naddress 1\ntransaction-timeout soon\n</zeo>\n" + STORAGE, "soon"),
    ],
)
def test_configuration_errors(text, complaint):
    with pytest.raises(ConfigurationError, match=complaint):
        load_server_text(text)


def test_sections_for_zodb(tmp_path):
    address, stop = zeo_rs.server()
    try:
        text = f"""
            %import zeo_rs
            <clientstorage>
              server {address[0]}:{address[1]}
              cache-size 1MB
              client-label test
              blob-dir {tmp_path}/blobs
            </clientstorage>"""
        storage = ZODB.config.storageFromFile(io.StringIO(text))
        assert type(storage) is zeo_rs.ClientStorage and storage.blob_dir == f"{tmp_path}/blobs"
        storage.close()
    finally:
        stop()
    text = f"%import zeo_rs\n<rustfilestorage>\npath {tmp_path}/Data.fs\n</rustfilestorage>"
    storage = ZODB.config.storageFromFile(io.StringIO(text))
    assert type(storage) is zeo_rs.FileStorage
    storage.close()


# -- serve


def test_usage_errors_exit_with_2(tmp_path):
    for arguments, complaint in (
        ((), "address"),
        (("-a", "1"), "storage"),
        (("-a", "1", "-X", "a=b", "-f", "x"), "-C"),
        (("-C", tmp_path / "missing"), "missing"),
        (("-a", "h:x", "-f", "x"), "h:x"),
        (("--nonsense",), "nonsense"),
    ):
        status, out, text = run(*arguments, module="zeo_rs.runzeo")
        assert status == 2 and complaint in text and "Traceback" not in text and out == "", (arguments, text)


def test_help_and_version():
    for module in ("zeo_rs.cli", "zeo_rs.runzeo"):
        assert run("--version", module=module)[1].strip() == f"zeo-rs {zeo_rs.__version__}"
        status, out, _ = run("--help", module=module)
        assert status == 0 and "usage" in out


def test_test_option(tmp_path):
    status, out, _ = run("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", "--test", module="zeo_rs.runzeo")
    assert (status, out) == (0, "testing exit immediately\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_life_of_a_server(tmp_path, number):
    pid_file = tmp_path / "pid"
    data, blobs = tmp_path / "Data.fs", tmp_path / "blobs"
    serving = Serving("-a", "127.0.0.1:0", "-f", data, "--blob-dir", blobs, "--pid-file", pid_file)
    assert pid_file.read_text() == f"{serving.process.pid}\n"
    address = client_address(serving.addresses[0])
    connection = zeo_rs.connection(address)
    connection.root()["x"] = 1
    transaction.commit()
    assert ask(address, 20)["1"]["connections"] == 1
    status, out, _ = run("status", "--json", serving.addresses[0])
    assert status == 0 and json.loads(out)["1"]["commits"] == 2
    status, out, _ = run("status", serving.addresses[0])
    assert status == 0 and "last-transaction" in out
    # with the client still connected
    assert serving.end(number) == 0
    connection.close()
    assert "shutting down" in serving.stderr and "Traceback" not in serving.stderr
    assert not pid_file.exists() and (tmp_path / "Data.fs.index").exists()
    storage = zeo_rs.FileStorage(data)
    assert len(storage) == 1
    storage.close()


def test_several_storages_and_addresses(tmp_path):
    unix = str(tmp_path / "s")
    serving = Serving("-a", "127.0.0.1:0", "-a", unix, "-f", tmp_path / "a.fs", "-f", tmp_path / "b.fs")
    assert len(serving.addresses) == 2 and serving.addresses[1] == unix
    for address in serving.addresses:
        assert sorted(ask(client_address(address), 20)) == ["1", "2"]
    assert serving.end() == 0
    assert not os.path.exists(unix)


def test_log_files_are_reopened(tmp_path):
    config = tmp_path / "zeo.conf"
    log = tmp_path / "log"
    config.write_text(
        f"<zeo>\naddress 127.0.0.1:0\n</zeo>\n{STORAGE}<eventlog>\n<logfile>\npath {log}\n</logfile>\n</eventlog>\n"
    )
    serving = Serving("-C", config)
    os.rename(log, tmp_path / "log.1")
    serving.process.send_signal(signal.SIGUSR2)
    # nothing else tells that the signal has been handled
    for _ in range(600):
        if log.exists():
            break
        time.sleep(0.05)
    assert serving.end() == 0
    assert "shutting down" in log.read_text()
    assert "listening" in (tmp_path / "log.1").read_text()


def test_systemd_is_told(tmp_path):
    path = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.settimeout(30)
        serving = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", environment={"NOTIFY_SOCKET": path})
        assert sock.recv(100) == b"READY=1"
        assert serving.end() == 0
        assert sock.recv(100) == b"STOPPING=1"


def test_json_log(tmp_path):
    serving = Serving("-a", "127.0.0.1:0", "-f", tmp_path / "Data.fs", "--json-log")
    assert serving.end() == 0
    lines = [json.loads(line) for line in serving.stderr.splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])


def test_status_of_nobody(tmp_path):
    status, _, text = run("status", tmp_path / "nobody.sock")
    assert status == 1 and "nobody.sock" in text


# -- commands on files


def test_check_dump_pack(tmp_path):
    data = tmp_path / "Data.fs"
    address, stop = zeo_rs.server(str(data))
    connection = zeo_rs.connection(address)
    for n in range(5):
        connection.root()["x"] = "x" * 1000 + str(n)
        transaction.commit()
    connection.close()
    stop()
    status, out, _ = run("check", data)
    assert status == 0 and "6 transactions" in out and "0 errors" in out
    status, out, _ = run("dump", data)
    assert status == 0 and out.count("Trans #") == 6
    before = data.stat().st_size
    status, out, _ = run("pack", data)
    assert status == 0 and data.stat().st_size < before and (tmp_path / "Data.fs.old").exists()
    content = bytearray(data.read_bytes())
    content[60] ^= 1
    data.write_bytes(content)
    status, out, _ = run("check", data)
    assert status == 1 and "error at" in out
    status, out, _ = run("check", "--json", data)
    assert status == 1 and [json.loads(line) for line in out.splitlines()][-1]["errors"] >= 1
    assert run("check", tmp_path / "missing")[0] == 2
    assert run("pack", tmp_path / "missing")[0] == 2


@pytest.mark.parametrize(
    "option", [("--days=-1", "0 or more"), ("--days=nan", "0 or more"), ("--days=100000", "1900"), ("--throttle=0", "1 or more")]
)
def test_pack_refuses_what_means_nothing(tmp_path, option):
    (tmp_path / "Data.fs").write_bytes(b"FS30")
    for target in ([tmp_path / "Data.fs"], ["--server", "127.0.0.1:1"]):
        status, _, error = run("pack", *target, option[0])
        assert status == 2 and option[1] in error and "Traceback" not in error


def test_pack_of_a_server(tmp_path):
    address, stop = zeo_rs.server(str(tmp_path / "Data.fs"))
    connection = zeo_rs.connection(address)
    for n in range(5):
        connection.root()["x"] = n
        transaction.commit()
    connection.close()
    before = (tmp_path / "Data.fs").stat().st_size
    assert run("pack", "--server", "%s:%s" % address)[0] == 0
    assert (tmp_path / "Data.fs").stat().st_size < before
    stop()


# -- embedded


@pytest.mark.parametrize("threaded", [True, False], ids=["threads", "process"])
def test_server_function(tmp_path, threaded):
    address, stop = zeo_rs.server(
        str(tmp_path / "Data.fs"), blob_dir=str(tmp_path / "blobs"), threaded=threaded, zeo_conf={"msgpack": True}
    )
    database = zeo_rs.DB(address, blob_dir=str(tmp_path / "cache"))
    with database.transaction() as connection:
        connection.root()["x"] = 1
    assert database.storage.protocol_version in (b"M5", "M5")
    database.close()
    stop()
    with pytest.raises(Exception):
        zeo_rs.ClientStorage(address, wait_timeout=1)


def test_server_function_in_memory_and_by_configuration(tmp_path):
    address, stop = zeo_rs.server(port=str(tmp_path / "sock"))
    assert address == str(tmp_path / "sock")
    zeo_rs.connection(address).close()
    stop()
    address, stop = zeo_rs.server(storage_conf="<demostorage>\n</demostorage>", zeo_conf="<zeo>\naddress 127.0.0.1:0\n</zeo>\n")
    zeo_rs.connection(address).close()
    stop()
    with pytest.raises(TypeError):
        zeo_rs.server(nonsense=1)
