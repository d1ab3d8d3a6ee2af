"""`<rustfilestorage>` in configurations of ZODB, and what its keys do."""

import os
import time

import pytest
import transaction
import ZODB
import ZODB.config
from persistent.mapping import PersistentMapping
from ZODB.blob import Blob
from ZODB.FileStorage.FileStorage import FileStorageQuotaError
from ZODB.interfaces import IBlobStorage
from ZODB.POSException import ReadOnlyError
from ZODB.serialize import referencesf

import zeo_rs

calls = []


def packer(*args):
    calls.append(args)


def packer_of(name):
    return lambda *args: calls.append((name, *args))


def section(tmp_path, *lines, name="rustfilestorage"):
    body = "\n".join(lines)
    return f"<{name}>\npath {tmp_path}/Data.fs\n{body}\n</{name}>\n"


def opened(text):
    return ZODB.config.storageFromString(f"%import zeo_rs\n{text}")


def fill(storage, commits=3):
    database = ZODB.DB(storage)
    for number in range(commits):
        with database.transaction() as connection:
            connection.root()["child"] = PersistentMapping(number=number)
    database.close()


def test_defaults(tmp_path):
    storage = opened(section(tmp_path))
    assert type(storage) is zeo_rs.FileStorage
    assert not storage.isReadOnly() and storage.packer is None and storage.blob_dir is None and not IBlobStorage.providedBy(storage)
    size = [storage.getSize()]
    fill(storage)
    storage = opened(section(tmp_path))
    size.append(storage.getSize())
    storage.pack(time.time(), referencesf)  # with garbage collection
    assert size[0] < storage.getSize() < size[1] and len(storage) == 2
    assert os.path.getsize(tmp_path / "Data.fs.old") == size[1]
    storage.close()


def test_blob_dir(tmp_path):
    storage = opened(section(tmp_path, f"blob-dir {tmp_path}/blobs"))
    assert storage.blob_dir == f"{tmp_path}/blobs" and IBlobStorage.providedBy(storage)
    database = ZODB.DB(storage)
    with database.transaction() as connection:
        connection.root()["blob"] = Blob(b"content")
    with database.transaction() as connection:
        with connection.root()["blob"].open() as file:
            assert file.read() == b"content"
    database.close()


def test_create(tmp_path):
    fill(opened(section(tmp_path)))
    for create, objects in ("false", 2 + 2), ("true", 0):
        storage = opened(section(tmp_path, f"create {create}"))
        assert len(storage) == objects
        storage.close()


def test_read_only(tmp_path):
    fill(opened(section(tmp_path)))
    storage = opened(section(tmp_path, "read-only true"))
    assert storage.isReadOnly() and len(storage) == 4
    with pytest.raises(ReadOnlyError):
        storage.tpc_begin(transaction.TransactionManager().begin())
    storage.close()


def test_quota(tmp_path):
    """A record may begin below it and end above; the next may not, and what was committed stays usable."""
    storage = opened(section(tmp_path, "quota 4KB"))
    database = ZODB.DB(storage)
    with pytest.raises(FileStorageQuotaError, match="4096"):
        for number in range(100):
            with database.transaction() as connection:
                connection.root()[number] = "x" * 500
    assert 3000 < storage.getSize() < 6000
    size = storage.getSize()
    with database.transaction() as connection:
        assert len(connection.root()) > 2
    # room again
    database.pack()
    assert storage.getSize() < size
    with database.transaction() as connection:
        connection.root().clear()
    database.close()


def test_packer(tmp_path):
    fill(opened(section(tmp_path)))
    for text in f"{__name__}.packer", f"{__name__}:packer_of('named')":
        calls.clear()
        storage = opened(section(tmp_path, f"packer {text}", "pack-gc false"))
        storage.pack(time.time(), referencesf)
        ((*names, called_with, finder, stop, gc),) = calls
        assert names == (["named"] if ":" in text else [])
        assert (called_with, finder, gc, len(stop)) == (storage, referencesf, False, 8)
        storage.close()


@pytest.mark.parametrize("gc", ["true", "false"])
@pytest.mark.parametrize("keep_old", ["true", "false"])
def test_pack_keys(tmp_path, gc, keep_old):
    fill(opened(section(tmp_path)))
    storage = opened(section(tmp_path, f"pack-gc {gc}", f"pack-keep-old {keep_old}"))
    storage.pack(time.time(), referencesf)
    assert len(storage) == (2 if gc == "true" else 4)
    assert (tmp_path / "Data.fs.old").exists() == (keep_old == "true")
    # the argument counts more than the key
    storage.pack(time.time() + 1, referencesf, gc=True)
    storage.close()


def test_keys_are_zodbs(tmp_path):
    """Whatever ZODB's section takes, and nothing of our own."""
    component = os.path.join(os.path.dirname(ZODB.__file__), "component.xml")
    with open(component) as file:
        text = file.read().partition('<sectiontype name="filestorage"')[2].partition("</sectiontype>")[0]
    keys = {part.partition('"')[0] for part in text.split('<key name="')[1:]}
    tested = {"path", "blob-dir", "create", "read-only", "quota", "packer", "pack-gc", "pack-keep-old"}
    assert keys == tested


@pytest.mark.parametrize("wrapper", ["blobstorage", "zlibstorage", "demostorage", "zodb"])
def test_inside_other_sections(tmp_path, wrapper):
    inner = section(tmp_path)
    text = {
        "blobstorage": f"<blobstorage>\nblob-dir {tmp_path}/blobs\n{inner}</blobstorage>",
        "zlibstorage": f"%import zc.zlibstorage\n<zlibstorage>\n{inner}</zlibstorage>",
        "demostorage": "<demostorage>\n{base}{changes}</demostorage>",
        "zodb": f"<zodb>\n{inner}</zodb>",
    }[wrapper]
    if wrapper == "demostorage":
        os.mkdir(tmp_path / "changes")
        fill(opened(inner))
        changes = section(tmp_path / "changes").replace("<rustfilestorage>", "<rustfilestorage changes>")
        text = text.format(base=section(tmp_path, "read-only true"), changes=changes)
    if wrapper == "zodb":
        database = ZODB.config.databaseFromString(f"%import zeo_rs\n{text}")
    else:
        database = ZODB.DB(opened(text))
    for value in 1, 2:
        with database.transaction() as connection:
            connection.root()["value"] = PersistentMapping(value=value, text="x" * 500)
            if wrapper == "blobstorage":
                connection.root()["blob"] = Blob(b"%d" % value)
    if wrapper != "demostorage":
        database.undo(database.undoLog(0, 1)[0]["id"])
        transaction.commit()
        database.pack()
    with database.transaction() as connection:
        root = connection.root()
        assert root["value"]["value"] == (2 if wrapper == "demostorage" else 1)
        if wrapper == "blobstorage":
            with root["blob"].open() as file:
                assert file.read() == b"1"
        if wrapper == "demostorage":
            assert root["child"]["number"] == 2
    database.close()
    assert os.path.getsize(tmp_path / "Data.fs") > 100
