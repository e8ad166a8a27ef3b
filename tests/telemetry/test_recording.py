"""A recording is bounded in requests and in bytes, and its file in bytes; nothing of it fails a request."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from stockpot.caller import NOBODY
from stockpot.records import RequestRecord
from stockpot.settings_telemetry import RecordingSettings
from stockpot.telemetry.recording import Recording

BYTES = 2**16


def record_of(number: int) -> RequestRecord:
    return RequestRecord(str(number), "", float(number), "chat", NOBODY, "m", backend="a")


def body_of(size: int) -> bytes:
    return b'"' + b"x" * (size - 2) + b'"'


@given(st.lists(st.tuples(st.integers(2, BYTES + 10), st.booleans()), max_size=60))
def test_bounds_hold_whatever_comes(asked: list[tuple[int, bool]]) -> None:
    recording = Recording(RecordingSettings(requests=20, memory_bytes=BYTES), lambda _: "vllm")
    for number, (size, ends) in enumerate(asked):
        recording.asked(str(number), "completion", body_of(size))
        if ends:
            recording.observe_request(record_of(number))
        held = recording.last(100)
        assert len(held) <= 20
        assert sum(len(bytes(each.body)) for each in held) == recording.stats.held_bytes <= BYTES
        assert [each.at for each in held] == sorted(each.at for each in held)
    ended = [number for number, (size, ends) in enumerate(asked) if ends and size <= BYTES]
    if ended:
        assert recording.last(1)[0].request_id == str(ended[-1])


async def test_the_file_is_bounded_and_the_one_before_it_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    settings = RecordingSettings(path=file, path_bytes=2**20)
    recording = Recording(settings, lambda _: "")
    await recording.start()
    for number in range(30):
        recording.asked(str(number), "completion", body_of(90_000))
        recording.observe_request(record_of(number))
    await recording.close()
    assert recording.stats.written == 30
    sizes = {each.name: each.stat().st_size for each in tmp_path.iterdir()}  # noqa: ASYNC240
    assert sizes.keys() == {"requests.jsonl", "requests.jsonl.1"}
    assert max(sizes.values()) <= 2**20


async def test_a_file_that_cannot_be_written_is_no_requests_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recording = Recording(RecordingSettings(path=tmp_path / "file" / "below"), lambda _: "")
    await recording.start()
    for number in range(3):
        recording.asked(str(number), "completion", b"{}")
        recording.observe_request(record_of(number))
    await recording.close()
    assert (recording.stats.written, recording.stats.lost) == (0, 3)
    assert len(recording.last(10)) == 3
