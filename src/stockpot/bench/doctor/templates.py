"""Programs as people write them: a system prompt, tools, and how users and tools speak in them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Template:
    """One program. `rules` are repeated, with variations, until the system prompt is long enough."""

    name: str
    opening: str
    rules: tuple[str, ...]
    tools: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


FIRST: tuple[Template, ...] = (
    Template(
        "support",
        "You are the support agent of a bicycle shop. You answer in a friendly and exact way.",
        (
            "Refunds are possible within {n} days if the item is unused and has its receipt.",
            "Shipping to region {n} takes between two and five working days.",
            "Never promise a date that the warehouse has not confirmed; ask for order numbers politely.",
            "Complaints of category {n} are escalated to a human colleague without further questions.",
        ),
        ("find_order", "refund", "open_ticket"),
        ("Where is my order {n}?", "I want to return item {n}, it is too small.", "Can you send it to Köln?"),
        (
            "Your order {n} left our warehouse and is on its way.",
            "Of course. I have noted return {n} for you.",
        ),
    ),
    Template(
        "coder",
        "You are a coding agent. You read files, change them with patches and run the tests.",
        (
            "Rule {n}: keep functions short, and name things for what they are.",
            "Never touch generated files below build/{n}; explain each change in one sentence.",
            "When a test fails, read the whole traceback before you change anything (see guide {n}).",
        ),
        ("read_file", "apply_patch", "run_tests", "search"),
        (
            "Fix the failing test in module {n}.",
            "Rename the class in file {n} and its callers.",
            "Why is it slow?",
        ),
        ("I changed line {n} and the tests pass.", "The cause is an index that is off by {n}."),
    ),
    Template(
        "analyst",
        "Du bist Datenanalystin in einem Energieunternehmen und antwortest knapp, mit Zahlen und Einheiten.",
        (
            "Tabelle {n} enthält Verbräuche je Stunde in kWh; fehlende Werte sind mit -1 markiert.",
            "Runde auf zwei Stellen, außer bei Preisen der Kategorie {n}.",
            "Frage nach, wenn der Zeitraum nicht genannt ist; rate nie.",
        ),
        ("query", "plot"),
        (
            "Wie hoch war der Verbrauch in Zone {n}?",
            "Zeig mir den Verlauf für Anlage {n}.",
            "Und im Vergleich?",
        ),
        ("In Zone {n} waren es 12,5 kWh.", "Der Verlauf steigt um {n} Prozent."),
    ),
    Template(
        "tutor",
        "You are a patient tutor of mathematics for pupils of twelve years.",
        (
            "Lesson {n} introduces fractions with pizzas, later ones with number lines.",
            "Never give the result at once: ask what the pupil would try first (method {n}).",
            "Praise effort, not talent; use short sentences and one example at a time.",
        ),
        (),
        (
            "What is {n} divided by 3?",
            "I do not understand step {n}.",
            "Is that right: 1/{n} + 1/{n} = 2/{n}?",
        ),
        ("Good thought! What happens if you take {n} away?", "Let us draw it: {n} pieces on a plate."),
    ),
)

SECOND: tuple[Template, ...] = (
    Template(
        "travel",
        "You plan journeys by train. You compare connections and never book without being asked.",
        (
            "Line {n} has a change of at least eight minutes; shorter ones count as missed.",
            "Seats in category {n} must be reserved; tell the price with and without reservation.",
            "If a connection is late, offer the next two, and say where luggage can be left.",
        ),
        ("search_trains", "reserve_seat", "weather"),
        (
            "How do I get from platform {n} to the lake?",
            "Book two seats on train {n}.",
            "What about the morning?",
        ),
        ("Train {n} leaves from the west hall.", "There are {n} connections; the second is the quickest."),
    ),
    Template(
        "lawyer",
        "You summarise contracts for a legal department. You quote clauses by their number.",
        (
            "Clause {n} limits liability to the sum of the fees of the last twelve months.",
            "Mark every clause that deviates from standard {n} and say in which direction.",
            "You give no legal advice; you describe what is written, in plain words.",
        ),
        ("open_contract", "compare_clauses"),
        (
            "What does clause {n} say about delay?",
            "Is annex {n} part of the contract?",
            "Compare it with ours.",
        ),
        ("Clause {n} gives the customer a right to a discount.", "Annex {n} repeats the definitions."),
    ),
    Template(
        "nurse",
        "You help a hospital ward to plan shifts. 日本語の名前はそのまま書いてください。",
        (
            "Ward {n} needs two qualified people at night, three by day.",
            "Nobody works more than five days in a row; wishes of group {n} come first.",
            "Changes are proposed, never entered: a person confirms them.",
        ),
        ("list_shifts", "propose_swap", "holidays", "contacts"),
        ("Who can take the night in ward {n}?", "Swap shift {n} with 田中さん, please.", "Who is free then?"),
        ("Two people could take ward {n}.", "I have proposed swap {n}; it waits for confirmation."),
    ),
)


def system_prompt(template: Template, chance: random.Random, characters: int) -> str:
    """As long as asked for, about; the same for one seed."""
    lines = [template.opening, ""]
    while sum(map(len, lines)) < characters:
        lines.append("- " + chance.choice(template.rules).format(n=chance.randrange(2, 99)))
    return "\n".join(lines)


def tools_of(template: Template) -> list[Json]:
    """In OpenAI's shape."""
    return [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"{name.replace('_', ' ').capitalize()} in the system of the {template.name}.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "what": {"type": "string", "description": "what it is about"},
                        "limit": {"type": "integer", "minimum": 1, "maximum": 50},
                        "exact": {"type": "boolean"},
                    },
                    "required": ["what"],
                },
            },
        }
        for name in template.tools
    ]


def said(choices: Sequence[str], chance: random.Random) -> str:
    """Something a user or the model says; no two alike, and with harmless numbers and dates in it."""
    text = chance.choice(choices).format(n=chance.randrange(100, 9_999))
    if chance.random() < 0.3:
        text += f" It is about the {chance.randrange(1, 28)}.{chance.randrange(1, 12)}.2026."
    return text + " " + " ".join(chance.choice(_FILLER) for _ in range(chance.randrange(8, 40)))


def result(chance: random.Random) -> Mapping[str, Any]:
    """What a tool gives: with a time, an id and numbers, which are harmless where they stand."""
    return {
        "id": f"{chance.getrandbits(64):016x}",
        "at": f"2026-11-{chance.randrange(10, 25)}T{chance.randrange(10, 23)}:{chance.randrange(10, 59)}:07Z",
        "items": [
            {"name": chance.choice(_FILLER), "value": round(chance.random() * 100, 2)}
            for _ in range(chance.randrange(2, 6))
        ],
    }


_FILLER = (
    *(
        "please",
        "also",
        "the",
        "other",
        "one",
        "with",
        "a",
        "blue",
        "frame",
        "and",
        "some",
        "time",
        "because",
    ),
    *(
        "my",
        "neighbour",
        "said",
        "that",
        "it",
        "would",
        "be",
        "better",
        "than",
        "before",
        "na\u00efve",
        "weiß",
    ),
    *("of", "course", "not", "only", "on", "Monday", "if", "you", "can", "check", "again", "thank", "café"),
)
