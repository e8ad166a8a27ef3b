"""Files appear whole, once, also when several processes want them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stockpot.errors import DownloadFailed
from stockpot.models.publish import exclusive, require_space, staged

COUNT = """
import sys
from pathlib import Path
from stockpot.models.publish import exclusive, staged

target = Path(sys.argv[1])
for _ in range(20):
    with exclusive(target):
        count = int(target.read_text()) if target.exists() else 0
        with staged(target) as temporary:
            temporary.write_text(str(count + 1))
"""
"""Reads, then writes one more: loses counts unless nobody else is at it."""

WAIT = """
import sys
from pathlib import Path
from stockpot.models.publish import exclusive

with exclusive(Path(sys.argv[1]), waiting=lambda description, *_: print(description, flush=True)):
    print("in", flush=True)
"""


def _start(script: str, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "count"
    workers = [_start(COUNT, target) for _ in range(3)]
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    assert target.read_text() == "60"


def test_who_waits_says_so(tmp_path: Path) -> None:
    target = tmp_path / "soup"
    with exclusive(target):
        waiter = _start(WAIT, target)
        assert waiter.stdout is not None
        assert waiter.stdout.readline() == "Waiting for another process that makes soup\n"
    rest, _ = waiter.communicate()
    assert (rest, waiter.returncode) == ("in\n", 0)


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "soup"
    target.write_text("old")
    with pytest.raises(KeyError), staged(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_dead_process_left_is_not_built_upon(tmp_path: Path) -> None:
    target = tmp_path / "soup"
    (tmp_path / ".soup.tmp").write_text("of a dead process")
    with staged(target) as temporary:
        assert not temporary.exists()
        temporary.write_text("new")
    assert target.read_text() == "new"


def test_a_full_disk_is_a_sentence_with_both_sizes(tmp_path: Path) -> None:
    require_space(tmp_path, 0, "Soup")
    with pytest.raises(DownloadFailed, match=r"Soup needs 1,000,000,000,000 MB .* MB free"):
        require_space(tmp_path, 10**18, "Soup")
