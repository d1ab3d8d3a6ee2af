"""TLS against real ZEO: its client with our server, our client with its server, and what each is told when it does not work.

The certificates are made here as ZEO's documentation tells: self-signed by ``openssl req -x509``, each its own CA, no subjectAltName.
"""

import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import transaction
import ZEO
import ZODB
import ZODB.config
from peers import START, ZEO_STOP, free_port
from ZODB.POSException import POSKeyError
from ZODB.utils import maxtid, p64

import zeo_rs
from zeo_rs import _zeo, tls

HOST = "zeo.example.com"
ZEO_TESTS = Path(ZEO.__file__).parent / "tests"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def openssl(*args):
    subprocess.run(["openssl", *map(str, args)], check=True, capture_output=True)


class Certificates:
    """``name.pem`` and ``name.key`` in a directory."""

    def __init__(self, directory):
        self.directory = directory

    def cert(self, name):
        return str(self.directory / f"{name}.pem")

    def key(self, name):
        return str(self.directory / f"{name}.key")

    def self_signed(self, name, subject, *options):
        args = ("-nodes", "-newkey", "rsa:2048", "-days", "30", "-subj", subject, *options)
        openssl("req", "-x509", *args, "-keyout", self.key(name), "-out", self.cert(name))

    def leaf(self, name, subject, ca, *options):
        """As ``openssl x509 -req`` makes it without options: X.509 v1."""
        request = self.directory / f"{name}.csr"
        openssl("req", "-nodes", "-newkey", "rsa:2048", "-subj", subject, "-keyout", self.key(name), "-out", request)
        by = ("-CA", self.cert(ca), "-CAkey", self.key(ca), "-CAcreateserial")
        openssl("x509", "-req", "-in", request, "-days", "30", "-out", self.cert(name), *by, *options)


