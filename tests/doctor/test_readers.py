"""Files of many kinds become the same exchanges; wrong lines are told and end nothing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stockpot.doctor.exchange import Exchange
from stockpot.doctor.readers import ahead
from stockpot.doctor.readers.ahead import read_ahead
from stockpot.doctor.readers.body import role_of
from stockpot.doctor.readers.files import ReadCounts, read_files, read_lines
from stockpot.errors import ConfigurationError

CHAT: dict[str, Any] = {
    "model": "gpt-5",
    "tools": [{"type": "function", "function": {"name": "find"}}],
    "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
}
CLAUDE: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "max_tokens": 10,
    "tools": [{"name": "find", "input_schema": {}}],
    "system": [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}],
    "messages": [{"role": "user", "content": "hi"}],
}
RESPONSES = {"model": "gpt-5", "instructions": "Be kind.", "input": [{"role": "user", "content": "hi"}]}
COMPLETION = {"model": "m", "prompt": "Once upon"}


def read(*lines: object) -> tuple[list[Exchange], ReadCounts]:
    counts = ReadCounts()
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(read_lines(raw, "f", counts, year=2026)), counts


def paths(exchange: Exchange) -> list[tuple[str, str]]:
    return [(piece.kind, piece.path) for piece in exchange.pieces]


def test_bodies_of_all_apis_in_the_order_in_which_a_model_reads() -> None:
    (chat, claude, responses, completion), _ = read(CHAT, CLAUDE, RESPONSES, COMPLETION)
    assert paths(chat) == [("tool", "tools[0]"), ("system", "messages[0]"), ("message", "messages[1]")]
    assert paths(claude) == [("tool", "tools[0]"), ("system", "system[0]"), ("message", "messages[0]")]
    assert paths(responses) == [("system", "instructions"), ("message", "input[0]")]
    assert paths(completion) == [("message", "prompt")]
    assert [each.shape for each in (chat, claude, responses, completion)] == [
        "openai-chat",
        "anthropic",
        "openai-responses",
        "completion",
    ]
    assert [role_of(each.pieces[-1]) for each in (chat, claude, responses, completion)] == ["user"] * 4


def test_bodies_in_their_wrappings_with_what_is_known_about_them() -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    claudes = {"input_tokens": 3, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 2}
    own = {
        "at": 1764000000.5,
        "request_id": "r1",
        "shape": "openai-chat",
        "body": CHAT,
        "session": "s",
        "tenant": "t",
        "backend": "gpu-1",
        "provider": "vllm",
        "prompt_tokens": 9,
        "ttft_s": 0.25,
    }
    found, counts = read(
        {**CHAT, "usage": usage, "timestamp": "2026-11-25T08:00:00Z"},
        {"request": CHAT, "response": {"id": "x", "usage": usage}, "created_at": 1764000000123},
        {"timestamp": "1764000000", "request_body": json.dumps(CLAUDE), "response_body": {"usage": claudes}},
        {"custom_id": "b1", "method": "POST", "url": "/v1/messages", "body": CLAUDE},
        own,
        {"kwargs": CHAT, "response": {"body": {"usage": usage}}, "session_id": 7},
    )
    assert counts.requests == 6
    told = [each.usage for each in found]
    assert told[0] is not None
    assert (told[0].prompt_tokens, told[0].cached_tokens) == (10, 4)
    assert told[1] == told[0]
    assert told[2] is not None
    assert (told[2].prompt_tokens, told[2].cached_tokens, told[2].written_tokens) == (10, 5, 2)
    assert told[4] is not None
    assert (told[4].prompt_tokens, told[4].cached_tokens) == (9, 0)  # our own leave out what is 0
    assert told[5] == told[0]
    assert [each.at_s for each in found] == [
        1795593600.0,
        1764000000.123,
        1764000000.0,
        None,
        1764000000.5,
        None,
    ]
    assert [each.request for each in found] == ["", "x", "", "b1", "r1", ""]
    assert (found[4].session, found[4].tenant, found[4].backend, found[4].provider) == (
        "s",
        "t",
        "gpu-1",
        "vllm",
    )
    assert found[4].ttft_s == 0.25
    assert found[5].session == "7"
    assert found[3].shape == "anthropic"


def test_a_transcript_of_claude_code_is_a_request_for_each_answer() -> None:
    def line(kind: str, content: object, **message: Any) -> dict[str, Any]:
        said: dict[str, Any] = {"role": kind, "content": content, **message}
        return {"type": kind, "sessionId": "s1", "timestamp": "2026-11-25T08:00:00Z", "message": said}

    usage = {"input_tokens": 1, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 2}
    answer: dict[str, Any] = {"id": "m1", "model": "claude-sonnet-4-5", "usage": usage}
    call: dict[str, Any] = {"type": "tool_use", "id": "t", "name": "read", "input": {}}
    found, counts = read(
        {"type": "summary", "summary": "x", "sessionId": "s1"},
        line("user", "fix it"),
        line("assistant", [{"type": "text", "text": "I look."}], **answer),
        line("assistant", [call], **answer),
        line("user", [{"type": "tool_result", "tool_use_id": "t", "content": "text"}]),
        line("assistant", [{"type": "text", "text": "Done."}], **{**answer, "id": "m2"}),
        {**line("user", "what was said"), "isCompactSummary": True},
        line("assistant", [{"type": "text", "text": "Yes."}], **{**answer, "id": "m3"}),
    )
    assert [len(each.pieces) for each in found] == [1, 4, 1]
    assert [each.request for each in found] == ["m1", "m2", "m3"]
    assert found[0].usage is not None
    assert (found[0].usage.prompt_tokens, found[0].usage.cached_tokens) == (10, 7)
    assert found[1].session == "s1"
    assert not counts.wrong


def test_a_rollout_of_codex_is_a_request_for_each_count() -> None:
    def item(**payload: object) -> dict[str, Any]:
        return {"timestamp": "2026-11-25T08:00:00Z", "type": "response_item", "payload": payload}

    def counted(prompt: int, cached: int) -> dict[str, Any]:
        usage = {"input_tokens": prompt, "cached_input_tokens": cached, "output_tokens": 3}
        info = {"last_token_usage": usage}
        return {"type": "event_msg", "payload": {"type": "token_count", "info": info}, "timestamp": 1.0}

    found, _ = read(
        {"type": "session_meta", "payload": {"id": "abc", "instructions": "Be kind."}},
        {"type": "turn_context", "payload": {"model": "gpt-5.5"}},
        item(type="message", role="user", content="fix"),
        item(type="function_call", name="shell", arguments="{}", call_id="c"),
        counted(100, 0),
        counted(100, 0),  # told again
        item(type="function_call_output", call_id="c", output="ok"),
        item(type="message", role="assistant", content="done"),
        counted(150, 100),
    )
    assert [len(each.pieces) for each in found] == [2, 4]
    assert [each.model for each in found] == ["gpt-5.5"] * 2
    assert [each.usage.cached_tokens if each.usage else None for each in found] == [0, 100]
    assert found[1].session == "abc"


def test_logs_of_engines_with_prompts_in_them() -> None:
    vllm = (
        b"""INFO 11-25 08:51:14 [logger.py:43] Received request cmpl-1: prompt: 'It\\'s a\\n"test"', x: X"""
    )
    llama = b'srv  log_server_r: request:  {"messages":[{"role":"user","content":"hi"}],"model":"m"}'
    found, counts = read(vllm, llama, b"INFO: started", b"")
    assert json.loads(found[0].pieces[0].raw) == 'It\'s a\n"test"'
    assert (found[0].provider, found[0].request) == ("vllm", "cmpl-1")
    assert found[0].at_s == 1795596674.0
    assert (found[1].provider, found[1].shape) == ("llama-server", "openai-chat")
    assert counts.skipped == {"no request in it": 1}


