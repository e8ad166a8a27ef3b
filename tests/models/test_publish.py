"""Files appear whole, once, also when several processes want them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from stockpot.errors import DownloadFailed
from stockpot.models.publish import exclusive, require_space, staged


def _append(target: Path, rounds: int) -> None:
    """Read, then write one more: loses counts unless nobody else is at it."""
    for _ in range(rounds):
        with exclusive(target):
            count = int(target.read_text()) if target.exists() else 0
            with staged(target) as temporary:
                temporary.write_text(str(count + 1))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "count"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append, args=(target, 20)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert target.read_text() == "60"


def test_who_waits_says_so(tmp_path: Path) -> None:
    target = tmp_path / "soup"
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    with exclusive(target):
        waiter = context.Process(target=_wait, args=(target, said))
        waiter.start()
        assert said.get(timeout=60) == "Waiting for another process that makes soup"
    waiter.join()
    assert waiter.exitcode == 0


def _wait(target: Path, said: multiprocessing.Queue[str]) -> None:
    with exclusive(target, waiting=lambda description, _done, _total: said.put(description)):
        pass


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
