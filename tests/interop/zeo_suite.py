"""ZEO's own black-box tests with its server or its client, or both, replaced by ours.

ZEO's test modules start servers with ``ZEO._forker`` and make clients from the name ``ClientStorage``. `patched` puts ours in
their places; `cases` flattens the modules' suites, doctests included, to ids and cases. The servers are processes forked
from one that has the imports done: hundreds are started in a run.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import itertools
import multiprocessing
import multiprocessing.forkserver
import os
import re
import sys
import threading
import unittest
from queue import Empty
from unittest import mock

import ZEO._forker
import ZEO.ClientStorage
import ZEO.Exceptions
import ZEO.tests.forker
import zeo_rs.exceptions
from zeo_rs.config import load_server_text
from zeo_rs.serving import start

MODULES = ("ZEO.tests.testZEO", "ZEO.tests.testConnection", "ZEO.tests.test_sync", "ZEO.tests.test_client_side_conflict_resolution")

#: Classes that ZEO's own suite leaves out, "to save time".
LEFT_OUT_BY_ZEO = {"ZEO.tests.testZEO": ("DemoStorageTests", "FileStorageHexTests", "FileStorageClientHexTests")}

KINDS = ("zeo", "rust")
PATIENCE = 60  # seconds that what a test waits for may take

multiprocessing.set_forkserver_preload(["ZEO.runzeo", "ZEO.StorageServer", "zeo_rs.serving", "zeo_rs._served", "ZEO._forker"])


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
    with open(config) as file:
        text = file.read()
    settings = load_server_text(text)
    if settings.eventlog is not None:
        settings.eventlog()
    settings.options["shutdown_grace"] = 0
    server = start(settings)
    os.remove(config)
    qout.put(server.address)
    with contextlib.suppress(Empty):
        qin.get(timeout=timeout)
    server.stop()
    if not keep:
        for path in re.findall(r"<filestorage[^>]*>\s*path\s+(\S+)", text):
            for suffix in ("", ".index", ".lock", ".tmp", ".old"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path + suffix)
    qout.put(False)


ZEO_RUNNER = ZEO._forker.runner


# ---- patches


@contextlib.contextmanager
def patched(server, client, msgpack):
    """ZEO's tests with these kinds of servers and clients."""
    # now: the tests change the directory for temporary files, and theirs are removed
    multiprocessing.forkserver.ensure_running()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ZEO_PROCESS_TYPE": "forkserver"}))
        stack.enter_context(mock.patch.object(ZEO._forker, "runner", functools.partial(serve, server, msgpack)))
        # three seconds otherwise, which a reconnect of ZEO's client may take on a busy machine
        stack.enter_context(mock.patch.object(ZEO.tests.forker.wait_until, "__defaults__", (None, None, PATIENCE, None)))
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
    testssl, testzeo = sys.modules["ZEO.tests.testssl"], sys.modules["ZEO.tests.testZEO"]
    tls = zeo_rs.TLS(testssl.client_cert, testssl.client_key, None, testssl.server_cert, False)
    stack.enter_context(mock.patch.object(testssl, "client_ssl", lambda: tls))
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

    def _call(self, method, *args):
        if method == "lastTransaction":
            # the server's: with ZEO's, a round trip may overtake what it tells of commits
            return bytes.fromhex(self.server_status()["last-transaction"])
        assert method == "loadBefore"
        return self.loadBefore(*args)

    def _wait(self):
        self._wait_connected(30)

    @property
    def _cache(self):
        return _Cache(self)


class _Cache:
    def __init__(self, storage):
        self._storage = storage

    def __len__(self):
        return self._storage.cache_stats()["revisions"]

    def contents(self):
        return range(len(self))


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
            suites = [module.test_suite()]
        else:
            suites = [unittest.defaultTestLoader.loadTestsFromModule(module)]
        for prefix, left_out in itertools.product(("check", "test"), LEFT_OUT_BY_ZEO.get(name, ())):
            loader = unittest.TestLoader()
            loader.testMethodPrefix = prefix
            suites.append(loader.loadTestsFromTestCase(getattr(module, left_out)))
        for case in flat(suites):
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
