"""Packed files in ZODB's hands: ZODB opens them, its tools find them sound, and a killed pack costs nothing."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import transaction
import ZODB
from BTrees.OOBTree import OOBTree
from persistent.mapping import PersistentMapping
from zc.zlibstorage import ZlibStorage
from ZODB.blob import Blob
from ZODB.FileStorage import FileStorage as ZodbFileStorage
from ZODB.FileStorage.FileStorage import FileStorageError
from ZODB.scripts import fsrefs, fstest
from ZODB.serialize import referencesf

import zeo_rs
from zeo_rs import FileStorage

PHASES = ["index", "mark", "copy", "catch up", "switch"]


def fill(storage, seed, undo=False, pause=lambda number: None):
    """Commits random changes of a small application; answers the time after the half of them."""
    rnd = random.Random(seed)
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["tree"] = OOBTree()
    half = None
    for number in range(40):
        with database.transaction() as connection:
            tree = connection.root()["tree"]
            for key in rnd.sample(range(60), 5):
                if key in tree and rnd.random() < 0.4:
                    del tree[key]
                else:
                    tree[key] = PersistentMapping(number=number, child=PersistentMapping(text="x" * rnd.randrange(300)))
        if undo and number % 7 == 6:
            entry = rnd.choice(database.undoLog(0, 3))
            try:
                database.undo(entry["id"])
                transaction.commit()
            except ZODB.POSException.POSError:
                transaction.abort()
        if number == 20:
            half = ZODB.TimeStamp.TimeStamp(storage.lastTransaction()).timeTime()
        pause(number)
    database.close()
    return half


def content(storage):
    """What the application sees, from the root on."""
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        tree = connection.root()["tree"]
        seen = {key: (value["number"], value["child"]["text"]) for key, value in tree.items()}
        blobs = [value.open().read() for _, value in sorted(connection.root().items()) if isinstance(value, Blob)]
    database.close()
    return seen, blobs


def assert_sound(path, caplog, capsys):
    """ZODB opens the file without a word, and its tools have nothing to say."""
    caplog.clear()
    if os.path.exists(path + ".index"):
        os.remove(path + ".index")
    ZodbFileStorage(path).close()
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
    fstest.check(path)
    capsys.readouterr()
    fsrefs.main(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("gc", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_packed_files_are_zodbs(tmp_path, seed, gc):
    ours, theirs = str(tmp_path / "ours.fs"), str(tmp_path / "theirs.fs")
    half = fill(FileStorage(ours), seed)
    shutil.copy(ours, theirs)
    for path, factory in (ours, FileStorage), (theirs, ZodbFileStorage):
        storage = factory(path)
        before = os.path.getsize(path)
        storage.pack(half, referencesf, gc=gc)
        assert os.path.getsize(path) < before
        storage.close()
    for suffix in "", ".index", ".old":
        with open(ours + suffix, "rb") as a, open(theirs + suffix, "rb") as b:
            assert a.read() == b.read(), suffix


@pytest.mark.parametrize("gc", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_tools_find_packed_and_undone_files_sound(tmp_path, caplog, capsys, seed, gc):
    path = str(tmp_path / "Data.fs")
    half = fill(FileStorage(path), seed, undo=True)
    storage = FileStorage(path)
    expected = content(storage)
    storage = FileStorage(path)
    storage.pack(half, referencesf, gc=gc)
    storage.close()
    assert content(FileStorage(path)) == expected
    assert content(ZodbFileStorage(path)) == expected
    assert_sound(path, caplog, capsys)


def test_commits_go_on_while_it_packs(tmp_path, caplog, capsys):
    path = str(tmp_path / "Data.fs")
    half = fill(FileStorage(path), 1)
    storage = FileStorage(path)
    database = ZODB.DB(storage)
    phases = []

    def progress(at):
        if at["phase"] not in phases:
            phases.append(at["phase"])
            with database.transaction() as connection:
                connection.root()["tree"][100 + len(phases)] = PersistentMapping(number=1, child=PersistentMapping(text=""))

    storage.pack(half, referencesf, progress=progress)
    assert phases == [phase for phase in PHASES if phase != "catch up"]
    database.close()
    seen, _ = content(ZodbFileStorage(path))
    assert [key for key in seen if key > 100] == [101, 102, 103, 104]
    assert_sound(path, caplog, capsys)


KILLED = """
import os, signal, sys
from ZODB.serialize import referencesf
from zeo_rs import FileStorage