@pytest.fixture(scope="module")
def certs(tmp_path_factory):
    certs = Certificates(tmp_path_factory.mktemp("certs"))
    certs.self_signed("server", f"/C=US/O=Example/CN={HOST}")
    certs.self_signed("client", "/CN=client")
    certs.self_signed("stranger", f"/C=US/O=Example/CN={HOST}")
    certs.self_signed("ca", "/CN=CA", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    certs.leaf("server-v1", f"/CN={HOST}", "ca")
    certs.leaf("client-v1", "/CN=client", "ca")
    extensions = certs.directory / "extensions"
    extensions.write_text(f"subjectAltName=DNS:{HOST},IP:127.0.0.1\n")
    certs.leaf("server-san", "/CN=other", "ca", "-extfile", extensions)
    for name in ("server", "client"):
        encrypt = ("-aes256", "-passout", "pass:secret")
        openssl("rsa", "-in", certs.key(name), "-traditional", *encrypt, "-out", certs.key(name + "-encrypted"))
    return certs


# ---- one server and one client of either kind, with the same words of configuration


class ZeoServer:
    """``runzeo`` with an ``<ssl>`` section; without settings, without one."""

    def __init__(self, directory, **settings):
        self.address = ("127.0.0.1", free_port())
        self.log = directory / "zeo.log"
        config = directory / "zeo.conf"
        config.write_text(
            f"<zeo>\n  address 127.0.0.1:{self.address[1]}\n{section(settings)}\n</zeo>\n"
            "<mappingstorage>\n</mappingstorage>\n"
            f"<eventlog>\n  level info\n  <logfile>\n    path {self.log}\n  </logfile>\n</eventlog>\n"
        )
        command = [sys.executable, "-m", "ZEO.runzeo", "-C", str(config)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=directory, env=environment
        )
        deadline = time.monotonic() + START
        while True:
            try:
                socket.create_connection(self.address, 1).close()
                return
            except OSError:
                assert self.process.poll() is None, self.process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def close(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(ZEO_STOP)
        except subprocess.TimeoutExpired:  # ZEO waits for the rest of what it took for a frame: the TLS hello
            self.process.kill()
            self.process.wait()
        self.process.stderr.close()


class RustServer:
    def __init__(self, directory, **settings):
        self.tls = tls.server_ssl(as_section(settings)) if settings else None
        options = {"tls": tls.server_tls(self.tls)}
        self.server = _zeo.Server([("127.0.0.1", 0)], [("1", ("mappingstorage", "1"))], options)
        self.address = self.server.address

    def close(self):
        self.server.stop()


SERVERS = {"zeo": ZeoServer, "rust": RustServer}


def section(settings):
    if not settings:
        return ""
    lines = [f"    {name.replace('_', '-')} {value}" for name, value in settings.items()]
    return "  <ssl>\n" + "\n".join(lines) + "\n  </ssl>"


def as_section(settings):
    """What ZConfig gives a datatype."""
    names = ("certificate", "key", "password_function", "authenticate", "server_hostname")
    defaults = dict.fromkeys(names) | {"check_hostname": True}
    return SimpleNamespace(**(defaults | settings))


def zeo_client(address, wait_timeout=START, **settings):
    text = f"""
    %import ZEO
    <clientstorage>
      server {address[0]}:{address[1]}
      wait-timeout {wait_timeout}
    {section(settings)}
    </clientstorage>
    """
    return ZODB.config.storageFromString(text)


def rust_client(address, wait_timeout=START, **settings):
    context, hostname = tls.client_ssl(as_section(settings)) if settings else (None, None)
    return zeo_rs.ClientStorage(address, wait_timeout=wait_timeout, ssl=context, ssl_server_hostname=hostname)


CLIENTS = {"zeo": zeo_client, "rust": rust_client}


def commit_and_read(storage):
    db = ZODB.DB(storage)
    try:
        with db.transaction() as connection:
            connection.root()["data"] = b"x" * 300_000  # more than TLS and a socket hold at once
        with db.transaction() as connection:
            connection.cacheMinimize()
            assert connection.root()["data"] == b"x" * 300_000
    finally:
        transaction.abort()
        db.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(kind, **settings):
        server = SERVERS[kind](tmp_path, **settings)
        servers.append(server)
        return server

    yield serve
    for server in servers:
        server.close()


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "zeo_rs")

    def text():
        _zeo.flush_logs()
        return caplog.text

    return text


def fails(connect, *args, saying, **kw):
    """A client does not get its connection, and says why; it is given more time if that has not been found out yet."""
    from zeo_rs.exceptions import ClientDisconnected

    for wait_timeout in (1, 4, 16, 60):
        with pytest.raises(ClientDisconnected) as caught:
            connect(*args, wait_timeout=wait_timeout, **kw).close()
        if all(text in str(caught.value) for text in saying):
            return
    raise AssertionError(f"{saying} not in {caught.value}")


# every pair with one of ours in it, and ZEO with ZEO, which tests the test
PAIRS = [("zeo", "zeo"), ("zeo", "rust"), ("rust", "zeo"), ("rust", "rust")]
pairs = pytest.mark.parametrize(("server_kind", "client_kind"), PAIRS, ids=lambda kind: kind)


# ---- what works


@pairs
def test_certificates_of_the_documentation(serve, certs, server_kind, client_kind):
    server = serve(
        server_kind, certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client")
    )
    storage = CLIENTS[client_kind](
        server.address,
        certificate=certs.cert("client"),
        key=certs.key("client"),
        authenticate=certs.cert("server"),
        server_hostname=HOST,
    )
    commit_and_read(storage)


def seats():
    """Threads of this process that serve one client each."""
    names = [task.joinpath("comm") for task in Path("/proc/self/task").iterdir()]
    return sum(name.read_text().strip() == "zeo server seat" for name in names if name.exists())


def test_a_client_that_loads_without_pause_keeps_its_session(serve, certs):
    """Its connection, what TLS holds back included, goes to a thread of its own and back."""
    server = serve("rust", certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client"))
    storage = rust_client(
        server.address,
        certificate=certs.cert("client"),
        key=certs.key("client"),
        authenticate=certs.cert("server"),
        server_hostname=HOST,
    )
    deadline = time.monotonic() + 60
    while not seats():
        assert time.monotonic() < deadline
        for _ in range(100):
            with pytest.raises(POSKeyError):
                storage.loadBefore(p64(77), maxtid)
    commit_and_read(storage)
    while seats():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pairs
def test_own_ca_and_version_1_certificates(serve, certs, server_kind, client_kind):
    server = serve(
        server_kind, certificate=certs.cert("server-v1"), key=certs.key("server-v1"), authenticate=certs.cert("ca")
    )
    storage = CLIENTS[client_kind](
        server.address,
        certificate=certs.cert("client-v1"),
        key=certs.key("client-v1"),
        authenticate=certs.cert("ca"),
        server_hostname=HOST,
    )
    commit_and_read(storage)


@pairs
def test_the_address_is_the_host_name(serve, certs, server_kind, client_kind):
    server = serve(
        server_kind, certificate=certs.cert("server-san"), key=certs.key("server-san"), authenticate=certs.cert("client")
    )
    storage = CLIENTS[client_kind](
        server.address,
        certificate=certs.cert("client"),
        key=certs.key("client"),
        authenticate=certs.cert("ca"),
    )
    commit_and_read(storage)


@pairs
def test_encrypted_keys(serve, certs, server_kind, client_kind):
    server = serve(
        server_kind,
        certificate=certs.cert("server"),
        key=certs.key("server-encrypted"),
        password_function="passwords.secret",
        authenticate=certs.cert("client"),
    )
    storage = CLIENTS[client_kind](
        server.address,
        certificate=certs.cert("client"),
        key=certs.key("client-encrypted"),
        password_function="passwords.secret",
        authenticate=certs.cert("server"),
        check_hostname=False,
    )
    commit_and_read(storage)


@pairs
@pytest.mark.parametrize("certificate", ["server", "serverpw"])
def test_zeos_own_test_certificates(serve, server_kind, client_kind, certificate):
    """Self-signed CAs used as themselves, by SHA-1, the key of one encrypted as old OpenSSL did."""
    server = serve(
        server_kind,
        certificate=ZEO_TESTS / f"{certificate}.pem",
        key=ZEO_TESTS / f"{certificate}_key.pem",
        password_function="passwords.of_zeos_test_key",
        authenticate=str(ZEO_TESTS / "client.pem"),
    )
    storage = CLIENTS[client_kind](
        server.address,
        certificate=ZEO_TESTS / "client.pem",
        key=ZEO_TESTS / "client_key.pem",
        authenticate=str(ZEO_TESTS / f"{certificate}.pem"),
        server_hostname="zodb.org",
    )
    commit_and_read(storage)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_ssl_contexts_of_zeos_client(serve, certs, version):
    server = serve(
        "rust", certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client")
    )
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=certs.cert("server"))
    context.load_cert_chain(certs.cert("client"), certs.key("client"))
    context.minimum_version = context.maximum_version = getattr(ssl.TLSVersion, version)
    storage = ZEO.client(server.address, ssl=context, ssl_server_hostname=HOST, wait_timeout=START)
    commit_and_read(storage)


def test_ssl_contexts_with_our_client(serve, certs):
    server = serve(
        "zeo", certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client")
    )
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=certs.cert("server"))
    both = zeo_rs.TLS.from_context(context, certs.cert("client"), certs.key("client"))
    storage = zeo_rs.ClientStorage(server.address, ssl=both, ssl_server_hostname=HOST, wait_timeout=START)
    commit_and_read(storage)
    connect = zeo_rs.ClientStorage
    saying = ["require a client certificate (give certificate and key)"]
    fails(connect, server.address, ssl=context, ssl_server_hostname=HOST, saying=saying)
    # a certificate loaded into a context cannot be read back: it is not dropped, but asked for
    context.load_cert_chain(certs.cert("client"), certs.key("client"))
    with pytest.raises(ValueError, match="load_cert_chain"):
        connect(server.address, ssl=context, ssl_server_hostname=HOST)


