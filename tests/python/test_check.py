"""`zeo-rs check` and `zeo-rs dump`, on files of ZODB's."""

import argparse
import io
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import ZODB
from ZODB.FileStorage.fsdump import fsdump

from zeo_rs import FileStorage, _zeo
from zeo_rs.cli import check, dump

FIXTURES = os.path.join(os.path.dirname(os.path.dirname(__file__)), "fixtures", "filestorage")


def data(name):
    return os.path.join(FIXTURES, name, "Data.fs")


def run(module, *arguments):
    parser = argparse.ArgumentParser()
    module.arguments(parser)
    return module.run(parser.parse_args(arguments))


def test_a_sound_file(capsys):
    blobs = os.path.join(FIXTURES, "blobs", "blobs")
    assert run(check, data("blobs"), "--blob-dir", blobs) == 0
    out = capsys.readouterr().out
    assert out.endswith(" 4 blobs: 0 errors, 0 warnings\n") and out.count("\n") == 1
    assert run(check, data("undo"), "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_a_damaged_file_says_where(capsys):
    assert run(check, data("dangling")) == 1
    faults, summary = capsys.readouterr().out.splitlines()
    assert faults.startswith("error at ") and "oid 0x00, tid 0x03f58e" in faults
    assert faults.endswith("refers to 0x01, which does not exist")
    assert summary.endswith("1 errors, 0 warnings")
    assert run(check, data("dangling"), "--json") == 1
    fault, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (fault["severity"], fault["oid"], summary["errors"]) == ("error", "00" * 8, 1)
    assert run(check, data("dangling"), "--no-references") == 0


def test_what_cannot_be_checked(tmp_path, capsys):
    assert run(check, str(tmp_path / "none")) == 2
    assert "cannot open" in capsys.readouterr().err
    assert run(check, __file__) == 2
    assert "not a FileStorage data file" in capsys.readouterr().err
    assert run(dump, str(tmp_path / "none")) == 1


def test_an_exception_of_a_callback_comes_through():
    def fault(found):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _zeo.check_file(data("dangling"), fault)
    with pytest.raises(ZeroDivisionError):
        _zeo.check_file(data("undo"), print, progress=lambda at: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _zeo.dump_file(data("undo"), lambda text: 1 / 0)


@pytest.mark.parametrize("name", ["simple", "undo", "metadata", "delete", "packed", "zlib", "conflict_bucket"])
def test_dump_is_fsdump(tmp_path, capsys, name):
    path = str(tmp_path / "Data.fs")
    shutil.copy(data(name), path)
    expected = io.StringIO()
    fsdump(path, expected)
    assert run(dump, path) == 0
    lines = capsys.readouterr().out.splitlines()
    # ZODB does not look into compressed records
    if name != "zlib":
        assert lines == expected.getvalue().splitlines()
    assert len(lines) == expected.getvalue().count("\n")


def transactions(path):
    """Positions and lengths of the transactions of a sound file."""
    with open(path, "rb") as file:
        content = file.read()
    at, found = 4, []
    while at < len(content):
        (length,) = struct.unpack_from(">Q", content, at + 8)
        found.append((at, length + 8))
        at += length + 8
    return bytearray(content), found


def listed(capsys, path):
    status = run(dump, path)
    captured = capsys.readouterr()
    return status, captured.out.count("Trans #"), captured.err


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, at: struct.pack_into(">Q", content, at + 8, 3),  # shorter than its own header
        lambda content, at: struct.pack_into(">Q", content, at + 8, 1 << 40),  # beyond the end, but others follow
        lambda content, at: content.__setitem__(at + 16, ord("c")),  # as if unfinished, but others follow
        lambda content, at: content.__setitem__(slice(at, at + 23), b"\xff" * 23),
    ],
)
def test_dump_fails_on_damage_in_the_middle(tmp_path, capsys, damage):
    content, found = transactions(data("simple"))
    damage(content, found[1][0])
    path = tmp_path / "Data.fs"
    path.write_bytes(content)
    status, count, error = listed(capsys, str(path))
    assert (status, count) == (1, 1) and f"at {found[1][0]}" in error


def test_dump_leaves_out_what_is_not_finished(tmp_path, capsys):
    content, found = transactions(data("simple"))
    path = tmp_path / "Data.fs"
    last, length = found[-1]
    for end in (last + 5, last + 23, last + length - 9, last + length - 1):
        path.write_bytes(content[:end])
        assert listed(capsys, str(path))[:2] == (0, len(found) - 1), end
    content[last + 16] = ord("c")
    path.write_bytes(content)
    assert listed(capsys, str(path))[:2] == (0, len(found) - 1)


def test_dump_lists_an_unknown_status_as_fsdump_does(tmp_path, capsys):
    content, found = transactions(data("simple"))
    content[found[1][0] + 16] = ord("x")
    path = tmp_path / "Data.fs"
    path.write_bytes(content)
    expected = io.StringIO()
    fsdump(str(path), expected)
    assert run(dump, str(path)) == 0
    assert capsys.readouterr().out == expected.getvalue()


def test_a_database_that_was_never_closed_is_sound(tmp_path, capsys):
    """Its index is of the empty file that it was."""
    path = str(tmp_path / "Data.fs")
    database = ZODB.DB(FileStorage(path))
    assert os.path.exists(path + ".index")
    assert run(check, path, "--strict") == 0
    assert capsys.readouterr().out.endswith("0 errors, 0 warnings\n")
    database.close()


def test_an_empty_file_is_an_empty_database(tmp_path, capsys):
    path = tmp_path / "Data.fs"
    for content in (b"", b"FS3", b"FS30"):
        path.write_bytes(content)
        assert run(check, str(path), "--strict") == 0
        assert capsys.readouterr().out.startswith("0 transactions")
        assert run(dump, str(path)) == 0


def test_strict_is_about_warnings_too(tmp_path, capsys):
    content, found = transactions(data("simple"))
    path = tmp_path / "Data.fs"
    for changed in (content[:-1], content + b"garbage"):
        path.write_bytes(changed)
        assert run(check, str(path)) == 0
        assert "at the end of the file" in capsys.readouterr().out
        assert run(check, str(path), "--strict") == 1
        capsys.readouterr()


def test_an_old_revision_that_cannot_be_read_is_a_warning(tmp_path, capsys):
    path = str(tmp_path / "Data.fs")
    storage = FileStorage(path)
    serial = b"\0" * 8
    good = b"\x80\x03cpersistent.mapping\nPersistentMapping\nq\x00.\x80\x03}q\x01."
    for record in (b"no pickle", good):
        t = ZODB.Connection.TransactionMetaData()
        storage.tpc_begin(t)
        storage.store(b"\0" * 8, serial, record, "", t)
        storage.tpc_vote(t)
        serial = storage.tpc_finish(t)
    storage.close()
    assert run(check, path) == 0
    warning, summary = capsys.readouterr().out.splitlines()
    assert warning.startswith("warning at ") and "not current cannot be read" in warning
    assert summary.endswith("0 errors, 1 warnings")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("name", ["simple", "dangling"])
@pytest.mark.parametrize("command", ["check", "dump"])
def test_output_that_cannot_be_written_is_no_traceback(command, name, unbuffered):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "zeo_rs.cli", command, data(name)],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode in (1, 2)
    assert "No space left" in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