def progress(at):
    if at["phase"] == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

storage = FileStorage(sys.argv[1], blob_dir=sys.argv[2])
storage.pack(10**10, referencesf, progress=progress)
"""


@pytest.mark.parametrize("phase", ["index", "mark", "copy", "switch"])
def test_a_killed_pack_costs_nothing(tmp_path, caplog, capsys, phase):
    path, blobs = str(tmp_path / "Data.fs"), str(tmp_path / "blobs")
    fill(FileStorage(path, blob_dir=blobs), 2)
    database = ZODB.DB(FileStorage(path, blob_dir=blobs))
    for text in b"one", b"two":
        with database.transaction() as connection:
            connection.root()["blob"] = Blob(text)
    database.close()
    expected = content(FileStorage(path, blob_dir=blobs))
    assert expected[1] == [b"two"]
    with open(path, "rb") as file:
        data = file.read()
    killed = subprocess.run([sys.executable, "-c", KILLED, path, blobs, phase], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    with open(path, "rb") as file:
        assert file.read() == data
    storage = FileStorage(path, blob_dir=blobs)
    storage.pack(10**10, referencesf)
    storage.close()
    assert content(ZodbFileStorage(path, blob_dir=blobs)) == expected
    assert_sound(path, caplog, capsys)


def test_a_dangling_reference_is_a_key_error(tmp_path):
    path = str(tmp_path / "Data.fs")
    fill(FileStorage(path), 3)
    storage = FileStorage(path)
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        oid = connection.root()["tree"]._p_oid
    txn = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(txn)
    storage.deleteObject(oid, storage.getTid(oid), txn)
    storage.tpc_vote(txn)
    storage.tpc_finish(txn)
    with pytest.raises(KeyError) as error:
        storage.pack(10**10, referencesf)
    assert error.value.args == (oid,)
    storage.pack(10**10, referencesf, gc=False)
    database.close()


def test_it_can_be_cancelled(tmp_path):
    path = str(tmp_path / "Data.fs")
    half = fill(FileStorage(path), 4)
    storage = FileStorage(path)
    with pytest.raises(ZODB.POSException.POSError, match="cancelled"):
        storage.pack(half, referencesf, progress=lambda at: at["phase"] != "copy")
    storage.close()
    assert not os.path.exists(path + ".pack")


def test_progress_and_throttle(tmp_path):
    """Reports say how far it is; a throttled pack takes its time, and can be cancelled while it waits."""
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    database = ZODB.DB(storage)
    for turn in range(3):
        with database.transaction() as connection:
            for number in range(20):
                connection.root()[number] = PersistentMapping(text="%d" % turn + "x" * 300_000)
    size = storage.getSize()
    reports = []
    with pytest.raises(ZODB.POSException.POSError, match="cancelled"):
        # an hour, if it were not for the second report
        storage.pack(10**10, referencesf, throttle=5_000, progress=lambda at: reports.append(at) or len(reports) < 3)
    assert storage.getSize() == size and len(reports) == 3
    reports.clear()
    started = time.monotonic()
    storage.pack(10**10, referencesf, throttle=40_000_000, progress=reports.append)
    # the file is read whole, and what stays of it is written
    assert time.monotonic() - started > 0.4
    assert storage.getSize() < size / 2
    phases = {}
    for at in reports:
        assert set(at) == {"phase", "bytes_done", "bytes_total", "objects_done", "objects_total"}
        phases.setdefault(at["phase"], []).append(at)
        if at["bytes_total"]:
            assert at["bytes_done"] <= at["bytes_total"]
        if at["objects_total"]:
            assert at["objects_done"] <= at["objects_total"]
    assert [phase for phase in phases if phase != "catch up"] == ["index", "mark", "copy", "switch"]
    assert len(phases["index"]) > 2 and phases["index"][0]["bytes_total"] == size
    for of_phase in phases.values():
        done = [at["bytes_done"] for at in of_phase]
        assert done == sorted(done)
    database.close()


NO_ROOM = """
import os, resource, signal, sys
from ZODB.serialize import referencesf
from zeo_rs import FileStorage

path, share = sys.argv[1], float(sys.argv[2])
before = open(path, "rb").read()
storage = FileStorage(path)
storage.pack(1000, referencesf)  # nothing to be done: whatever is needed is imported now
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(len(before) * share), unlimited[1]))
try:
    storage.pack(10**10, referencesf)
except OSError as error:
    print(error)
