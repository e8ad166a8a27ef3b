"""The marker of a boundary in a prompt's text: taken out, and a boundary in its place."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stockpot.context.marker import MARKER, split_marked
from stockpot.requests import CacheBoundary, ChatRequest, CompletionRequest, Generation, Message
from stockpot.wire.cache_marker import with_marked_boundaries

ASKED = Generation("m", "r")
LINES = st.lists(st.sampled_from(["a", "b b", "", f"  {MARKER}  ", MARKER, f"say {MARKER}"]), max_size=8)


@given(LINES, st.sampled_from(["\n", "\r\n"]))
def test_lines_that_are_the_marker_go_and_all_else_stays(lines: list[str], end: str) -> None:
    text, places = split_marked(end.join(lines))
    kept = "".join(line + end for line in lines if line.strip() != MARKER)
    assert text in (kept, kept.removesuffix(end))
    assert all(0 < place <= len(text) for place in places)
    assert list(places) == sorted(set(places))
    assert split_marked(text) == (text, ())
    assert split_marked(text, "") == (text, ())


def test_a_completion_has_a_boundary_where_the_marker_stood() -> None:
    request = CompletionRequest(ASKED, f"rules\n{MARKER}\nquestion")
    marked = with_marked_boundaries(request, MARKER)
    assert marked.prompt == "rules\nquestion"
    assert [each.characters for each in marked.boundaries] == [6]
    assert with_marked_boundaries(request, "") is request
    tokens = CompletionRequest(ASKED, [1, 2, 3])
    assert with_marked_boundaries(tokens, MARKER) is tokens


def test_instructions_are_read_and_what_users_say_is_not() -> None:
    said = f"one\n{MARKER}\ntwo"
    given_boundary = CacheBoundary(0, len(said), 3600)
    request = ChatRequest(
        ASKED, (Message("system", said), Message("user", said)), boundaries=(given_boundary,)
    )
    marked = with_marked_boundaries(request, MARKER)
    assert [message.content for message in marked.messages] == ["one\ntwo", said]
    assert [(each.message, each.characters, each.ttl_s) for each in marked.boundaries] == [
        (0, 7, 3600),
        (0, 4, 300),
    ]


def test_of_too_many_the_last_count() -> None:
    text = "".join(f"{number}\n{MARKER}\n" for number in range(9))
    marked = with_marked_boundaries(CompletionRequest(ASKED, text), MARKER)
    assert [each.characters for each in marked.boundaries] == [12, 14, 16, 18]