# ---- what does not, and what is said


@pytest.mark.parametrize("server_kind", SERVERS)
def test_our_client_says_what_is_wrong(serve, certs, server_kind):
    server = serve(
        server_kind, certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client")
    )
    right = {
        "certificate": certs.cert("client"),
        "key": certs.key("client"),
        "authenticate": certs.cert("server"),
        "server_hostname": HOST,
    }

    def says(*texts, **changed):
        fails(rust_client, server.address, saying=texts, **right | changed)

    where = f"127.0.0.1:{server.address[1]}"
    says(where, "self-signed and not in", certs.cert("client"), authenticate=certs.cert("client"))
    says("not the one of the same subject", certs.cert("stranger"), authenticate=certs.cert("stranger"))
    says(f'is for "{HOST}", not for "other.example.com"', "server-hostname", server_hostname="other.example.com")
    texts = [f"'C=US, O=Example, CN={HOST}' of {certs.cert('stranger')}"]
    if server_kind == "rust":  # ZEO closes without the alert that would say why
        texts.append("the server does not know our certificate")
    says(*texts, certificate=certs.cert("stranger"), key=certs.key("stranger"))
    says("require", "a client certificate", certificate=None, key=None)
    fails(rust_client, server.address, saying=[where, "TLS"])


@pytest.mark.parametrize("server_kind", SERVERS)
def test_our_client_with_ssl_tells_a_plain_server(serve, certs, server_kind):
    server = serve(server_kind)
    fails(
        rust_client,
        server.address,
        saying=["does not speak TLS: give the server an <ssl> section, or connect without ssl"],
        certificate=certs.cert("client"),
        key=certs.key("client"),
        authenticate=certs.cert("server"),
    )
    commit_and_read(rust_client(server.address))