else:
    sys.exit("it was packed")
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
assert open(path, "rb").read() == before
assert not os.path.exists(path + ".pack")
storage.pack(10**10, referencesf)
assert os.path.getsize(path) < len(before)
storage.close()
"""


@pytest.mark.parametrize("share", [0.0001, 0.05, 0.1])
def test_a_disk_without_room_costs_nothing(tmp_path, caplog, capsys, share):
    path = str(tmp_path / "Data.fs")
    fill(FileStorage(path), 5)
    expected = content(FileStorage(path))
    packed = subprocess.run([sys.executable, "-c", NO_ROOM, path, str(share)], timeout=60, capture_output=True, text=True)
    assert packed.returncode == 0, packed.stderr
    assert "Data.fs.pack; the storage is as it was" in packed.stdout
    assert content(ZodbFileStorage(path)) == expected
    assert_sound(path, caplog, capsys)


@pytest.mark.parametrize("gc", [True, False])
def test_compressed_records(tmp_path, gc):
    path = str(tmp_path / "Data.fs")
    storage = ZlibStorage(FileStorage(path))
    half = fill(storage, 6)
    expected = content(ZlibStorage(FileStorage(path)))
    # through the wrapper, whose references are found in Python, and without it
    for wrap in ZlibStorage, lambda storage: storage:
        storage = wrap(FileStorage(path))
        storage.pack(half, referencesf, gc=gc)
        size = os.path.getsize(path)
        storage.close()
        assert content(ZlibStorage(FileStorage(path))) == expected
    assert os.path.getsize(path) == size
    assert content(ZlibStorage(ZodbFileStorage(path))) == expected


# -- packers of the application's own


@pytest.mark.parametrize("gc", [True, False])
@pytest.mark.parametrize("keep_old", [True, False])
def test_zodbs_packer(tmp_path, caplog, capsys, gc, keep_old):
    """ZODB's own is a packer as good as any: it reads and locks what `IFileStorage` promises."""
    path, blobs = str(tmp_path / "Data.fs"), str(tmp_path / "blobs")
    half = fill(FileStorage(path, blob_dir=blobs), 7)
    storage = FileStorage(path, blob_dir=blobs, packer=ZodbFileStorage.packer, pack_keep_old=keep_old)
    database = ZODB.DB(storage)
    for text in b"one", b"two":
        with database.transaction() as connection:
            connection.root()["blob"] = Blob(text)
    database.close()
    expected = content(FileStorage(path, blob_dir=blobs))
    files = [sum(name.endswith(".blob") for _, _, names in os.walk(blobs) for name in names)]
    storage = FileStorage(path, blob_dir=blobs, packer=ZodbFileStorage.packer, pack_keep_old=keep_old)
    sizes = [storage.getSize()]
    for when in half, 10**10, 10**10:
        storage.pack(when, referencesf, gc=gc)
        sizes.append(storage.getSize())
        files.append(sum(name.endswith(".blob") for _, _, names in os.walk(blobs) for name in names))
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3] == os.path.getsize(path)
    assert files == [2, 2, 1, 1] if gc else files == [2, 2, 2, 2]
    assert not os.path.exists(path + ".pack") and not os.path.exists(os.path.join(blobs, ".removed"))
    assert os.path.exists(path + ".old") == os.path.exists(blobs + ".old") == keep_old or not gc
    assert storage._commit_lock.acquire(timeout=1)
    storage._commit_lock.release()
    storage.close()
    reopened = FileStorage(path, blob_dir=blobs)
    assert content(reopened) == expected
    assert content(ZodbFileStorage(path, blob_dir=blobs)) == expected
    assert_sound(path, caplog, capsys)


def test_what_a_packer_is_called_with(tmp_path):
    calls = []

    def packer(*args):
        calls.append(args)

    storage = FileStorage(tmp_path / "Data.fs", packer=packer, pack_gc=False)
    storage.pack(1000.5, referencesf)
    assert not calls  # there is nothing in it
    ZODB.DB(storage)
    storage.pack(1000.5, referencesf)
    storage.pack(1000.5, referencesf, gc=True)
    stop = ZODB.TimeStamp.TimeStamp(1970, 1, 1, 0, 16, 40.5).raw()
    assert calls == [(storage, referencesf, stop, False), (storage, referencesf, stop, True)]
    with pytest.raises(TypeError, match="packer of its own"):
        storage.pack(1000, referencesf, throttle=5)
    storage.close()


