"""ZEO's own black-box tests with its server or its client, or both, replaced by ours.

ZEO's test modules start servers with ``ZEO._forker`` and make clients from the name ``ClientStorage``. `patched` puts ours in
their places; `cases` flattens the modules' suites, doctests included, to ids and cases. The servers are processes forked
from one that has the imports done: hundreds are started in a run.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import threading
import unittest
from queue import Empty
from unittest import mock

import ZEO._forker
import ZEO.ClientStorage
import ZEO.Exceptions
import ZEO.runzeo
import zeo_rs.exceptions
import ZODB.config

MODULES = ("ZEO.tests.testZEO", "ZEO.tests.testConnection", "ZEO.tests.test_sync", "ZEO.tests.test_client_side_conflict_resolution")

KINDS = ("zeo", "rust")

multiprocessing.set_forkserver_preload(["ZEO.runzeo", "ZEO.StorageServer", "zeo_rs._zeo", "zeo_rs._served", "ZEO._forker"])


# ---- servers


def serve(kind, msgpack, config, qin, qout, timeout=None, keep=False, **kw):
    """Takes the place of ``ZEO._forker.runner``: a server from a configuration file until told to stop."""
    # relative paths of the configuration are meant from where the test is, where the file is as well
    os.chdir(os.path.dirname(config))
    if msgpack:
        with open(config, "r+") as file:
            text = file.read()
            if "msgpack" not in text:
                file.seek(0)
                file.write(text.replace("</zeo>", "msgpack true\n</zeo>", 1))
    if kind == "zeo":
        return ZEO_RUNNER(config, qin, qout, timeout, keep=keep, **kw)
    options = ZEO.runzeo.ZEOOptions()
    options.realize(["-C", config])
    if options.config_logger is not None:
        options.config_logger()
    server, storages = start(options)
    os.remove(config)
    qout.put(server.address)
    with contextlib.suppress(Empty):
        qin.get(timeout=timeout)
    server.stop()
    if not keep:
        for storage in storages:
            with contextlib.suppress(AttributeError):
                storage.cleanup()
    qout.put(False)


ZEO_RUNNER = ZEO._forker.runner


def start(options):
    """Our server from ZEO's options; returns it with the Python storages it serves."""
    from zeo_rs import _zeo
    from zeo_rs.tls import server_tls

    address = options.address
    if isinstance(address, tuple):
        address = address[0], address[1] or 0
    elif os.path.exists(address):
        os.unlink(address)
    storages = [(opener.name, storage_of(opener)) for opener in options.storages]
    settings = {
        "read_only": bool(options.read_only),
        "msgpack": bool(options.msgpack),
        "client_conflict_resolution": bool(options.client_conflict_resolution),
        "invalidation_queue_size": options.invalidation_queue_size,
        "invalidation_age": options.invalidation_age,
        "transaction_timeout": options.transaction_timeout,
        "shutdown_grace": 0,
        "tls": server_tls(options.ssl),
    }
    server = _zeo.Server([address], storages, settings)
    return server, [storage for _, storage in storages if not isinstance(storage, tuple)]


def storage_of(opener):
    """A file storage as our own engine, any other as the Python object."""
    config, blob_dir = opener.config, None
    if type(opener) is ZODB.config.BlobStorage and type(config.base) is ZODB.config.FileStorage:
        blob_dir, config = config.blob_dir, config.base.config
    elif type(opener) is not ZODB.config.FileStorage:
        return opener.open()
    options = {"create": config.create, "read_only": config.read_only, "blob_dir": blob_dir or config.blob_dir}
    if config.pack_gc is not None:
        options["pack_gc"] = config.pack_gc
    return "filestorage", os.path.abspath(config.path), options


# ---- patches


@contextlib.contextmanager
def patched(server, client, msgpack):
    """ZEO's tests with these kinds of servers and clients."""
    # now: the tests change the directory for temporary files, and theirs are removed
    multiprocessing.forkserver.ensure_running()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ZEO_PROCESS_TYPE": "forkserver"}))
        stack.enter_context(mock.patch.object(ZEO._forker, "runner", functools.partial(serve, server, msgpack)))
        if client == "rust":
            patch_client(stack)
        yield


def patch_client(stack):
    theirs = ZEO.ClientStorage.ClientStorage
    for name in (*MODULES, "ZEO.tests.ConnectionTests"):
        importlib.import_module(name)
    # our exceptions are no subclasses of ZEO's: with ours installed, `ZEO` is ours
    replaced = {theirs: ClientStorage}
    for name in ("ClientStorageError", "ClientDisconnected", "ServerException"):
        replaced[getattr(ZEO.Exceptions, name)] = getattr(zeo_rs.exceptions, name)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("ZEO."):
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in replaced:
                    stack.enter_context(mock.patch.object(module, name, replaced[value]))
    connection_tests = sys.modules["ZEO.tests.ConnectionTests"]
    stack.enter_context(mock.patch.object(connection_tests, "TestClientStorage", TestClientStorage))
    stack.enter_context(mock.patch.object(connection_tests, "short_timeout", lambda test: contextlib.nullcontext()))
    testzeo = sys.modules["ZEO.tests.testZEO"]
    for name in ("ServerManagingClientStorage", "ServerManagingClientStorageForIExternalGCTest"):
        cls = getattr(testzeo, name)
        attributes = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        replaced[cls] = type(name, tuple(replaced[base] for base in cls.__bases__), attributes)
        stack.enter_context(mock.patch.object(testzeo, name, replaced[cls]))


class ClientStorage(zeo_rs.ClientStorage):
    """Ours with what the tests use of the insides of ZEO's and ours can answer."""

    @property
    def _server(self):
        return self

    def call(self, method, txn, wait):
        """`vote` begun in the background."""
        assert method == "vote" and not wait
        future = concurrent.futures.Future()
        transaction = self.tpc_transaction()

        def vote():
            try:
                future.set_result(self._vote(transaction))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=vote, daemon=True).start()
        return future

    _connection_generation = 0

    def notify_connected(self):
        super().notify_connected()
        self._connection_generation += 1


class TestClientStorage(ClientStorage):
    """As that of ``ConnectionTests``: gives up soon, counts connections."""

    __test__ = False

    def __init__(self, *args, **kw):
        super().__init__(*args, **{**kw, "wait_timeout": 4})

    @property
    def connection_count_for_tests(self):
        return self._connection_generation


# ---- cases


def cases():
    """``{id: case}`` of all modules, made of the names as they are patched now."""
    found = {}
    for name in MODULES:
        module = importlib.import_module(name)
        if hasattr(module, "test_suite"):
            suite = module.test_suite()
        else:
            suite = unittest.defaultTestLoader.loadTestsFromModule(module)
        for case in flat(suite):
            key = case.id().removeprefix("ZEO.tests.")
            number = 1
            while (unique := key if number == 1 else f"{key}#{number}") in found:
                number += 1
            found[unique] = case
    return found


def flat(suite):
    for case in suite:
        if isinstance(case, unittest.TestSuite):
            yield from flat(case)
        else:
            yield case


def run(case):
    """``None``, or ``('skipped' | 'failed', text)``."""
    result = unittest.TestResult()
    case.run(result)
    problems = result.errors + result.failures
    if problems:
        return "failed", "\n".join(text for _, text in problems)
    if result.skipped:
        return "skipped", result.skipped[0][1]
    return None
