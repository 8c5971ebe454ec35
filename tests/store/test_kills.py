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

# One process imports torch; its children write records until they are killed.
PARENT = """
import os, sys
from pathlib import Path
import torch
from spectral_paged.store import DiskTier, Folder

def write_records(number):
    tier = DiskTier(Folder(Path(sys.argv[1]), int(sys.argv[2])), bytes(range(32)))
    while True:
        number += 1
        body = torch.full((200_000,), number % 251, dtype=torch.uint8)
        tier.write(b"%d" % number, None, list(body.split(70_000)), None)
        tier.flush()
        print("wrote", number, flush=True)

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        write_records(int(line))
    print("child", pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", 0, flush=True)
"""


def killed_writer(parent, start, seconds):
    """Have a child write records from `start` on, kill it after a time; the last that it wrote."""
    parent.stdin.write(f"{start}\n")
    parent.stdin.flush()
    last = start
    for line in parent.stdout:
        what, number = line.split()
        if what == "wrote":
            last = int(number)
        elif what == "child":
            time.sleep(seconds)
            os.kill(int(number), signal.SIGKILL)
        else:
            return last
    raise AssertionError("the parent ended")


def test_kills_while_records_are_written_lose_no_other(tmp_path):
    """Every record that was finished is there, whole; nothing is left of others, and the size
    holds. `make kills` kills 200 times."""
    folder, size, last = tmp_path / "store", 300 * 200_200, 0
    moments = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(folder), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        for _ in range(int(os.environ.get("STORE_KILLS", "12"))):
            end = killed_writer(parent, last, moments.random() * 0.06)
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
    assert last > 3, "nothing was written"