def refused(server, log, *texts, **settings):
    """ZEO's client does not get in; our server's log says why."""
    for wait_timeout in (1, 4, 16, 60):
        with pytest.raises(ZEO.Exceptions.ClientDisconnected):
            zeo_client(server.address, wait_timeout=wait_timeout, **settings).close()
        if all(text in log() for text in texts):
            return
    raise AssertionError(log()[-4000:])


def test_our_server_says_what_is_wrong(serve, certs, log):
    server = serve(
        "rust", certificate=certs.cert("server"), key=certs.key("server"), authenticate=certs.cert("client")
    )
    right = {
        "certificate": certs.cert("client"),
        "key": certs.key("client"),
        "authenticate": certs.cert("server"),
        "server_hostname": HOST,
    }
    changed = {"certificate": certs.cert("stranger"), "key": certs.key("stranger")}
    refused(server, log, f"its certificate 'C=US, O=Example, CN={HOST}' is self-signed and not in", **right | changed)
    # ZEO's client goes without the alert that would say more
    unknown = f"may not accept our certificate 'C=US, O=Example, CN={HOST}' of {certs.cert('server')}"
    refused(server, log, unknown, **right | {"authenticate": certs.cert("stranger")})
    refused(server, log, "no TLS hello", "configure it with ssl")
    with socket.create_connection(server.address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        while sock.recv(100):
            pass
    deadline = time.monotonic() + START
    while "does not speak TLS" not in log():
        assert time.monotonic() < deadline, log()[-4000:]
        time.sleep(0.05)
    # ZEO's client tries again at once, and for ever: the same again is no news
    assert log().count("is self-signed and not in") < 10
    # nothing of this hurts the server, and a port scan is not worth a line
    lines = log().count("\n")
    for _ in range(20):
        socket.create_connection(server.address).close()
    commit_and_read(zeo_client(server.address, **right))
    assert log().count("\n") - lines < 10


def test_our_plain_server_says_that_the_client_speaks_tls(serve, certs, log):
    server = serve("rust")
    refused(
        server,
        log,
        "it speaks TLS, and this server does not",
        certificate=certs.cert("client"),
        key=certs.key("client"),
        authenticate=certs.cert("server"),
    )
    commit_and_read(zeo_client(server.address))


# ---- changes while running


def test_reload_and_dynamic(serve, certs, tmp_path):
    shown = Certificates(tmp_path)
    for name in ("cert", "key"):
        shutil.copy(getattr(certs, name)("server"), getattr(shown, name)("shown"))
    server = serve(
        "rust", certificate=shown.cert("shown"), key=shown.key("shown"), authenticate="DYNAMIC"
    )
    right = {"certificate": certs.cert("client"), "key": certs.key("client"), "server_hostname": HOST}
    with pytest.raises(ZEO.Exceptions.ClientDisconnected):
        zeo_client(server.address, wait_timeout=1, authenticate=certs.cert("server"), **right)
    server.tls.load_verify_locations(cadata=Path(certs.cert("client")).read_text())
    commit_and_read(zeo_client(server.address, authenticate=certs.cert("server"), **right))
    for name in ("cert", "key"):
        shutil.copy(getattr(certs, name)("server-v1"), getattr(shown, name)("shown"))
    server.tls.reload()
    commit_and_read(zeo_client(server.address, authenticate=certs.cert("ca"), **right))


# ---- the whole way: runzeo and ZConfig


def start_runzeo(directory, port, **settings):
    config = directory / "zeo.conf"
    config.write_text(
        f"<zeo>\n  address 127.0.0.1:{port}\n{section(settings)}\n</zeo>\n<mappingstorage>\n</mappingstorage>\n"
    )
    command = [sys.executable, "-m", "zeo_rs.runzeo", "-C", str(config)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def configured(address, **settings):
    """`<clientstorage>` of ours."""
    host, port = address
    text = f"%import zeo_rs\n<clientstorage>\n  server {host}:{port}\n  wait-timeout {START}\n{section(settings)}\n</clientstorage>"
    return ZODB.config.storageFromString(text)


def test_runzeo_and_zconfig_and_sighup(certs, tmp_path):
    shown = Certificates(tmp_path)
    for name in ("cert", "key"):
        shutil.copy(getattr(certs, name)("server"), getattr(shown, name)("shown"))
    address = ("127.0.0.1", free_port())
    process = start_runzeo(
        tmp_path,
        address[1],
        certificate=shown.cert("shown"),
        key=shown.key("shown"),
        password_function="passwords.secret",
        authenticate=certs.cert("client"),
    )
    try:
        right = {"certificate": certs.cert("client"), "key": certs.key("client"), "server_hostname": HOST}
        commit_and_read(configured(address, authenticate=certs.cert("server"), **right))
        commit_and_read(zeo_client(address, authenticate=certs.cert("server"), **right))
        # a key that does not fit changes nothing
        shutil.copy(certs.cert("server-v1"), shown.cert("shown"))
        process.send_signal(signal.SIGHUP)
        lines = []
        while not any("stay as they were" in line for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        assert shown.key("shown") in lines[-1]
        commit_and_read(configured(address, authenticate=certs.cert("server"), **right))
        shutil.copy(certs.key("server-v1"), shown.key("shown"))
        process.send_signal(signal.SIGHUP)
        while "read again" not in (line := process.stdout.readline()):
            assert line
        commit_and_read(configured(address, authenticate=certs.cert("ca"), **right))
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=START)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"certificate": "server", "key": "client"}, "is not that of the certificate"),
        ({"certificate": "server", "key": "server-encrypted"}, "is encrypted"),
        ({"certificate": "server", "key": "server", "authenticate": "-"}, "authenticate - does not work"),
        ({"certificate": "server", "key": "server", "authenticate": "SIGNED"}, "authenticate SIGNED does not work"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_runzeo_says_what_is_wrong_with_its_section(certs, tmp_path, settings, why):
    given = {"authenticate": certs.cert("client")} | settings
    given |= {"certificate": certs.cert(settings["certificate"]), "key": certs.key(settings["key"])}
    process = start_runzeo(tmp_path, free_port(), **given)
    output, _ = process.communicate(timeout=START)
    assert process.returncode != 0
    assert why in output and "Traceback" not in output, output
