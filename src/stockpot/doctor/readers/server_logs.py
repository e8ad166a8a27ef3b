"""Text logs of engines that have prompts in them: vLLM with --enable-log-requests, llama-server with -v."""

from __future__ import annotations

import ast
import re
from datetime import UTC, datetime

import msgspec

from stockpot.doctor.exchange import Exchange, Piece, start_of
from stockpot.doctor.readers.body import Body, parameters_of, pieces_of, shape_of

_VLLM = re.compile(
    rb"""Received\ request\ (?P<id>\S+?):\ prompt:\ (?P<prompt>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""",
    re.VERBOSE,
)
_VLLM_TIME = re.compile(rb"\b(?P<month>\d\d)-(?P<day>\d\d) (?P<time>\d\d:\d\d:\d\d)\b")
_LLAMA = re.compile(rb"\brequest:\s+(?P<body>\{.*\})\s*$")
_CONTENT_MAX = 16 * 2**20

_BODY = msgspec.json.Decoder(Body)


def exchange_of_log(line: bytes, file: str, number: int, year: int) -> Exchange | None:
    """The request a line tells of; None where it tells of none. Lines of vLLM have no year: it is `year`.
    Raises ValueError for what is cut off."""
    if len(line) > _CONTENT_MAX:
        raise ValueError(f"it is {len(line)} bytes long")
    if (found := _VLLM.search(line)) is not None:
        prompt = ast.literal_eval(found["prompt"].decode())  # a Python text, as it is logged
        if not isinstance(prompt, str):
            return None
        raw = msgspec.json.encode(prompt)
        return Exchange(
            file=file,
            line=number,
            shape="completion",
            pieces=(Piece("message", "prompt", raw, raw),),
            provider="vllm",
            at_s=_time(line, year),
            request=found["id"].decode(),
            size_bytes=len(line),
        )
    if (found := _LLAMA.search(line)) is not None:
        body = _BODY.decode(found["body"])
        if not body.is_one:
            return None
        shape = shape_of(body)
        return Exchange(
            file=file,
            line=number,
            shape=shape,
            pieces=(pieces := pieces_of(body, shape, None)),
            start=start_of(pieces),
            model=body.model or "",
            provider="llama-server",
            parameters=parameters_of(body),
            size_bytes=len(line),
        )
    return None


def _time(line: bytes, year: int) -> float | None:
    found = _VLLM_TIME.search(line)
    if found is None:
        return None
    day = f"{year}-{found['month'].decode()}-{found['day'].decode()}T{found['time'].decode()}"
    try:
        return datetime.fromisoformat(day).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None
