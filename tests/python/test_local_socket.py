"""Local sockets: who comes over TCP and is on the server's machine goes on over a Unix socket, and nobody else does."""

import contextlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import ZEO
import ZODB
from rawpeer import PATIENCE, Raw
from test_server import log_of, serving, wait_until
from test_server_trouble import get
from ZODB.utils import z64

import zeo_rs

sys.path.append(str(Path(__file__).parents[1] / "interop"))
from peers import Proxy, free_port  # noqa: E402

CERTIFICATES = Path(__file__).parents[1] / "fixtures" / "tls"
KEY = "zeo_rs_local"
#: what this process is to a server of this machine
LOCAL = f"local process {os.getpid()}"
TCP = re.compile(r"127\.0\.0\.1:\d+")


@contextlib.contextmanager
def watched(tmp_path, *keys):
    """A server process whose operators can see who its clients are."""
    with serving(tmp_path, "http-address 127.0.0.1:0", *keys) as server:
        # of this process; the log of an earlier one is in the same file
        found = []
        line = rf"process {server.process.pid}\n.*?\(HTTP\) address=127\.0\.0\.1:(\d+)"
        wait_until(lambda: found or found.extend(re.findall(line, (tmp_path / "log").read_text(), re.DOTALL)))
        server.http_address = "127.0.0.1", int(found[0])
        yield server


def status_of(server):
    """Of its storage."""
    return json.loads(get(server.http_address, "/status.json")[1])["storages"]["1"]


def clients(server):
    """The names of those that are registered."""
    return [client["peer"] for client in status_of(server)["clients"]]


def wait_clients(server, *wanted):
    """Until these are registered and no others; the server may not have noticed yet who is gone."""
    wait_until(lambda: len(found := clients(server)) == len(wanted) and all(map(re.fullmatch, wanted, sorted(found))))


def opened(address, **options):
    return contextlib.closing(zeo_rs.ClientStorage(address, wait_timeout=60, **options))


def use(address, value, open=zeo_rs.ClientStorage):
    """A commit of one client that another loads; both hear of the other's commits."""
    with contextlib.closing(ZODB.DB(open(address, wait_timeout=60))) as one:
        with contextlib.closing(ZODB.DB(zeo_rs.ClientStorage(address, wait_timeout=60))) as two:
            for number in range(10):
                for writer, reader in ((one, two), (two, one)):
                    with writer.transaction() as connection:
                        connection.root()["x"] = value, number
                    tid = writer.storage.lastTransaction()
                    wait_until(lambda reader=reader, tid=tid: reader.storage.lastTransaction() >= tid)
                    with reader.transaction() as connection:
                        assert connection.root()["x"] == (value, number)


# -- who goes there


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("msgpack", ["yes", "no"])
def test_a_client_of_the_servers_machine_goes_on_over_a_unix_socket(tmp_path, host, msgpack):
    with watched(tmp_path, f"msgpack {msgpack}") as server:
        address = host, server.address[1]
        with opened(address) as storage:
            wait_clients(server, LOCAL)
            assert storage.getName() == f"{address} (connected)"
            assert storage.protocol_version == (b"M5" if msgpack == "yes" else b"Z5")
            use(address, host)
            wait_clients(server, LOCAL)
            assert host.encode() in storage.load(z64)[0]
        wait_clients(server)


def test_its_names_are_those_of_its_tcp_address(tmp_path):
    """A `sortKey` orders commits over several databases, so it is the same in all clients of a server, ZEO's too."""
    with watched(tmp_path) as server:
        with opened(server.address) as local, contextlib.closing(ZEO.client(server.address, wait_timeout=60)) as theirs:
            wait_clients(server, TCP, LOCAL)
            assert local.sortKey() == theirs.sortKey()
            assert local.getName() == theirs.getName()


#: In a network of its own, which has only loopback: nobody else reaches the server there.
EVERYWHERE = """
import contextlib, fcntl, json, os, socket, struct, sys, time, urllib.request
import zeo_rs
from zeo_rs.embedded import start_threaded
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 1))  # SIOCSIFFLAGS, IFF_UP
text = "<zeo>\\n  address 8100\\n  http-address 127.0.0.1:8101\\n</zeo>\\n<mappingstorage>\\n</mappingstorage>\\n"
server = start_threaded(text)

def clients():
    with urllib.request.urlopen("http://127.0.0.1:8101/status.json", timeout=30) as answer:
        return [client["peer"] for client in json.load(answer)["storages"]["1"]["clients"]]

def ends_as(wanted):
    deadline = time.monotonic() + 30
    while clients() != wanted:
        if time.monotonic() > deadline:
            return clients()
    return "local"

has_ipv6 = os.path.exists("/proc/net/if_inet6") and os.path.getsize("/proc/net/if_inet6")
for host in ["127.0.0.1", "localhost", *(["::1"] if has_ipv6 else [])]:
    with contextlib.closing(zeo_rs.ClientStorage((host, 8100), wait_timeout=30)):
        print(host, ends_as([f"local process {os.getpid()}"]))
server.stop()
"""


