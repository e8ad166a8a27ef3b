"""Control tokens: those that stand for structure (begin, end of turn, ...) and not for text."""

from __future__ import annotations

from stockpot.engine.driver import Vocabulary


def control_spellings(vocabulary: Vocabulary) -> dict[int, str]:
    """Every control token and how it is spelled in a prompt. Asks for every piece: keep the result."""
    spellings: dict[int, str] = {}
    for token in range(vocabulary.size):
        if not vocabulary.piece(token):
            spelling = vocabulary.piece(token, special=True)
            if spelling:
                spellings[token] = spelling.decode("utf-8", errors="replace")
    return spellings
