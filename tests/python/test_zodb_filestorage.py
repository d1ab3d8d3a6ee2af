"""ZODB's own tests of FileStorage, with `zeo_rs.FileStorage` in its place.

Whatever of ZODB's tests makes a FileStorage makes one of ours: the storage mix-ins (basic, undo, revisions, pack, conflicts,
history, iteration, threads, read-only, recovery, races), each plain, with blobs, and wrapped in HexStorage; the reusable blob
suite; the doctests of FileStorage, external garbage collection and configuration; corruption, fsrecover, repozo and the
other tools. ZODB itself is not changed but for the name.

`pytest --co -q` on this file counts them.
"""

import doctest
import importlib
import os
import re
import sys
import unittest
from collections import Counter

import pytest
import ZODB.FileStorage
import ZODB.interfaces
from zope.interface import providedBy
from zope.interface.verify import verifyObject
from zope.testing.renormalizing import RENormalizing

from zeo_rs import FileStorage

ZODBS = ZODB.FileStorage.FileStorage
assert ZODBS is not FileStorage

#: Modules, and what part of each.
MODULES = {
    "ZODB.tests.testFileStorage": "",
    "ZODB.tests.testRecover": "",
    "ZODB.tests.testZODB": "",
    "ZODB.tests.testThreadedShutdown": "",
    "ZODB.tests.testDemoStorage": "DemoStorageWrappedAroundFileStorage",
    "ZODB.tests.testblob": "blob",
    "ZODB.tests.testfsoids": "",
    "ZODB.tests.test_fsdump": "",
    "ZODB.FileStorage.tests": "",
    "ZODB.scripts.tests.test_repozo": "",
    "ZODB.scripts.tests.test_fstest": "",
    "ZODB.scripts.tests.test_fsdump_fsstats": "",
    "ZODB.scripts.tests.test_doc": "",
}

#: What cannot hold here, by the end of a test's name. Each must fail: one that passes is to be removed.
NOT_APPLICABLE = {
    "test_use_fsIndex": "the index is not ZODB's class fsIndex; `_index` is a mapping with its methods",
    "test_conversion_to_fsIndex": "as before; index files of old formats are not converted: the data file is scanned",
    "test_conversion_to_fsIndex_readonly": "as before",
    "test_conversion_from_dict_to_btree_data_in_fsIndex": "looks into fsIndex",
    "test_save_after_load_with_no_index": "looks at the private counter _saved; that the index is saved: tests/rust/filestorage",
    "testFlushNeededAfterTruncate": "breaks ZODB's pool of buffered files to see that it is needed; there is none",
    "testCorruptionInPack": "the error has other words: see test_corruption_in_pack",
    "testTimeTravelOnOpen": "sets the private _ts; our lines are logged as zeo_rs",
    "deal_with_finish_failures": "replaces the private _finish_finish; failures of a commit: tests/rust/filestorage/crash.rs",
    "pack_disk_full_copyToPacktime": "replaces ZODB's packer by one that runs out of disk; ours does in test_pack.py",
    "pack_disk_full_copyRest": "as before",
    "fstail_txt": "removes a .tmp file, which ZODB leaves behind and the engine does not",
}
#: What is not even run.
NOT_RUN = {"_save_index": "lowers the recursion limit of the process, below what pytest needs; the engine does not recurse"}
if os.geteuid() == 0:
    NOT_APPLICABLE["blob_transaction_txt"] = "expects a read-only file not to be writable, which it is for root (fails with ZODB, too)"

#: Different words for the same thing.
WORDS = RENormalizing(
    [
        (re.compile(r"the storage quota of \d+ bytes is exceeded"), "The storage quota has been exceeded."),
        # absolute, so that a chdir does no harm
        (re.compile(r"'/\S*/my\.fs'"), "'my.fs'"),
    ]
)


