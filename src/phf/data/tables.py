"""Rows of Arrow tables as Python values, whatever the tables hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

ROWS_AT_ONCE = 1024
"""Rows of a table that are held in memory at a time."""
_BROKEN = object()
"""A value whose bytes are not what its type promises."""


def is_metadata(type_: Any) -> bool:
    """Whether a column of an Arrow type is kept as metadata: strings, numbers, truth values, times, lists of strings,
    and structures of these. Bytes and lists of numbers, such as images and embeddings, are not read."""
    import pyarrow.types as t

    if t.is_struct(type_):
        return all(is_metadata(type_.field(n).type) for n in range(type_.num_fields))
    if t.is_list(type_) or t.is_large_list(type_):
        return bool(t.is_string(type_.value_type) or t.is_large_string(type_.value_type))
    if t.is_dictionary(type_):
        return is_metadata(type_.value_type)
    plain = (t.is_string, t.is_large_string, t.is_string_view, t.is_integer, t.is_floating, t.is_boolean, t.is_decimal)
    return any(test(type_) for test in (*plain, t.is_temporal, t.is_null))


def columns_to_read(schema: Any, text: str, *others: str) -> list[str]:
    """The columns of a table with the text in `text` that are read: that one, `others`, metadata, and the scores that
    go with texts that are cut."""
    import pyarrow.types as t

    kept = {text, *others}
    if text in schema.names and (t.is_list(schema.field(text).type) or t.is_large_list(schema.field(text).type)):
        kept.add("scores")
    return [f.name for f in schema if f.name in kept or is_metadata(f.type)]


def _values(column: Any) -> list[Any]:
    """A column of an Arrow table as Python values: UTF-8 bytes as strings, times as text. `_BROKEN` for bytes that are
    not UTF-8 and for values that Python cannot hold."""
    import pyarrow as pa
    import pyarrow.types as t

    if t.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if t.is_binary(column.type) or t.is_large_binary(column.type) or t.is_binary_view(column.type):
        return [_decoded(value) for value in column.to_pylist()]
    if t.is_temporal(column.type):
        plain = pa.timestamp(column.type.unit) if t.is_timestamp(column.type) else pa.int64()
        for type_ in (None, plain):  # the time zone may not be known here
            try:
                return list((column if type_ is None else column.cast(type_)).cast(pa.string()).to_pylist())
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                continue
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, KeyError, ArithmeticError, LookupError):
        return [_value(column, n) for n in range(len(column))]


def _decoded(value: Any) -> Any:
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return _BROKEN


def _value(column: Any, number: int) -> Any:
    try:
        return column[number].as_py()
    except (ValueError, OverflowError, KeyError, ArithmeticError, LookupError):
        return _BROKEN


def table_rows(table: Any, text: str | None = None) -> Iterator[dict[str, Any] | None]:
    """Rows of an Arrow table or batch. None for a row whose column `text` (None: any column) is not UTF-8, whatever its
    type promises. Other values that Python cannot hold become None."""
    names = table.schema.names
    columns = [_values(column) for column in table.columns]
    for values in zip(*columns, strict=True):
        row = dict(zip(names, values, strict=True))
        broken = [name for name, value in row.items() if value is _BROKEN]
        if broken and (text is None or text in broken):
            yield None
        else:
            yield row | dict.fromkeys(broken) if broken else row