def test_a_packer_that_fails_costs_nothing(tmp_path):
    """Also one that writes something else than it says: its file is verified before it takes the place."""
    path = str(tmp_path / "Data.fs")
    fill(FileStorage(path), 8)
    with open(path, "rb") as file:
        data = file.read()
    attempts = []

    def packer(storage, referencesf, stop, gc):
        attempt = attempts[-1]
        written, size = data, len(data)
        if attempt == "raises":
            raise ZeroDivisionError
        if attempt == "nested":
            storage.pack(10**10, referencesf)
        storage._commit_lock.acquire()
        if attempt == "wrong size":
            size -= 8
        elif attempt == "cut":
            written = data[:-5]
        elif attempt == "older":  # without the newest transaction
            written = data[: -8 - int.from_bytes(data[-8:], "big")]
            size = len(written)
        elif attempt == "damaged":
            written = data[:200] + b"x" * 50 + data[250:]
        elif attempt == "text":
            written = b"FS21" + data[4:]
        if attempt != "nothing written":
            with open(storage._file.name + ".pack", "wb") as file:
                file.write(written)
        return size, {}

    storage = FileStorage(path, packer=packer)
    for attempt, error in {
        "raises": ZeroDivisionError,
        "nested": FileStorageError,
        "wrong size": FileStorageError,
        "cut": FileStorageError,
        "older": FileStorageError,
        "damaged": FileStorageError,
        "text": FileStorageError,
        "nothing written": FileNotFoundError,
    }.items():
        attempts.append(attempt)
        # up to the newest transaction but one
        with pytest.raises(error):
            storage.pack(1000, referencesf)
        with open(path, "rb") as file:
            assert file.read() == data, attempt
        assert not os.path.exists(path + ".pack"), attempt
        assert storage._commit_lock.acquire(timeout=1), attempt
        storage._commit_lock.release()
    # the old file is there, and takes commits
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["more"] = 1
    database.close()


def test_an_old_file_does_not_outlive_a_pack_that_keeps_none(tmp_path):
    path, blobs = str(tmp_path / "Data.fs"), str(tmp_path / "blobs")
    for keep_old in True, False:
        half = fill(FileStorage(path, blob_dir=blobs), 9)
        storage = FileStorage(path, blob_dir=blobs, pack_keep_old=keep_old)
        storage.pack(half, referencesf)
        storage.close()
        assert os.path.exists(path + ".old") == keep_old


@pytest.mark.parametrize("finder", [referencesf, lambda record: referencesf(record)], ids=["native", "python"])
def test_a_later_record_that_cannot_be_read_is_no_reason_not_to_pack(tmp_path, finder):
    """ZODB does not read what was written after the pack time; fsrecover packs what it saved of a damaged file."""
    path = str(tmp_path / "Data.fs")
    half = fill(FileStorage(path), 10)
    storage = FileStorage(path)
    size = storage.getSize()

    def store(oid, serial):
        txn = ZODB.Connection.TransactionMetaData()
        storage.tpc_begin(txn)
        storage.store(oid, serial, b"no pickle", "", txn)
        storage.tpc_vote(txn)
        storage.tpc_finish(txn)

    store(storage.new_oid(), b"\0" * 8)
    storage.pack(half, finder)
    assert storage.getSize() < size
    # what is reached at the pack time could refer to anything
    root = b"\0" * 8
    store(root, storage.getTid(root))
    with pytest.raises(Exception, match="no pickle|invalid load key|opcode"):
        storage.pack(10**10, finder)
    storage.close()


def history_of(storage):
    return [(t.tid, [(r.oid, r.data) for r in t]) for t in storage.iterator()]


@pytest.mark.parametrize("when", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 1e300, -1e10, -2208988801.0])
def test_a_pack_time_that_is_none_is_refused(tmp_path, when):
    """Wrapping arithmetic made a time before 1900 a time after all, and history was gone."""
    storage = FileStorage(str(tmp_path / "Data.fs"))
    fill(storage, 1)
    storage = FileStorage(str(tmp_path / "Data.fs"))
    before = history_of(storage)
    with pytest.raises(ValueError, match="Invalid pack time"):
        storage.pack(when, referencesf)
    storage.packer = lambda *args: pytest.fail("called")
    with pytest.raises(ValueError, match="Invalid pack time"):
        storage.pack(when, referencesf)
    assert history_of(storage) == before
    storage.close()


