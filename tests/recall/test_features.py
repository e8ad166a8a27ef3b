"""What is read from a question."""

from __future__ import annotations

import pytest

from stockpot.recall.questions.features import read_features


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("twenty-five people and £1,250.00", {"25", "1250"}),
        ("the 3rd and the fifth", {"3rd", "5th"}),
        ("two hundred and 9:15", {"200", "9:15"}),
        ("no numbers here", set[str]()),
    ],
)
def test_numbers_in_words_or_digits(text: str, numbers: set[str]) -> None:
    assert read_features(text + " for the and").numbers == numbers


def test_units_belong_to_their_numbers() -> None:
    assert read_features("What is 10GB or 2 kilos for 5 yrs?").measures == {
        "10": "gb",
        "2": "kg",
        "5": "year",
    }


@pytest.mark.parametrize(
    ("text", "negated"),
    [
        ("Is it not safe?", True),
        ("Can I go without a ticket?", True),
        ("Isn't it impossible to not pay?", False),
        ("I can't log in, how do I reset it?", False),
        ("Is it for nonmembers?", True),
        ("Is it nice?", False),
    ],
)
def test_negation_is_that_of_the_clause_that_asks(text: str, negated: bool) -> None:
    assert read_features(text).negated is negated


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("What time do you close?", "when"),
        ("How much is it to send a letter?", "how much"),
        ("How many days does it take?", "how long"),
        ("Could you tell me where the exit is?", "where"),
        ("Is it open?", ""),
    ],
)
def test_the_kind_of_a_question(text: str, kind: str) -> None:
    assert read_features(text).kind == kind


def test_code_is_kept_as_it_is_written() -> None:
    codes = read_features("Why does `x = 1` in src/App.tsx fail with E1101 and --no-cache?").codes
    assert {"`x = 1`", "e1101", "--no-cache"} <= codes


def test_names_need_capitals_that_say_something() -> None:
    assert read_features("How do I move from Salesforce to HubSpot?").names == ("salesforce", "hubspot")
    assert read_features("HOW DO I MOVE TO HUBSPOT?").names == ()


def test_of_other_languages_only_what_is_free_of_them_is_read() -> None:
    features = read_features("Wie ändere ich mein Passwort für 3 Konten?")
    assert features.numbers == {"3"}
    assert (features.values, features.kind, features.names) == ({}, "", ())
