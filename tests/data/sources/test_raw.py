"""Tests of raw records: an object is a record, anything else is an error that shows it."""

from __future__ import annotations

import pytest

from qlora_lite.data.sources.raw import RawRecord, checked_object


def test_an_object_is_a_record() -> None:
    assert checked_object("a.json, record 1", {"text": "a"}, "write objects") == (
        RawRecord("a.json, record 1", {"text": "a"}, None)
    )


@pytest.mark.parametrize(("value", "got"), [(["a"], "list ['a']"), (None, "NoneType None"), ("a" * 99, "str 'aaa")])
def test_another_value_is_an_error_that_shows_it(value: object, got: str) -> None:
    record = checked_object("a.json, record 1", value, "write objects")
    assert record.value is None
    assert record.error is not None
    assert record.error.startswith(f"expected a JSON object, got {got}")
    assert record.error.endswith("; write objects")
    assert len(record.error) < 150
