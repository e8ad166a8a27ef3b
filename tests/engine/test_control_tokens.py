"""Which tokens are control tokens, and how they are spelled."""

from stockpot.engine.control_tokens import control_spellings
from stockpot.engine.fake_driver import FakeVocabulary


def test_control_tokens_are_those_without_text() -> None:
    assert control_spellings(FakeVocabulary()) == {
        256: "<|endoftext|>",
        257: "<|im_start|>",
        258: "<|im_end|>",
    }
