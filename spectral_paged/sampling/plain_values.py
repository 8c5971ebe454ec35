"""Arrays, tensors, scalars and columns of other libraries become plain Python values.

They are known by their methods, so no library is imported for it: numpy and torch have `tolist`,
pandas too, pyarrow has `to_pylist`, and columns of `datasets` and polars are iterated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from spectral_paged.errors import InvalidRequestError, refusal, shown

_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)


def plain(value: Any) -> Any:
    """Return an array, a tensor or a scalar of one as lists, numbers and strings of Python.

    Other values are returned unchanged.

    Raises:
        InvalidRequestError: its values cannot be read, such as those of a tensor without memory.
    """
    convert = getattr(value, "tolist", None) or getattr(value, "to_pylist", None)
    if convert is None:
        return value
    try:
        return convert()
    except Exception as error:  # of any type, by libraries that are not known here
        raise InvalidRequestError(
            f"a {type(value).__name__} cannot be read as a list ({shown(error)}): give a list"
        ) from error


def plain_list(values: Any, name: str) -> list[Any] | None:
    """Return the items of a list, tuple, array, column or generator as plain values.

    None: it is none of these, for text, mappings and sets are no lists.

    Args:
        name: of the argument, for the refusal.

    Raises:
        InvalidRequestError: `values` is a table, of which one column has to be named.
    """
    columns = getattr(values, "column_names", None)
    columns = getattr(values, "columns", None) if columns is None else columns
    if columns is not None:
        known = [str(column) for column in columns]
        such = known[0] if known else "prompt"
        raise refusal(
            f"{name} is a table ({type(values).__name__}) with columns {shown(known)}: give one "
            f"column, such as {name}[{shown(such)}]",
            name,
        )
    values = plain(values)
    if isinstance(values, _NO_LISTS) or not isinstance(values, Iterable):
        return None
    return [value if type(value) in (int, str) else plain(value) for value in values]
