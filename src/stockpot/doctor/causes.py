"""Names the cause of a break in the content: by where it is, and by what differs there."""

from __future__ import annotations

from stockpot.doctor.divergence import Break
from stockpot.doctor.exchange import Exchange, Piece
from stockpot.doctor.finding import Cause
from stockpot.doctor.leaves import Leaf, leaves
from stockpot.doctor.text_causes import text_cause

_CUT = ("...", "\u2026", "[truncated]", "[cut]", "(truncated)", "<truncated>")
_ALIGNED = 64


def cause_of(found: Break, earlier: Exchange, later: Exchange) -> Cause:
    """Exactly one."""
    one, other = _at(earlier, found.index), _at(later, found.index)
    if "tool" in (kind_of(one), kind_of(other)):
        return _of_tools(found, earlier, later)
    if "system" in (kind_of(one), kind_of(other)):
        return _of_text(found) or "system_changed"
    return _of_history(found, earlier, later)


def kind_of(piece: Piece | None) -> str:
    """ "" for none."""
    return "" if piece is None else piece.kind


def _at(exchange: Exchange, index: int) -> Piece | None:
    return exchange.pieces[index] if index < len(exchange.pieces) else None


def _of_text(found: Break) -> Cause | None:
    if found.earlier is None or found.later is None:
        return None
    if "image" in (found.earlier.kind, found.later.kind):
        return "image_reencoded" if found.earlier.kind == found.later.kind else None
    return text_cause(found.earlier.text, found.later.text, found.character)


def _of_tools(found: Break, earlier: Exchange, later: Exchange) -> Cause:
    before, now = (_tool_names(exchange) for exchange in (earlier, later))
    if sorted(before) == sorted(now):
        if before != now:
            return "tool_reordered"
        cause = _of_text(found)
        # A number in a schema is a bound that was changed.
        of_schema = cause == "counter" and found.later is not None and found.later.kind == "json"
        return "tool_changed" if cause is None or of_schema else cause
    if set(before) <= set(now):
        return "tool_added"
    if set(now) <= set(before):
        return "tool_removed"
    # Some came and some went: what stands at the place.
    return "tool_removed" if _name_at(earlier, found.index) not in now else "tool_added"


def _tool_names(exchange: Exchange) -> list[str]:
    return [_name(leaves(piece)) for piece in exchange.pieces if piece.kind == "tool"]


def _name_at(exchange: Exchange, index: int) -> str:
    piece = _at(exchange, index)
    return _name(leaves(piece)) if piece is not None and piece.kind == "tool" else ""


def _name(found: tuple[Leaf, ...]) -> str:
    return next((leaf.text for leaf in found if leaf.kind == "label"), "")


def _of_history(found: Break, earlier: Exchange, later: Exchange) -> Cause:
    index = found.index
    before, now = earlier.pieces[index:], later.pieces[index:]
    if not before or not now:
        return "history_edited"
    if _moved_up(before, now) or _replaced_by_less(before, now):
        # Turns are gone. From the beginning: a window that slides, a summary; elsewhere: an edit.
        return "history_truncated" if _is_beginning(earlier, index) else "history_edited"
    cause = _of_text(found)
    if cause is not None:
        return cause
    if _is_cut(found):
        return "history_truncated"
    return "history_edited"


def _moved_up(before: tuple[Piece, ...], now: tuple[Piece, ...]) -> bool:
    """Whether the later prompt goes on with what stood further back in the earlier."""
    return any(piece.key == now[0].key for piece in before[1 : _ALIGNED + 1])


def _replaced_by_less(before: tuple[Piece, ...], now: tuple[Piece, ...]) -> bool:
    """Whether fewer pieces stand in the place of more, and then it goes on as before: a summary."""
    places = {piece.key: place for place, piece in enumerate(before[:_ALIGNED])}
    for place, piece in enumerate(now[:_ALIGNED]):
        if (was := places.get(piece.key)) is not None:
            return was > place
    return False


def _is_beginning(earlier: Exchange, index: int) -> bool:
    """Whether at most the first turn of the conversation (often kept as the task) stands before it."""
    return index - earlier.start <= 1


def _is_cut(found: Break) -> bool:
    """Whether a text is the beginning of what it was, perhaps with a mark that says so."""
    if found.earlier is None or found.later is None:
        return False
    text = found.later.text.rstrip()
    for mark in _CUT:
        text = text.removesuffix(mark).rstrip()
    return len(text) < len(found.earlier.text) and found.earlier.text.startswith(text) and bool(text)
