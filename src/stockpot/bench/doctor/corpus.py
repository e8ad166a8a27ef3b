"""A corpus of conversations, some broken in one known way, interleaved in files as programs write them.

Written from the providers' documentation, not from the doctor. Everything follows from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stockpot.bench.doctor.breaking import BREAKS
from stockpot.bench.doctor.conversation import Api, Conversation, healthy
from stockpot.bench.doctor.templates import FIRST, SECOND, Template
from stockpot.bench.doctor.wire_forms import Form, Json, Written, lines_of, requests_of

_START_S = 1_763_978_400.0  # 2025-11-24 10:00 UTC
_ANTHROPIC_ONLY = ("below_minimum", "no_boundary", "beyond_lookback")
_RECORDED_ONLY = ("routed_elsewhere", "evicted")
_TOOLS_NEEDED = ("tool_added", "tool_removed", "tool_reordered", "tool_changed")
_LONG = ("history_edited", "history_truncated")
_SHORT_CHARACTERS = 1_800


@dataclass(frozen=True, slots=True)
class Labelled:
    """What is known of a conversation: how it was broken ("": not), where, and in which form it was
    written."""

    cause: str
    path: str
    form: str
    api: Api


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files, and which conversation each of their lines belongs to; `conversations` are the same requests for
    tools that want them apart."""

    files: tuple[Path, ...]
    labels: Mapping[str, Labelled]
    owners: Mapping[tuple[str, int], str]
    conversations: Mapping[str, list[Json]]


def write_corpus(
    folder: Path, *, seed: int = 1, each: int = 14, healthy_count: int = 110, held_out: bool = False
) -> Corpus:
    """`each` conversations for each cause. `held_out`: of other programs."""
    chance = random.Random(seed)
    templates = SECOND if held_out else FIRST
    made: list[tuple[Conversation, Form, bool]] = []
    for cause in BREAKS:
        for number in range(each):
            made.append(_broken(cause, number, templates, chance))
    for number in range(healthy_count):
        made.append(_healthy(number, templates, chance))
    lines: dict[str, list[Written]] = {}
    labels: dict[str, Labelled] = {}
    for conversation, form, counted in made:
        labels[conversation.name] = Labelled(conversation.label, conversation.path, form, conversation.api)
        file = f"{form}-{conversation.api}.jsonl"
        if form == "transcript":
            file = f"transcript-{conversation.name}.jsonl"  # one for each session
        lines.setdefault(file, []).extend(lines_of(conversation, form, chance, counted=counted))
    apart = {conversation.name: requests_of(conversation) for conversation, _, _ in made}
    return _written(folder, lines, labels, apart)


def _written(
    folder: Path,
    lines: Mapping[str, list[Written]],
    labels: Mapping[str, Labelled],
    conversations: Mapping[str, list[Json]],
) -> Corpus:
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    owners: dict[tuple[str, int], str] = {}
    for name, written in lines.items():
        path = folder / name
        written.sort(key=lambda one: one.at_s)
        path.write_text("".join(one.text + "\n" for one in written), encoding="utf-8")
        owners |= {(str(path), number): one.conversation for number, one in enumerate(written, 1)}
        files.append(path)
    return Corpus(tuple(files), labels, owners, conversations)


def _broken(
    cause: str, number: int, templates: Sequence[Template], chance: random.Random
) -> tuple[Conversation, Form, bool]:
    choices = [each for each in templates if len(each.tools) >= 2 or cause not in _TOOLS_NEEDED]
    if cause in _LONG or cause == "beyond_lookback":
        choices = [each for each in choices if each.tools]
    template = chance.choice(choices)
    api: Api = chance.choice(("openai", "anthropic", "responses"))
    form: Form = chance.choice(("plain", "wrapped", "recorded"))
    if cause in _ANTHROPIC_ONLY:
        api = "anthropic"
    if cause in _RECORDED_ONLY:
        api, form = "openai", "recorded"
    if cause == "image_reencoded" and api == "responses":
        api = "openai"
    conversation = _conversation(
        f"{cause}-{number}",
        template,
        api,
        chance,
        turns=9 if cause in _LONG else 6,
        characters=_SHORT_CHARACTERS if cause == "below_minimum" else 7_000,
        program=f"{cause}-{number // 2}",
    )
    conversation.label = cause
    conversation.path = BREAKS[cause](conversation, chance)
    return conversation, form, chance.random() < 0.6


def _healthy(
    number: int, templates: Sequence[Template], chance: random.Random
) -> tuple[Conversation, Form, bool]:
    api: Api = chance.choice(("openai", "anthropic", "responses"))
    form: Form = chance.choice(("plain", "wrapped", "recorded", "transcript"))
    if form == "transcript":
        api = "anthropic"
    conversation = _conversation(
        f"healthy-{number}",
        chance.choice(templates),
        api,
        chance,
        turns=chance.randrange(3, 10),
        characters=7_000,
        program=f"healthy-{number // 3}",
    )
    turns = conversation.turns
    match number % 5:
        case 0:  # the last question once more: a retry
            turns.append(type(turns[-1])(turns[-1].body, turns[-1].at_s + 5))
        case 1:  # a branch: another last question
            last = turns[-1].body
            other = {
                **last,
                "messages": [*last["messages"][:-1], {"role": "user", "content": "No, start over: why?"}],
            }
            turns.append(type(turns[-1])(other, turns[-1].at_s + 9))
        case _:
            pass
    return conversation, form, chance.random() < 0.6


def _conversation(
    name: str,
    template: Template,
    api: Api,
    chance: random.Random,
    *,
    turns: int,
    characters: int,
    program: str,
) -> Conversation:
    """Conversations of one `program` have the same system prompt."""
    seed = random.Random(program).randrange(10**9)
    at_s = _START_S + chance.uniform(0, 6 * 3600)
    made = healthy(name, template, api, chance, at_s, turns=turns, characters=characters, system_seed=seed)
    made.tenant = f"t-{seed % 3}"
    return made
