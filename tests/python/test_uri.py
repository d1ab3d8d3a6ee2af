"""``zeo://`` URIs: by themselves, by zodburi, as the command line takes them."""

import contextlib
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import transaction
import ZODB
import zodburi
import zodburi.resolvers

import zeo_rs
import zeo_rs.clientstorage
from zeo_rs.uri import DATABASE, PARAMETERS, open_storage, resolver

EVERYTHING = (
    "zeo://example.com:9100?storage=main&name=N&client=c&var=/v&username=u&password=p&realm=r&blob_dir=/b&client_label=l"
    "&min_disconnect_poll=1&max_disconnect_poll=2&wait=no&wait_timeout=7&read_only=yes&read_only_fallback=0"
    "&shared_blob_dir=true&drop_cache_rather_verify=t&blob_cache_size_check=20&cache_size=100MB&blob_cache_size=1gb"
)


@pytest.fixture
def made(monkeypatch):
    """What ``ClientStorage`` is called with."""
    calls = []
    monkeypatch.setattr(zeo_rs.clientstorage, "ClientStorage", lambda *args, **kw: calls.append((args, kw)))
    return calls


@pytest.mark.parametrize(
    "uri, addresses",
    [
        ("zeo://localhost:9991", [("localhost", 9991)]),
        ("zeo://localhost", [("localhost", 9991)]),
        ("zeo://127.0.0.1:1/", [("127.0.0.1", 1)]),
        ("zeo://[::1]:9100?storage=a", [("::1", 9100)]),
        ("zeo-rs://h:2", [("h", 2)]),
        ("zeo:///var/run/zeo.sock", ["/var/run/zeo.sock"]),
        ("zeo:///var/with%20space", ["/var/with space"]),
        ("zeo://a:1?server=b:2&server=/c/d", [("a", 1), ("b", 2), "/c/d"]),
    ],
)
def test_addresses(made, uri, addresses):
    resolver(uri)[0]()
    assert made[0][0] == (addresses,)


def test_every_parameter_means_what_it_does_to_zodburi(made, monkeypatch):
    theirs = []
    monkeypatch.setattr(zodburi.resolvers, "ClientStorage", lambda *args, **kw: theirs.append((args, kw)))
    zodburi.resolvers.client_storage_resolver(EVERYTHING)[0]()
    factory, database = zeo_rs.resolve_uri(EVERYTHING)
    factory()
    ((addresses,), ours), ((address,), expected) = made[0], theirs[0]
    assert addresses == [address] and ours == expected
    assert database == zodburi._get_dbkw({})


def test_all_of_zodburis_parameters_are_known():
    kind = zodburi.resolvers.ClientStorageURIResolver
    known = {*PARAMETERS, "demostorage", "debug", "wait_for_server_on_startup"}
    assert {*kind._int_args, *kind._string_args, *kind._bytesize_args} <= known
    assert {"database_name", "connection_pool_size", "connection_cache_size"} <= set(DATABASE)


def test_parameters_of_the_database(made):
    uri = "zeo://h?connection_cache_size=50&connection_pool_size=3&database_name=d&connection_cache_size_bytes=2MB"
    assert zeo_rs.resolve_uri(uri)[1] == {
        "cache_size": 50,
        "pool_size": 3,
        "database_name": "d",
        "cache_size_bytes": 2 << 20,
    }
    assert resolver(uri)[1] == dict(pair.split("=") for pair in uri.split("?")[1].split("&"))


def test_old_names(made):
    resolver("zeo://h?debug=1&wait_for_server_on_startup=0")[0]()
    assert made[0][1] == {"wait": False}


@pytest.mark.parametrize(
    "uri, error, text",
    [
        ("http://h", ValueError, "zeo://HOST:PORT"),
        ("zeo:h", ValueError, "zeo://HOST:PORT"),
        ("zeo://", ValueError, "neither a host nor a path"),
        ("zeo://h/main", ValueError, r"\?storage=NAME"),
        ("zeo://h#x", ValueError, "after #"),
        ("zeo://h?wait_timeout=soon", ValueError, "wait_timeout=soon"),
        ("zeo://h?cache_size=20XB", ValueError, "cache_size=20XB"),
        ("zeo://h?colour=red", KeyError, "colour"),
        ("zeo://h?ssl_server_hostname=x", ValueError, "not be TLS"),
    ],
)
def test_mistakes_are_named(uri, error, text):
    with pytest.raises(error, match=text):
        zeo_rs.resolve_uri(uri)


def test_tls(made):
    authenticate = Path(__file__).parents[1] / "fixtures" / "tls" / "ca.pem"
    resolver(f"zeo://h?ssl_authenticate={authenticate}&ssl_server_hostname=x&ssl_check_hostname=no")[0]()
    options = made[0][1]
    assert isinstance(options["ssl"], zeo_rs.TLS) and options["ssl_server_hostname"] == "x"


def test_a_database_by_uri(tmp_path):
    (host, port), stop = zeo_rs.server(str(tmp_path / "Data.fs"))
    try:
        for scheme in ("zeo", "zeo-rs"):
            factory, keywords = zeo_rs.resolve_uri(f"{scheme}://{host}:{port}?wait_timeout=20&connection_cache_size=7")
            with contextlib.closing(ZODB.DB(factory(), **keywords)) as db:
                assert db.getCacheSize() == 7
                with db.transaction() as connection:
                    connection.root()[scheme] = 1
        factory, keywords = zeo_rs.resolve_uri(f"zeo://{host}:{port}?demostorage=1")
        with contextlib.closing(ZODB.DB(factory(), **keywords)) as db:
            with db.transaction() as connection:
                connection.root()["demo"] = 1
        with contextlib.closing(open_storage(f"zeo://{host}:{port}", read_only=True)) as storage:
            assert storage.isReadOnly()
            with contextlib.closing(ZODB.DB(storage)) as db, db.transaction() as connection:
                assert sorted(connection.root()) == ["zeo", "zeo-rs"]
        transaction.abort()
    finally:
        stop()


def test_zodburi_finds_it():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["zodburi.resolvers"]
    assert list(entries) == ["zeo-rs"]
    module, _, name = entries["zeo-rs"].partition(":")
    assert getattr(import_module(module), name) is resolver


def test_after_a_take_over_zodburis_own_resolver_makes_our_storage():
    code = (
        "import zeo_rs.zeo, zodburi.resolvers, zeo_rs.clientstorage\n"
        "assert zodburi.resolvers.ClientStorage is zeo_rs.clientstorage.ClientStorage\n"
        "storage = zodburi.resolvers.client_storage_resolver('zeo://127.0.0.1:1?wait=0')[0]()\n"
        "assert type(storage) is zeo_rs.clientstorage.ClientStorage\n"
        "storage.close()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_storages_of_configuration_files(tmp_path):
    conf = tmp_path / "two.conf"
    conf.write_text(
        f"<filestorage one>\n path {tmp_path}/one.fs\n</filestorage>\n<filestorage two>\n path {tmp_path}/two.fs\n</filestorage>\n"
    )
    with contextlib.closing(open_storage(f"{conf}#two")) as storage:
        assert storage.getName() == f"{tmp_path}/two.fs"
    with pytest.raises(ValueError, match="several storages; it has: one, two"):
        open_storage(str(conf))
    with pytest.raises(ValueError, match="no storage"):
        open_storage(f"{conf}#three")
    with pytest.raises(ValueError, match="no such file"):
        open_storage(str(tmp_path / "missing.fs"))
