"""A set of texts in 16 bytes each behaves as Python's own."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compact_set import CompactSet


@given(st.lists(st.text(max_size=3), max_size=60), st.integers(1, 8))
def test_says_of_every_text_whether_it_is_new(texts: list[str], fewest_recent: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.compact_set._FEWEST_RECENT", fewest_recent)
        compact, plain = CompactSet(), set[str]()
        for text in texts:
            assert (text in compact) == (text in plain)
            assert compact.add(text) == (text not in plain)
            plain.add(text)
            assert len(compact) == len(plain)
        assert all(text in compact for text in plain)


def test_texts_that_agree_in_half_of_their_hash_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.compact_set._FEWEST_RECENT", 2)
    monkeypatch.setattr(xxhash, "xxh3_128_intdigest", lambda data: (7 << 64) + int(data))
    compact = CompactSet()
    assert [compact.add(str(number)) for number in (3, 1, 2, 5, 4, 3, 5)] == [True] * 5 + [False] * 2
    assert "6" not in compact


def test_half_a_character_is_a_text_too() -> None:
    compact = CompactSet()
    assert compact.add("\udcff")
    assert "\udcff" in compact