def test_wrong_lines_are_counted_and_told() -> None:
    found, counts = read(
        b'{"messages": [', b'{"messages": 3}', b"[1]", {"level": "info"}, {"body": "x"}, b'{"a":"\xff"}', CHAT
    )
    assert len(found) == 1
    assert counts.skipped == {"not readable": 2, "no request in it": 1, "no prompt in it": 3}
    assert counts.wrong[0].startswith("f:1: ")


@given(st.lists(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), max_size=20))
def test_whatever_a_file_holds_reading_goes_on(lines: list[bytes]) -> None:
    _, counts = read(*lines, json.dumps(CHAT).encode())
    assert counts.requests >= 1
    assert counts.lines == len(lines) + 1


JSONS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["messages", "role", "content", "tools", "body", "usage", "type", "message", "text"]
            ),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@given(JSONS)
def test_whatever_json_a_line_is_reading_goes_on(value: object) -> None:
    found, counts = read({"messages": value}, {"body": value, "messages": [value]}, value)
    assert counts.lines == 3
    assert len(found) == counts.requests


def test_files_packed_missing_and_unreadable(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(json.dumps(CHAT).encode() + b"\n"))
    counts = ReadCounts()
    assert len(list(read_files([packed], counts))) == 1
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_files([tmp_path / "absent"], counts))
    (tmp_path / "b.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_files([tmp_path / "b.gz"], counts))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_files([tmp_path], counts))


def test_large_files_are_read_in_a_process_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "_LARGE_BYTES", 1)
    monkeypatch.setattr(ahead, "usable_processors", lambda: 2)
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join([json.dumps(CHAT), "{wrong", json.dumps(CLAUDE), "log"] * 200))
    counts, plain = ReadCounts(), ReadCounts()
    assert list(read_ahead([str(file)], counts)) == list(read_files([file], plain))
    assert counts == plain
    assert counts.requests == 400
    reading = read_ahead([str(file)], ReadCounts())
    next(reading)
    reading.close()  # who stops early leaves no process behind
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_ahead([str(file), str(tmp_path)], ReadCounts()))
