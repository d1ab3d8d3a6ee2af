"""A process that has a storage open forks: whatever the child does, file, lock and blobs stay the parent's."""

import subprocess
import sys
import textwrap

import pytest
import ZODB.FileStorage
from zc.lockfile import LockError

from zeo_rs import FileStorage

# `forked(child)` runs `child` in a forked process and answers its exit status; both tell of themselves on stdout.
HEAD = """
import gc, os, sys, traceback
import zeo_rs
from ZODB.Connection import TransactionMetaData
from ZODB.serialize import referencesf
from ZODB.utils import p64, u64, z64
path = sys.argv[1]
DATA = b"\\x80\\x03cpersistent.mapping\\nPersistentMapping\\nq\\x00.\\x80\\x03}q\\x01."

def commit(storage, oid):
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(p64(oid), z64, DATA, "", t)
    storage.tpc_vote(t)
    return storage.tpc_finish(t)

def refused(call, *args):
    try:
        call(*args)
    except Exception as error:
        assert f"opened by process {os.getppid()}" in str(error), error
        print("refused", call.__name__, flush=True)
    else:
        print("DONE", call.__name__, flush=True)

def start(child):
    go, went = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(went)
        os.read(go, 1)  # until the parent says so
        try:
            child()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        sys.exit(0)
    os.close(go)
    return pid, went

def end(started):
    pid, went = started
    os.close(went)
    assert os.waitpid(pid, 0)[1] == 0

storage = zeo_rs.FileStorage(path, **(dict(blob_dir=path + ".blobs") if "blobs" in sys.argv else {}))
commit(storage, 0)
"""


def run(path, script, *args):
    script = HEAD + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), *args], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


# What the child does with a storage that was as of one transaction when it was forked.
GOOD_BYES = {
    "exit": "pass",
    "delete": "global storage; del storage; gc.collect()",
    "close": "storage.close()",
}


@pytest.mark.parametrize("how", GOOD_BYES)
def test_a_child_that_says_good_bye_takes_nothing_away(tmp_path, how):
    path = tmp_path / "Data.fs"
    script = f"""
    def child():
        {GOOD_BYES[how]}
    child = start(child)
    for oid in range(1, 6): commit(storage, oid)
    storage.new_oid()
    size = os.path.getsize(path)
    end(child)
    assert os.path.getsize(path) == size == storage.getSize(), (size, os.path.getsize(path))
    assert storage.load(p64(5))
    # still locked
    import subprocess
    for module in ("zeo_rs", "ZODB.FileStorage"):
        code = f"import sys; from {{module}} import FileStorage; FileStorage(sys.argv[1])"
        second = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
        print("in use" if "LockError" in second.stderr else second.stderr)
    commit(storage, 9)
    last = storage.lastTransaction()
    storage.close()
    storage = zeo_rs.FileStorage(path)
    assert len(storage) == 7 and storage.lastTransaction() == last
    """
    assert run(path, script) == ["in use", "in use"]
    storage = ZODB.FileStorage.FileStorage(str(path))
    assert len(list(storage.iterator())) == 7
    storage.close()


def test_a_child_reads_and_is_told_why_it_may_not_write(tmp_path):
    path = tmp_path / "Data.fs"
    script = """
    def child():
        assert storage.load(z64)[0] == DATA
        refused(storage.tpc_begin, TransactionMetaData())
        refused(storage.new_oid)
        refused(storage.pack, 1.7e9, referencesf)
        refused(storage._save_index)
        # of a transaction that was begun before
        refused(storage.tpc_vote, t)
        storage.tpc_abort(t)
        storage.close()
    t = TransactionMetaData()
    storage.tpc_begin(t)
    storage.store(p64(1), z64, DATA, "", t)
    child = start(child)
    end(child)
    storage.tpc_vote(t)
    storage.tpc_finish(t)
    assert storage.load(p64(1))
    """
    assert run(path, script) == [f"refused {name}" for name in ("tpc_begin", "new_oid", "pack", "_save_index", "tpc_vote")]


def test_a_child_leaves_the_blobs_of_a_transaction_under_way(tmp_path):
    path = tmp_path / "Data.fs"
    script = """
    from ZODB.blob import Blob
    t = TransactionMetaData()
    storage.tpc_begin(t)
    name = os.path.join(storage.temporaryDirectory(), "upload")
    with open(name, "wb") as file: file.write(b"blob")
    BLOB = b"\\x80\\x03cZODB.blob\\nBlob\\nq\\x00.\\x80\\x03N."
    storage.storeBlob(p64(1), z64, BLOB, name, "", t)
    if "voted" in sys.argv: storage.tpc_vote(t)
    end(start(lambda: storage.tpc_abort(t)))
    if "voted" not in sys.argv: storage.tpc_vote(t)
    tid = storage.tpc_finish(t)
    print(open(storage.loadBlob(p64(1), tid)).read())
    """
    assert run(path, script, "blobs") == ["blob"]
    assert run(tmp_path / "Other.fs", script, "blobs", "voted") == ["blob"]


def test_a_daemon_that_was_forked_too_late_is_told(tmp_path):
    """Open, then daemonize: the first process exits, and with it the storage is closed."""
    path = tmp_path / "Data.fs"
    script = """
    done, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        error = None
        try: commit(storage, 1)
        except Exception as e: error = str(e)
        os.write(told, str(error).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    print(os.read(done, 1000).decode())
    """
    (error,) = run(path, script)
    assert "forked" in error and "open it anew" in error
    FileStorage(path).close()


def test_a_child_that_lives_on_does_not_keep_the_file_locked(tmp_path):
    path = tmp_path / "Data.fs"
    script = """
    child = start(lambda: None)
    storage.close()
    storage = zeo_rs.FileStorage(path)
    commit(storage, 1)
    end(child)
    assert len(storage) == 2
    try: zeo_rs.FileStorage(path)
    except Exception as error: print(type(error).__name__)
    """
    assert run(path, script) == [LockError.__name__]


def test_a_server_outlives_its_forked_child(tmp_path):
    path = tmp_path / "Data.fs"
    script = """
    storage.close()
    import ZODB, transaction
    address, stop = zeo_rs.server(path + ".served")
    child = start(lambda: None)
    db = ZODB.DB(zeo_rs.ClientStorage(address))
    with db.transaction() as connection: connection.root()["a"] = 1
    end(child)
    child = start(lambda: stop())
    end(child)
    with db.transaction() as connection: connection.root()["a"] = 2
    db.close()
    stop()
    """
    assert run(path, script) == []
    storage = FileStorage(f"{path}.served")
    assert len(list(storage.iterator())) >= 3
    storage.close()


def test_nothing_is_appended_where_somebody_else_has_written(tmp_path):
    """Locks are advice."""
    path = tmp_path / "Data.fs"
    script = """
    with open(path, "ab") as file: file.write(b"somebody's")
    try: commit(storage, 1)
    except Exception as error: print(type(error).__name__, "another process" in str(error))
    try: storage.pack(4e9, referencesf, gc=False)
    except Exception as error: print(type(error).__name__)
    assert storage.load(z64)
    storage.close()
    assert open(path, "rb").read().endswith(b"somebody's")
    """
    assert run(path, script) == ["StorageSystemError True", "StorageSystemError"]
