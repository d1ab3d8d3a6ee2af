"""ZEO's own black-box tests: its client on our server, our client on its server, ours on ours.

By default a part of them runs, some three minutes on a quiet machine. All of them, in both encodings, with `ZEO_SUITE=all` (an hour;
`-k rust-server-zeo-client-Z5` and the like run one of the six combinations).
What cannot apply is in `NOT_OUR_SERVER` and `NOT_OUR_CLIENT`, each with its reason. Such a test must fail: one that passes
leaves its table.
"""

import os
import re

import pytest
import zeo_suite

WHOLE = os.environ.get("ZEO_SUITE") == "all"

#: (server, client, msgpack)
COMBINATIONS = [
    ("rust", "zeo", False),
    ("zeo", "rust", True),
    ("rust", "rust", True),
]
if WHOLE:
    COMBINATIONS += [(server, client, not msgpack) for server, client, msgpack in COMBINATIONS]

#: What runs by default with ours on ours, and with one of ours.
QUICK_BOTH = r"BlobAdaptedFileStorageTests|FileStorageConnectionTests\.check[A-OQ-Z]|FileStorageReconnection|TimeoutTests"
QUICK_ONE = r"BlobAdaptedFileStorageTests\.(check|testNotUndoable|testUndoUnres)|ClientConflict|FileStorageReconnection|FileStorageTimeout"
#: A few of the classes that are the same with another storage, TLS or delays, and of the long ones, with ours on ours.
SAMPLES = (
    r"LoadDelayedTests\.(check[C-L]|test_race_load_vs|testConcurrent)|SSLTests\.(check[C-D]|testUndo)|HexTests\.(testUndo|testPackAll|checkZEOInv)"
    r"|DemoStorageTests\.check[C-D]|BlobWritableCacheTests\.(check[C-D]|testStoreBlob)|MappingStorageTests\.check[C-L]"
    r"|SSLConnectionTests\.check(Multiple|ReadOnly|Basic|Disconnected)|FileStorageConnectionTests\.checkConcurrentUpdates1Storage"
)
#: Long, and tested as well by something shorter.
LONG = (
    r"test_race_external|checkConcurrent|checkStoreAndLoadBlob|PackLots|[27]StorageThreads|invalidations_while_connecting"
    r"|checkMultiStorageTransaction|checkQuickVerificationWith2Clients|checkCheckForOutOfDateServer|test_race|PackWhile|PackNow"
)

NOT_OUR_SERVER = {
    "client_labels": "texts in the log of ZEO; ours has labels, too",
    "dynamic_server_ports_test": "waits for an event with ZEO's server object",
    "protocols_test": "makes a ZEO server speak an old protocol",
    "test_sync.SyncTests": "counts calls of a method of ZEO's server object",
    "testZEO.test_ruok": "our status has more keys",
    "testZEO.test_server_status": "our status has more keys",
    "TimeoutTests.checkTimeout$": "text in the log of ZEO",
    "checkExceptionLogsAtError": "wants POSKeyError, not TypeError, for an oid of None",
    "(Delayed|Hex)Tests.checkInterfaceFromRemoteStorage": "our FileStorage, inside the wrapper, provides one interface more",
    "ClientHexTests.testUnresolvable": "no class is named in a conflict of records that only the client can read",
}
NOT_OUR_CLIENT = {
    # ---- insides of ZEO's client
    "test_ZEO_client_convenience": "replaces ZEO's asyncio client",
    "tpc_finish_error": "breaks ZEO's transaction buffer",
    "invalidate_client_cache_entry_on_server_commit_error": "writes to ZEO's cache file",
    "checkBadMessage": "writes to the asyncio transport",
    "checkCatastrophicClientLoopFailure": "stops the asyncio loop",
    "checkConnectionInvalidationOnReconnect": "calls the asyncio protocol",
    "checkIteratorExhaustionStorage": "reads _iterator_ids",
    "checkIteratorGCProtocol": "calls through the asyncio client",
    "checkIteratorGCStorage": "reads _iterator_ids",
    "checkSortKey": "reads _server_addr; the keys are the same",
    "client-config_test": "reads private attributes",
    "invalidation-age_txt": "reads verify_result",
    "zeo-fan-out_test": "calls sendBlob without waiting",
    "IExternalGC_test": "clears ZEO's cache object",
    "checkNoVerificationOnServerRestart": "reads verify_result",
    "FileStorageInvqTests": "reads verify_result",
    "checkInterfaceFromRemoteStorage": "reads _info; what is provided is in test_clientstorage.py",
    # ---- texts
    "client_has_newer_data_than_server": "waits for a text in the log of ZEO",
    "iterator_sane_after_reconnect": "text of an exception",
    "drop_cache_rather_than_verify_txt": "text in the log of ZEO; the events and the emptied caches are as there",
    "protocols_test": "text in the log of ZEO",
    "checkExceptionLogsAtError": "text in the log of ZEO",
    # ---- the rest
    "checkTransactionBufferCleanup": "gives text as data, ours raises TypeError at once",
}
#: Asks for a server without msgpack by not asking for msgpack, which the harness does.
NOT_WITH_MSGPACK = "test_runzeo_msgpack_support"


def reason(server, client, msgpack, key):
    tables = [NOT_OUR_SERVER] * (server == "rust") + [NOT_OUR_CLIENT] * (client == "rust")
    for table in tables:
        for name, why in table.items():
            if re.search(name, key):
                return why
    if msgpack and NOT_WITH_MSGPACK in key:
        return "the harness turns msgpack on"
    return None


#: Passes if a client of ZEO, of another test, is still there: looks for its thread. Ours is no Python thread. The other starts
#: ZEO's own program, and now and then sends it the signal before it has a handler.
LEFT_OUT = "client_asyncore_thread_has_name|runzeo_logrotate_on_sigusr2"


#: ZODB's HexStorage around a client gives the database's `invalidate` an argument too many, which fails: no ZODB database
#: hears of commits through it. Our client can then only tell it to forget everything, which these races outrun.
NOT_WITH_OUR_CLIENT = r"ClientHexTests\.test_race"


#: Wants a file without write permission not to be written, which does not stop root.
NOT_AS_ROOT = "blob_transaction_txt"


def selected(server, client, key):
    if client == "rust" and re.search(NOT_WITH_OUR_CLIENT, key):
        return False
    if re.search(LEFT_OUT, key) or (NOT_AS_ROOT in key and os.geteuid() == 0):
        return False
    if WHOLE:
        return True
    if server == client and re.search(SAMPLES, key):
        return True
    quick = QUICK_BOTH if server == client else QUICK_ONE
    return re.search(quick, key) and not re.search(LONG, key)


def parameters():
    keys = list(zeo_suite.cases())
    for combination in COMBINATIONS:
        server, client, msgpack = combination
        name = f"{server}-server-{client}-client-{'M5' if msgpack else 'Z5'}"
        for key in keys:
            if selected(server, client, key):
                why = reason(*combination, key)
                marks = [pytest.mark.xfail(reason=why, strict=True)] if why else []
                yield pytest.param(combination, key, id=f"{name}-{key}", marks=marks)


@pytest.fixture(scope="module")
def suite(request):
    with zeo_suite.patched(*request.param):
        yield zeo_suite.cases()


@pytest.mark.parametrize("suite, key", list(parameters()), indirect=["suite"])
def test_zeo(suite, key, monkeypatch):
    monkeypatch.chdir(os.getcwd())
    outcome = zeo_suite.run(suite[key])
    if outcome is not None:
        kind, text = outcome
        pytest.skip(text) if kind == "skipped" else pytest.fail(text, pytrace=False)
