"""Processes that are killed while they write lose one record at most, and damage none."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import torch

from spectral_paged.store import DiskTier, Folder
from spectral_paged.store.record_file import check_record
from support.disk_records import IDENTITY, total

# One process imports torch; its children write records until they are killed. A child writes the
# numbers of its records to a file of its own, each line by one call, so that no kill and no other
# process comes between the parts of a line. The pipe is its parent's alone.
PARENT = """
import os, sys, traceback
from pathlib import Path
import torch
from spectral_paged.store import DiskTier, Folder

def write_records(number, said):
    tier = DiskTier(Folder(Path(sys.argv[1]), int(sys.argv[2])), bytes(range(32)))
    while True:
        number += 1
        body = torch.full((200_000,), number % 251, dtype=torch.uint8)
        tier.write(b"%d" % number, None, list(body.split(70_000)), None)
        tier.flush()
        os.write(said, b"%d\\n" % number)

for line in sys.stdin:
    number, path = line.split()
    said = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    pid = os.fork()
    if not pid:
        try:
            write_records(int(number), said)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(said)
    os.write(1, b"%d\\n" % pid)
    os.write(1, b"%d\\n" % os.waitpid(pid, 0)[1])
"""
PATIENCE = 60  # seconds for a record of a child


def numbers(path):
    """The numbers in a child's file, of which the last line may not be whole."""
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return [int(line) for line in lines[:-1]]


def killed_writer(parent, said, start, count, seconds):
    """Have a child write records from `start` on, and kill it a time after the first `count`;
    returns the last that it wrote."""
    parent.stdin.write(f"{start} {said}\n")
    parent.stdin.flush()
    child = int(parent.stdout.readline())
    deadline = time.monotonic() + PATIENCE
    while len(numbers(said)) < count:
        assert time.monotonic() < deadline, f"a child wrote {numbers(said)} in {PATIENCE} seconds"
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert int(parent.stdout.readline()) == signal.SIGKILL, "it ended by itself"
    written = numbers(said)
    assert written == list(range(start + 1, start + 1 + len(written)))
    return start + len(written)


def test_kills_while_records_are_written_lose_no_other(tmp_path):
    """Every record that was finished is there, whole; nothing is left of others, and the size
    holds. `make kills` kills 200 times."""
    folder, size, last, written = tmp_path / "store", 300 * 200_200, 0, 0
    moments = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        for kill in range(int(os.environ.get("STORE_KILLS", "12"))):
            said, count = tmp_path / f"said-{kill}", moments.randrange(4)
            end = killed_writer(parent, said, last, count, moments.random() * 0.02)
            written += end - last
            tier = DiskTier(Folder(folder, size), IDENTITY)
            tier.flush()
            assert not list(folder.glob("*.tmp"))
            assert tier._folder.used() == total(tier) <= size
            pieces = list(torch.zeros(200_000, dtype=torch.uint8).split(70_000))
            for number in range(max(last + 1, end - 200), end + 1):
                copy = tier.read(b"%d" % number, None, pieces)
                copy.wait()
                assert not copy.failed, "a record that was finished is lost"
                assert all((piece == number % 251).all() for piece in pieces)
            for entry in tier._folder.entries():
                check_record(folder / entry.name)
            assert tier.counters.failed == 0
            tier.close()
            last = end + 1  # this one may be there or not
        parent.stdin.close()
    assert written > 3, "nothing was written"