def test_at_an_address_of_all_interfaces(tmp_path):
    """`address PORT`, where a client over IPv4 has an IPv6 address to the server, and another one to itself."""
    alone = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no network of its own can be had")
    done = subprocess.run([*alone, sys.executable, "-c", EVERYWHERE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert len(found) >= 2 and set(found.values()) == {"local"}, found


def test_after_a_restart_the_client_is_there_again(tmp_path):
    """The new process has another socket: the client hears of it where it heard of the first one."""
    address = "127.0.0.1", free_port()
    names = []
    with contextlib.ExitStack() as stack:
        for number in range(3):
            with watched(tmp_path, "address %s:%s" % address) as server:
                if not number:
                    storage = stack.enter_context(opened(address))
                assert storage.ping() is None
                wait_clients(server, LOCAL)
                with Raw(address) as peer:
                    names.append(peer.call("get_info")[KEY][0])
            wait_until(lambda: not storage.is_connected())
    assert len(set(names)) == 3


# -- who does not


def test_with_local_socket_off_everybody_stays_with_tcp(tmp_path):
    with watched(tmp_path, "local-socket false") as server:
        with opened(server.address):
            wait_clients(server, TCP)
            use(server.address, "tcp")
        with Raw(server.address) as peer:
            assert KEY not in peer.call("get_info")


def test_a_client_behind_a_proxy_stays_behind_it(tmp_path):
    """The server sees a TCP peer of its machine, but the client is elsewhere, or wants the proxy in between."""
    with watched(tmp_path) as server, Proxy(server.address) as proxy, opened(proxy.address) as storage:
        for _ in range(2):
            assert storage.ping() is None
            wait_clients(server, TCP)
            proxy.cut()
            wait_until(lambda: not storage.is_connected())
            wait_clients(server)
            proxy.restore()


def test_a_client_for_which_there_is_no_second_connection_stays_with_the_first(tmp_path):
    with watched(tmp_path, "max-connections 1") as server:
        with opened(server.address) as storage:
            wait_clients(server, TCP)
            with contextlib.closing(ZODB.DB(storage)) as database:
                with database.transaction() as connection:
                    connection.root()["x"] = 1
                wait_clients(server, TCP)
        wait_clients(server)
        # refused was the other one, not this one
        assert log_of(server, tmp_path).count("client registered") == 1


@pytest.mark.parametrize("msgpack", ["yes", "no"])
def test_zeos_own_client_makes_nothing_of_the_offer(tmp_path, msgpack):
    with watched(tmp_path, f"msgpack {msgpack}") as server:
        with contextlib.closing(ZEO.client(server.address, wait_timeout=60)) as theirs:
            wait_clients(server, TCP)
            name, client = theirs._info[KEY]
            assert name and [client] == clients(server)
        use(server.address, "theirs", ZEO.client)


# -- the offer


def test_the_offer_is_made_to_tcp_peers_only(tmp_path):
    path = str(tmp_path / "s")
    with serving(tmp_path, f"address {path}") as server, Raw(server.address) as tcp, Raw(server.address) as other:
        name, client = tcp.call("get_info")[KEY]
        assert client == "%s:%s" % tcp.socket.getsockname()
        assert other.call("get_info")[KEY] == [name, "%s:%s" % other.socket.getsockname()]
        for address in (path, "\0" + name):
            with Raw(address) as unix:
                assert KEY not in unix.call("get_info")
        # it is still made to those who ask again
        assert tcp.call("get_info")[KEY] == [name, client]
    with pytest.raises(ConnectionRefusedError):
        Raw("\0" + name)


def test_a_server_at_unix_addresses_only_has_none(tmp_path):
    path = str(tmp_path / "s")
    address, stop = zeo_rs.server(port=path)
    try:
        with Raw(address) as peer:
            assert KEY not in peer.call("get_info")
    finally:
        stop()


@contextlib.contextmanager
def over_tls():
    """A client of a server with TLS."""

    def pem(name):
        return str(CERTIFICATES / name)

    address, stop = zeo_rs.server(ssl=zeo_rs.TLS(pem("leaf.pem"), pem("leaf.key"), authenticate=pem("ca.pem")))
    try:
        context = ssl.create_default_context(cafile=pem("ca.pem"))
        context.load_cert_chain(pem("leaf.pem"), pem("leaf.key"))
        with Raw(address, wrap=lambda sock: context.wrap_socket(sock, server_hostname="zeo.example.com")) as peer:
            yield peer
    finally:
        stop()


def test_a_server_with_tls_offers_nothing():
    """Over TLS it knows who its client is; over another socket it would not."""
    with over_tls() as peer:
        assert peer.socket.gettimeout() == PATIENCE
        assert KEY not in peer.call("get_info")


# -- the log


def test_who_goes_there_has_not_disconnected(tmp_path):
    with watched(tmp_path) as server:
        with opened(server.address, client_label="web 7"):
            wait_clients(server, LOCAL)
        wait_clients(server)
        log = log_of(server, tmp_path)
    assert re.findall(r"client disconnected client=(.*)", log) == [f"{LOCAL} (web 7)"]


@pytest.mark.parametrize("last", ["get_info", "ping"])
def test_who_goes_away_has_disconnected(tmp_path, last):
    """Whatever it asked for last: an offer that was made need not have been taken."""
    with watched(tmp_path) as server:
        with Raw(server.address) as peer:
            peer.call("get_info")
            peer.call(last)
            name = "%s:%s" % peer.socket.getsockname()
            wait_clients(server, name)
        wait_clients(server)
        assert re.findall(r"client disconnected client=(.*)", log_of(server, tmp_path)) == [name]
