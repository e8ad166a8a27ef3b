"""What a client sees of the tokens: whole characters, and nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.engine.driver import Vocabulary
from stockpot.engine.text_stream import TextStream


class Pieces(Vocabulary):
    """A vocabulary whose tokens are the given byte strings, wherever they cut characters."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces
        self.size = len(pieces)
        self.begin_token = None
        self.end_token = None

    def encode(self, text: str, *, special: bool, add_begin: bool = False) -> list[int]:
        raise NotImplementedError

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._pieces[token]

    def ends_generation(self, token: int) -> bool:
        return False


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    """The texts a stream gives for `pieces`, that of `finish` last; and what stopped it."""
    stream = TextStream(Pieces(pieces), stop)
    texts: list[str] = []
    for token in range(len(pieces)):
        texts.append(stream.push(token))
        if stream.stopped is not None:
            break
    texts.append(stream.finish())
    return texts, stream.stopped


def reference(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, the longest of several."""
    found = [(text.find(each) + len(each), -len(each), each) for each in stop if each in text]
    if not found:
        return text, None
    end, length, each = min(found)
    return text[: end + length], each


@st.composite
def cut_bytes(draw: st.DrawFn, data: st.SearchStrategy[bytes]) -> list[bytes]:
    whole = draw(data)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def test_a_character_is_shown_once_its_last_byte_is_there() -> None:
    euro = "€".encode()
    assert shown([b"a", euro[:1], euro[1:2], euro[2:], b"b"])[0] == ["a", "", "", "€", "b", ""]


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    assert shown([b"one", b"\n", b"two\n", b"\nthree"], ("\n\n",)) == (["one", "", "\ntwo", "", ""], "\n\n")


def test_text_held_back_is_shown_when_generation_ends() -> None:
    assert shown([b"stop he", b"r"], ("here",)) == (["stop ", "", "her"], None)


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    assert shown([b"a\xe2\x82"])[0] == ["a", "�"]


def test_control_tokens_have_no_text() -> None:
    assert shown([b"a", b"", b"b"])[0] == ["a", "", "b", ""]


def test_after_a_stop_nothing_more_is_shown() -> None:
    stream = TextStream(Pieces([b"a.b", b"c"]), (".",))
    assert [stream.push(0), stream.push(1), stream.finish(), stream.finish()] == ["a", "", "", ""]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xabcd", ("abcd", "bc"), ("xa", "bc")),  # complete first, though it begins later
        ("xabc", ("bc", "abc", "c"), ("x", "abc")),  # complete together: the longest
        ("aaab", ("aab",), ("a", "aab")),  # a false start overlaps the true one
        ("ababac", ("abac", "ac"), ("ab", "abac")),
        ("naïve €5", ("€",), ("naïve ", "€")),
        ("abc", ("d",), ("abc", None)),
        ("abc", ("abc",), ("", "abc")),
    ],
)
def test_stop_strings(text: str, stop: tuple[str, ...], expected: tuple[str, str | None]) -> None:
    assert reference(text, stop) == expected
    whole = text.encode()
    for size in range(1, len(whole) + 1):
        pieces = [whole[start : start + size] for start in range(0, len(whole), size)]
        texts, stopped = shown(pieces, stop)
        assert ("".join(texts), stopped) == expected


@given(pieces=cut_bytes(st.one_of(st.binary(max_size=40), st.text(max_size=20).map(str.encode))))
def test_all_text_is_shown_however_tokens_cut_it(pieces: list[bytes]) -> None:
    texts, stopped = shown(pieces)
    assert "".join(texts) == b"".join(pieces).decode("utf-8", errors="replace")
    assert stopped is None


@given(
    pieces=cut_bytes(st.text("abé", max_size=24).map(str.encode)),
    stop=st.lists(st.text("abé", min_size=1, max_size=5), max_size=4).map(tuple),
)
@settings(max_examples=300)
def test_stop_strings_do_not_depend_on_how_tokens_cut_the_text(
    pieces: list[bytes], stop: tuple[str, ...]
) -> None:
    texts, stopped = shown(pieces, stop)
    assert ("".join(texts), stopped) == reference(b"".join(pieces).decode(), stop)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        TextStream(Pieces([]), ("a", ""))