def _flatten(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flatten(test)
        else:
            yield test


def _tests():
    seen = Counter()
    for name, part in MODULES.items():
        module = importlib.import_module(name)
        if hasattr(module, "test_suite"):
            suite = module.test_suite()
        else:
            suite = unittest.defaultTestLoader.loadTestsFromModule(module)
        for test in _flatten(suite):
            if part in test.id():
                if isinstance(test, doctest.DocTestCase):
                    test._dt_checker = WORDS + test._dt_checker if isinstance(test._dt_checker, RENormalizing) else WORDS
                label = f"{name.rpartition('.')[2]}-{test.id().rpartition('/')[2].removeprefix(name + '.')}"
                seen[label] += 1
                if seen[label] > 1:  # doctest files run for several storages
                    label += f"-{seen[label]}"
                yield pytest.param(test, id=label)


TESTS = list(_tests())


def _in_place_of_zodbs(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("ZODB."):
            for attribute, value in list(vars(module).items()):
                if value is ZODBS:
                    monkeypatch.setattr(module, attribute, FileStorage)
    # a subclass made when the module was imported
    made = importlib.import_module("ZODB.tests.testFileStorage")
    without_restore = type("FileStorageNoRestore", (FileStorage,), {"restore": made.FileStorageNoRestore.restore})
    monkeypatch.setattr(made, "FileStorageNoRestore", without_restore)


@pytest.mark.parametrize("test", TESTS)
def test_zodb(test, tmp_path, monkeypatch):
    name = test.id().rpartition(".")[2]
    if name in NOT_RUN:
        pytest.skip(NOT_RUN[name])
    _in_place_of_zodbs(monkeypatch)
    monkeypatch.chdir(tmp_path)
    result = unittest.TestResult()
    test.run(result)
    problems = [text for _, text in result.failures + result.errors]
    assert result.testsRun == 1
    if name in NOT_APPLICABLE:
        assert problems, f"{test.id()} passes: it is not to be listed"
        pytest.skip(NOT_APPLICABLE[name])
    assert not problems, "\n".join(problems)
    if result.skipped:
        pytest.skip(result.skipped[0][1])


def test_ours_is_in_the_place_of_zodbs(monkeypatch):
    """Else the tests above would show nothing."""
    _in_place_of_zodbs(monkeypatch)
    for name in MODULES:
        module = importlib.import_module(name)
        assert ZODBS not in vars(module).values(), name
    assert ZODB.FileStorage.FileStorage is FileStorage
    assert issubclass(sys.modules["ZODB.tests.testFileStorage"].FileStorageNoRestore, FileStorage)


def test_corruption_in_pack(tmp_path):
    """What `testCorruptionInPack` is about: damage is found, told, and not copied."""
    from ZODB.FileStorage.format import CorruptedError
    from ZODB.serialize import referencesf

    storage = FileStorage(tmp_path / "Data.fs")
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["xyz"] = 1
    database.close()
    storage = FileStorage(tmp_path / "Data.fs")
    content = bytearray((tmp_path / "Data.fs").read_bytes())
    content[-1] ^= 1
    (tmp_path / "Data.fs").write_bytes(content)
    with pytest.raises(CorruptedError, match="the two lengths of the transaction differ"):
        storage.pack(10**10, referencesf)
    storage.close()
    assert (tmp_path / "Data.fs").read_bytes() == content


INTERFACES = [
    "IStorage",
    "IStorageRestoreable",
    "IStorageIteration",
    "IStorageUndoable",
    "IStorageCurrentRecordIteration",
    "IExternalGC",
    "IMultiCommitStorage",
    "IBlobStorage",
    "IBlobStorageRestoreable",
]


@pytest.mark.parametrize("name", INTERFACES)
@pytest.mark.parametrize("blobs", [False, True])
def test_interfaces(tmp_path, name, blobs):
    interface = getattr(ZODB.interfaces, name)
    storage = FileStorage(tmp_path / "Data.fs", blob_dir=tmp_path / "blobs" if blobs else None)
    try:
        if "Blob" in name and not blobs:
            assert not interface.providedBy(storage)
        else:
            assert verifyObject(interface, storage)
    finally:
        storage.close()


def test_declared_as_zodbs(tmp_path):
    """Neither more nor less than ZODB's own, but for the interface that says what both do."""
    found = []
    for storage_class in (FileStorage, ZODBS):
        name = storage_class.__module__
        storage = storage_class(str(tmp_path / name), blob_dir=str(tmp_path / f"{name}.blobs"))
        found.append({interface.__name__ for interface in providedBy(storage).flattened()})
        storage.close()
    ours, zodbs = found
    assert ours - zodbs == {"IMultiCommitStorage"} and not zodbs - ours


def test_external_gc_is_among_them():
    assert "testFileStorage-IExternalGC_test" in [param.id for param in TESTS]
