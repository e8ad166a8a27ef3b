"""Small traces in the formats of the public ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with all three traces."""
    write_lines(
        tmp_path / "mooncake_conversation_trace.jsonl",
        [
            {"timestamp": 0, "input_length": 1500, "output_length": 9, "hash_ids": [0, 1, 2]},
            {"timestamp": 3000, "input_length": 1100, "output_length": 9, "hash_ids": [0, 1, 3]},
            {"timestamp": 500, "input_length": 900, "output_length": 9, "hash_ids": [4, 5]},
        ],
    )
    for number in range(2):
        write_lines(
            tmp_path / f"cc_sessions_compact_{number}.jsonl.gz",
            [
                {
                    "id": f"session {number}",
                    "block_size": 64,
                    "tool_tokens": 10,
                    "system_tokens": 10,
                    "requests": [
                        {"t": 0.0, "m": "m", "i": 320, "o": 5, "k": 0, "n": [1, 5]},
                        {"t": 4.0, "m": "m", "i": 64, "o": 5, "k": 0, "n": [40, 4], "s": "agent"},
                        {"t": 9.0, "m": "m", "i": 384, "o": 5, "k": 3, "n": [10, 2, 20, 3]},
                    ],
                }
            ],
        )
    components = {
        "1_sys_prompt.jsonl": ("sys_prompt_id", {1: 100}),
        "2_passages.jsonl": ("passage_id", {2: 50, 3: 60}),
        "3_history.jsonl": ("history_id", {4: 7}),
        "4_user_input.jsonl": ("user_input_id", {5: 8, 6: 9}),
        "5_web_search.jsonl": ("web_search_id", {7: 30}),
    }
    for name, (key, lengths) in components.items():
        write_lines(
            tmp_path / "ragpulse" / name,
            [{key: number, "token_length": tokens} for number, tokens in lengths.items()],
        )

    def asked(time_s: int, passages: list[int], web: list[int], user: int) -> dict[str, object]:
        ids = {"sys_prompt": [1], "passages_ids": passages, "history": [4], "web_search": web}
        return {"timestamp": str(time_s), "hash_ids": {**ids, "user_input": [user]}, "session_id": "s"}

    lines = [asked(20, [2, 3], [], 5), asked(10, [2], [7], 6), asked(30, [3, 2], [], 5)]
    write_lines(tmp_path / "ragpulse" / "0_trace.jsonl", lines)
    with (tmp_path / "ragpulse" / "0_trace.jsonl").open("a") as file:
        file.write("\n")  # as the published file ends
    return tmp_path
