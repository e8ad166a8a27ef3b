"""The entries in memory: within bytes, the least recently used leave."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tests.recall.kept import key_of, make_entry

from stockpot.recall.entry import Entry, Selector
from stockpot.recall.stores.memory import MemoryFront, id_bytes


@given(
    capacity=st.integers(0, 6_000),
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 9), st.integers(0, 3_000))
    ),
)
def test_it_keeps_what_a_list_in_order_of_use_would_keep(
    capacity: int, steps: list[tuple[str, int, int]]
) -> None:
    memory = MemoryFront(capacity)
    model: list[Entry] = []
    for step, number, size in steps:
        held = next((each for each in model if each.key == key_of(number)), None)
        if step == "get":
            assert memory.get(key_of(number)[:16]) == held
            if held is not None:
                model.append(model.pop(model.index(held)))
            continue
        if held is not None:
            model.remove(held)
        if step == "drop":
            memory.drop(key_of(number)[:16])
        else:
            entry = make_entry(number, answer=bytes(size))
            memory.put(entry)
            if entry.size_bytes <= capacity:
                model.append(entry)
            while sum(each.size_bytes for each in model) > capacity:
                model.pop(0)
        assert list(memory) == model
        assert memory.size_bytes == sum(each.size_bytes for each in model) <= capacity


def test_a_look_that_is_no_use_saves_nothing() -> None:
    memory = MemoryFront(2 * make_entry(0).size_bytes)
    memory.put(make_entry(1))
    memory.put(make_entry(2))
    assert memory.get(key_of(1)[:16], use=False) is not None
    memory.put(make_entry(3))
    assert memory.get(key_of(1)[:16]) is None


def test_selectors_take_out_what_fits_them() -> None:
    memory = MemoryFront(2**20)
    for number in range(6):
        memory.put(make_entry(number, tags=frozenset({f"t{number % 2}"}), model=f"m{number % 3}"))
    memory.drop_fitting(Selector(tag="t0", model="m0"))
    memory.drop_fitting(Selector(id=make_entry(1).id, tag="t0"))  # that tag it has not
    assert {each.key for each in memory} == {key_of(number) for number in range(1, 6)}
    memory.drop_fitting(Selector(id=make_entry(1).id))
    memory.drop_fitting(Selector(id="no id at all"))
    assert {each.key for each in memory} == {key_of(number) for number in range(2, 6)}
    memory.drop_fitting(Selector(everything=True))
    assert (len(memory), memory.size_bytes) == (0, 0)


def test_an_id_is_32_hexadecimal_digits() -> None:
    assert id_bytes(make_entry(7).id) == key_of(7)[:16]
    assert id_bytes("7") is None
    assert id_bytes("x" * 32) is None
