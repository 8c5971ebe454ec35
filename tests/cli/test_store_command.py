"""`spectral-paged store` shows, checks and shrinks a folder of pages."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from spectral_paged.cli.commands import main
from spectral_paged.store import DiskTier, Folder

BODY = [torch.arange(250, dtype=torch.uint8)]


@pytest.fixture
def folder(tmp_path):
    """Two models, with three records and with one."""
    for i, keys in ((1, b"abc"), (2, b"d")):
        tier = DiskTier(Folder(tmp_path, 1 << 20), bytes([i]) * 32)
        for key in keys:
            tier.write(bytes([key]), None, BODY, None)
        tier.close()
    return tmp_path


def records(folder):
    return sorted(folder.glob("*.page"))


def test_ls_shows_each_model(folder, capsys):
    assert main(["store", "ls", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["01" * 8, "3"], ["02" * 8, "1"]]
    assert lines[2].startswith("4 records in")


def test_verify_finds_damage_and_removes_it_if_told(folder, capsys):
    assert main(["store", "verify", str(folder)]) == 0
    bad = records(folder)[0]
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.write_bytes(data)
    assert main(["store", "verify", str(folder)]) == 1
    told = capsys.readouterr()
    assert bad.name in told.err and "damaged" in told.err and "1 damaged" in told.out
    assert main(["store", "verify", "--remove", str(folder)]) == 0
    assert not bad.exists() and len(records(folder)) == 3


def test_damage_that_cannot_be_removed_is_told(folder, capsys, monkeypatch):
    bad = records(folder)[0]
    bad.write_bytes(bad.read_bytes()[:-1])

    def refused(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "unlink", refused)
    assert main(["store", "verify", "--remove", str(folder)]) == 1
    told = capsys.readouterr()
    assert "cannot be removed: " in told.err and "Read-only" in told.err and "1 damaged" in told.out
    assert bad.exists()


def test_a_record_under_anothers_name_is_damage(folder, capsys):
    one, two = records(folder)[:2]
    one.write_bytes(two.read_bytes())
    assert main(["store", "verify", str(folder)]) == 1
    assert "another record" in capsys.readouterr().err


def test_prune_leaves_so_many_bytes(folder, capsys):
    size = records(folder)[0].stat().st_size
    assert main(["store", "prune", "--size", str(2 * size), str(folder)]) == 0
    assert len(records(folder)) == 2
    assert "removed 2 of 4 records" in capsys.readouterr().out


def test_prune_removes_a_model_and_what_killed_processes_left(folder):
    (folder / "x.tmp").write_bytes(b"left")
    assert main(["store", "prune", "--of", "01" * 8, str(folder)]) == 0
    assert len(records(folder)) == 1 and not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("action", ["ls", "verify", "prune"])
def test_a_folder_that_is_not_there_is_named(action, tmp_path, capsys):
    assert main(["store", action, str(tmp_path / "no")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(folder, capsys):
    assert main(["store", "prune", "--of", "ff", str(folder)]) == 2
    assert "store ls" in capsys.readouterr().err
