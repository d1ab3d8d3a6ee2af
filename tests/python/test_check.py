"""`zeo-rs check` and `zeo-rs dump`, on files of ZODB's."""

import argparse
import io
import json
import os
import shutil

import pytest
from ZODB.FileStorage.fsdump import fsdump

from zeo_rs import _zeo
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
