"""ZODB's own storage tests, run against `zeo_rs.FileStorage`."""

import os
import unittest

import pytest
import ZODB.tests.hexstorage
from ZODB.tests import (
    BasicStorage,
    ConflictResolution,
    HistoryStorage,
    IteratorStorage,
    MTStorage,
    PackableStorage,
    PersistentStorage,
    ReadOnlyStorage,
    RecoveryStorage,
    RevisionStorage,
    StorageTestBase,
    Synchronization,
    TransactionalUndoStorage,
    racetest,
    testblob,
)

from zeo_rs import FileStorage


class Base(StorageTestBase.StorageTestBase):
    """Opens `FileStorageTests.fs` in a directory of the test's own, as the mix-ins expect."""

    use_extension_bytes = True

    def open(self, **kwargs):
        self._storage = FileStorage("FileStorageTests.fs", **kwargs)

    def setUp(self):
        super().setUp()
        self.open(create=True)

    def tearDown(self):
        self._storage.close()
        super().tearDown()


class TestFileStorage(
    Base,
    BasicStorage.BasicStorage,
    TransactionalUndoStorage.TransactionalUndoStorage,
    RevisionStorage.RevisionStorage,
    PackableStorage.PackableStorageWithOptionalGC,
    PackableStorage.PackableUndoStorage,
    Synchronization.SynchronizedStorage,
    ConflictResolution.ConflictResolvingStorage,
    ConflictResolution.ConflictResolvingTransUndoStorage,
    HistoryStorage.HistoryStorage,
    IteratorStorage.IteratorStorage,
    IteratorStorage.ExtendedIteratorStorage,
    PersistentStorage.PersistentStorage,
    MTStorage.MTStorage,
    ReadOnlyStorage.ReadOnlyStorage,
    racetest.RaceTests,
):
    pass


class TestHexStorage(TestFileStorage):
    """The same with a wrapper that transforms every record."""

    def open(self, **kwargs):
        self._storage = ZODB.tests.hexstorage.HexStorage(FileStorage("FileStorageTests.fs", **kwargs))


class TestRecovery(Base, RecoveryStorage.RecoveryStorage):
    """Copies into a second storage."""

    def setUp(self):
        super().setUp()
        self._dst = FileStorage("Dest.fs", create=True)

    def tearDown(self):
        self._dst.close()
        super().tearDown()

    def new_dest(self):
        return FileStorage("Dest.fs", create=True)


class TestHexRecovery(TestRecovery):
    def open(self, **kwargs):
        self._storage = ZODB.tests.hexstorage.HexStorage(FileStorage("FileStorageTests.fs", **kwargs))

    def setUp(self):
        super().setUp()
        self._dst.close()
        self._dst = self.new_dest()

    def new_dest(self):
        return ZODB.tests.hexstorage.HexStorage(FileStorage("Dest.fs", create=True))


def _flatten(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from _flatten(test)
        else:
            yield test


def _blob_tests():
    """ZODB's reusable blob suite, plain and with a wrapper around."""

    def plain(name, blob_dir):
        return FileStorage("%s.fs" % name, blob_dir=blob_dir)

    def wrapped(name, blob_dir):
        return ZODB.tests.hexstorage.HexStorage(FileStorage("%s.fs" % name, blob_dir=blob_dir))

    for prefix, factory in (("Plain", plain), ("Hex", wrapped)):
        yield from _flatten(
            testblob.storage_reusable_suite(
                prefix,
                factory,
                test_blob_storage_recovery=True,
                test_packing=True,
            )
        )
    yield from _flatten(PackableStorage.IExternalGC_suite(lambda: FileStorage("data.fs", blob_dir="blobs", pack_gc=False)))


BLOB_TESTS = list(_blob_tests())


#: Tests that cannot hold, with the reason.
NOT_APPLICABLE = {}
if os.geteuid() == 0:
    NOT_APPLICABLE["blob_transaction_txt"] = "expects a read-only file not to be writable, which it is for root (fails with ZODB, too)"


@pytest.mark.parametrize("test", BLOB_TESTS, ids=lambda test: test.id().rpartition("/")[2])
def test_zodb_suite(test, tmp_path, monkeypatch):
    if test.id() in NOT_APPLICABLE:
        pytest.skip(NOT_APPLICABLE[test.id()])
    monkeypatch.chdir(tmp_path)
    result = unittest.TestResult()
    test.run(result)
    problems = [text for _, text in result.failures + result.errors]
    assert result.testsRun == 1 and not problems, "\n".join(problems)

