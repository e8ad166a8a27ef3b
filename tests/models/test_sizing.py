"""Bytes of KV and what fits, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from stockpot.models.gguf import GgufFacts, Rope
from stockpot.models.sizing import ENGINE_OVERHEAD_BYTES, Fit, kv_bytes_per_token, what_fits

WEIGHTS_BYTES = 100_000_000


def _facts(
    kv_heads_by_layer: tuple[int, ...] = (3,) * 30,
    *,
    key_size: int = 64,
    value_size: int = 64,
    context_tokens: int = 8192,
) -> GgufFacts:
    """SmolLM2-135M, unless told otherwise."""
    return GgufFacts(
        architecture="llama",
        name="SmolLM2 135M",
        layers=len(kv_heads_by_layer),
        heads=9,
        kv_heads_by_layer=kv_heads_by_layer,
        key_size=key_size,
        value_size=value_size,
        embedding_size=576,
        vocabulary_size=49152,
        training_context_tokens=context_tokens,
        rope=Rope(64, 100_000.0, None, None),
        chat_template=None,
        elements_by_type={"q8_0": 134_515_008},
        ragged_types=frozenset(),
        weights_bytes=WEIGHTS_BYTES,
        file_bytes=WEIGHTS_BYTES,
        parts=(),
    )


@pytest.mark.parametrize(
    ("cell_type", "expected"),
    [
        ("f32", 46_080),
        # 30 layers x 3 KV heads x (64 + 64) elements x 2 bytes.
        ("f16", 23_040),
        # 30 layers x 2 rows x 6 blocks of 32 elements, each with its scale.
        ("q8_0", 30 * 2 * 6 * 34),
        ("q4_0", 30 * 2 * 6 * 18),
    ],
)
def test_bytes_of_a_token(cell_type: str, expected: int) -> None:
    assert kv_bytes_per_token(_facts(), cell_type) == expected


def test_layers_are_counted_one_by_one() -> None:
    hybrid = _facts((0, 2, 0, 4), key_size=128, value_size=64)
    assert kv_bytes_per_token(hybrid, "f16") == (2 + 4) * (128 + 64) * 2


def test_a_row_of_quantised_cells_is_rounded_up_to_whole_blocks() -> None:
    assert kv_bytes_per_token(_facts((1,), key_size=40, value_size=32), "q8_0") == (2 + 1) * 34


def test_an_unknown_cell_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'q2_k'"):
        kv_bytes_per_token(_facts(), "q2_k")


def test_what_fits_doubles_up_to_the_model_s_context() -> None:
    room = 8192 * 23_040 * 2
    fits = what_fits(_facts(), "f16", WEIGHTS_BYTES + ENGINE_OVERHEAD_BYTES + room)
    assert fits == (
        Fit(1024, 16, 23_592_960),
        Fit(2048, 8, 47_185_920),
        Fit(4096, 4, 94_371_840),
        Fit(8192, 2, 188_743_680),
    )


def test_a_byte_too_few_is_a_request_less() -> None:
    available = WEIGHTS_BYTES + ENGINE_OVERHEAD_BYTES + 8192 * 23_040 * 2
    assert what_fits(_facts(), "f16", available - 1)[-1].sequences == 1


def test_the_model_s_context_ends_the_list_as_it_is() -> None:
    contexts = [fit.context_tokens for fit in what_fits(_facts(context_tokens=3000), "f16", 0)]
    assert contexts == [1024, 2048, 3000]
    assert [fit.context_tokens for fit in what_fits(_facts(context_tokens=512), "f16", 0)] == [512]


def test_nothing_fits_where_the_weights_do_not() -> None:
    assert {fit.sequences for fit in what_fits(_facts(), "f16", WEIGHTS_BYTES)} == {0}


def test_weights_in_another_encoding_leave_other_room() -> None:
    available = 2 * WEIGHTS_BYTES + ENGINE_OVERHEAD_BYTES
    heavier = what_fits(_facts(), "f16", available, weights_bytes=2 * WEIGHTS_BYTES)
    assert {fit.sequences for fit in heavier} == {0}
    assert what_fits(_facts(), "f16", available)[0].sequences == WEIGHTS_BYTES // 23_592_960