def test_a_server_refuses_them_too(tmp_path):
    address, stop = zeo_rs.server(str(tmp_path / "Data.fs"))
    database = ZODB.DB(zeo_rs.ClientStorage(address))
    for number in range(5):
        with database.transaction() as connection:
            connection.root()["number"] = number
    before = len(database.undoLog(0, 50))
    with pytest.raises(Exception, match="Invalid pack time"):
        database.pack(days=100_000)
    with pytest.raises(Exception, match="Invalid pack time"):
        database.storage.pack(float("nan"), referencesf)
    assert len(database.undoLog(0, 50)) == before == 6
    database.pack()
    assert len(database.undoLog(0, 50)) == 0
    database.close()
    stop()


@pytest.mark.parametrize("gc", [0, 1, "yes", "", None])
def test_gc_is_any_truth_value(tmp_path, gc):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    half = fill(storage, 1)
    storage = FileStorage(str(tmp_path / "Data.fs"))
    storage.pack(half, referencesf, gc=gc)
    storage.close()


@pytest.mark.parametrize("throttle", [0, -1, -(10**30)])
def test_a_throttle_is_positive(tmp_path, throttle):
    storage = FileStorage(str(tmp_path / "Data.fs"))
    with pytest.raises(ValueError, match="throttle"):
        storage.pack(time.time(), referencesf, throttle=throttle)
    storage.close()


INTERRUPTED = """
import os, signal, sys, time
from zeo_rs import FileStorage
from ZODB.serialize import referencesf
storage = FileStorage(sys.argv[1])
if sys.argv[2] == "lock":
    storage._commit_lock.acquire()
    import threading
    # once the pack waits for the lock, or will
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    throttle = None
elif sys.argv[2] == "native":
    import threading
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    throttle = 100_000
else:
    def referencesf(record, f=referencesf):
        os.kill(os.getpid(), signal.SIGINT)
        return f(record)
    throttle = None
try:
    storage.pack(time.time(), referencesf, throttle=throttle)
except KeyboardInterrupt:
    print("interrupted")
assert not os.path.exists(sys.argv[1] + ".pack")
"""


@pytest.mark.parametrize("where", ["lock", "native", "python"])
def test_ctrl_c_interrupts(tmp_path, where):
    """Without a progress callback, too. Uninterrupted, it would take minutes, or for ever."""
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    with ZODB.DB(storage).transaction() as connection:
        for number in range(30):
            connection.root()[number] = PersistentMapping(text="x" * (1 << 20))
    connection.db().close()
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, path, where], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "interrupted\n", done.stderr


def test_the_switch_does_not_copy_what_its_lock_was_waited_for(tmp_path):
    """A transaction of any size may hold the lock: what it wrote is copied after others have had their turn."""
    storage = FileStorage(str(tmp_path / "Data.fs"))
    half = fill(storage, 1)
    storage = FileStorage(str(tmp_path / "Data.fs"))
    t = ZODB.Connection.TransactionMetaData()
    storage.tpc_begin(t)
    for number in range(40):
        storage.store(storage.new_oid(), b"\0" * 8, b"x" * (1 << 20), "", t)
    waits, phases = threading.Event(), []

    def progress(at):
        if at["phase"] != (phases[-1] if phases else None):
            phases.append(at["phase"])
        if at["phase"] == "switch":
            waits.set()

    packing = threading.Thread(target=storage.pack, args=(half, referencesf), kwargs={"gc": False, "progress": progress})
    packing.start()
    assert waits.wait(60)
    storage.tpc_vote(t)
    storage.tpc_finish(t)
    packing.join(60)
    assert phases[-3:] == ["switch", "catch up", "switch"], phases
    assert len(list(storage.iterator())) > 1
    storage.close()


def test_the_bar_of_a_phase_without_bytes_counts_objects(monkeypatch, capsys):
    from zeo_rs.cli.progress import Progress

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    at = {"phase": "mark", "bytes_done": 0, "bytes_total": 0, "objects_done": 0, "objects_total": 10}
    progress(at)
    progress(at | {"objects_done": 5})
    assert (progress._bar.n, progress._bar.total) == (5, 10)
    # more than was thought: what later transactions need
    progress(at | {"objects_done": 12})
    assert progress._bar.n == 10
    progress({"phase": "copy", "bytes_done": 3, "bytes_total": 7, "objects_done": 1, "objects_total": 0})
    assert (progress._bar.n, progress._bar.total) == (3, 7)
    progress.end()
