"""Turn raw columns into numbers, codes, texts and times, whole columns at a time.

A cell is missing when it is null, empty or blank; in columns of numbers, flags, labels and
categories also when it says NA, N/A, NaN, null or None (and no category is called so).
Nothing is guessed from other rows: what a cell means depends on that cell alone.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int64, Shaped

from clients.rows import Source

MISSING = -1
_UNKNOWN = -2
_MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none")
_FLAGS = {"0": 0, "false": 0, "no": 0, "0.0": 0, "1": 1, "true": 1, "yes": 1, "1.0": 1}
_OFFSET = r"[T ]\d\d.*(Z|z|[+-]\d\d(:?\d\d)?)$"
_MICROSECONDS = pa.timestamp("us")


def numbers(source: Source, column: str) -> Float[np.ndarray, "R"]:
    """Read a column of finite numbers; NaN where a cell is missing.

    Raises:
        DataError: A cell is not a number, or is infinite.
    """
    cells = _plain(source.columns[column])
    if _is_text(cells.type):
        cells = _parsed_numbers(source, column, cells)
    elif pa.types.is_decimal(cells.type):
        cells = pc.cast(pc.cast(cells, pa.string()), pa.float64())
    elif _is_number(cells.type):
        cells = pc.cast(cells, pa.float64(), safe=False)
    else:
        source.refuse(_first_known(cells), column, "expected a number, like 3.14")
    values = np.asarray(pc.fill_null(cells, np.nan).to_numpy(), dtype=np.float64)
    infinite = np.isinf(values)
    if infinite.any():
        row = int(infinite.argmax())
        source.refuse(row, column, "the number is infinite; leave the cell empty or correct it")
    return values


def flags(source: Source, column: str) -> Float[np.ndarray, "R"]:
    """Read a column of 0 and 1 (or false/true, no/yes); NaN where a cell is missing.

    Raises:
        DataError: A cell is neither.
    """
    codes = _coded(texts(source, column), lambda cell: _FLAGS.get(cell.lower()))
    _refuse_unknown(source, column, codes, "expected a flag: 0 or 1, false or true, no or yes")
    return np.where(codes == MISSING, np.nan, codes.astype(np.float64))


def categories(
    source: Source, column: str, known: tuple[str, ...], problem: str
) -> Int64[np.ndarray, "R"]:
    """Read a column of known words as their positions; MISSING where a cell is missing.

    Args:
        source: Holds the column.
        column: Its name.
        known: The words, compared exactly.
        problem: What the message says about a word that is not known.

    Raises:
        DataError: A cell is none of the known words.
    """
    places = {word: place for place, word in enumerate(known)}
    codes = _coded(texts(source, column), places.get)
    _refuse_unknown(source, column, codes, problem)
    return codes


def segments(source: Source, column: str, names: tuple[str, ...]) -> Int64[np.ndarray, "R"]:
    """Read a column of segment names or ids; MISSING where a cell is missing.

    Raises:
        DataError: A cell is neither a segment's name nor its id.
    """
    places: Mapping[str, int] = {
        **{f"{place}{end}": place for place in range(len(names)) for end in ("", ".0")},
        **{name: place for place, name in enumerate(names)},
    }
    codes = _coded(texts(source, column), places.get)
    problem = f"expected a segment of the contract: its name, or its id from 0 to {len(names) - 1}"
    _refuse_unknown(source, column, codes, problem)
    return codes


def texts(source: Source, column: str) -> pa.ChunkedArray:
    """Read a column as text without blanks around it; null where a cell is missing.

    Raises:
        DataError: The column holds nested or binary values, or a NUL byte.
    """
    cells = _plain(source.columns[column])
    if pa.types.is_floating(cells.type):
        cells = _float_texts(cells)
    elif not _is_text(cells.type):
        try:
            cells = pc.cast(cells, pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            source.refuse(_first_known(cells), column, "expected a plain text or number")
    cells = pc.utf8_trim_whitespace(cells)
    nul = pc.match_substring(cells, "\0")
    if pc.any(nul).as_py():
        row = int(pc.index(nul, True).as_py())
        source.refuse(row, column, "the text holds a NUL byte; remove it")
    return pc.if_else(pc.equal(cells, ""), None, cells)


def keys(source: Source, column: str, what: str) -> pa.ChunkedArray:
    """Read a column of identifiers as text, none of them missing.

    Raises:
        DataError: A cell is empty; `what` names the identifier.
    """
    cells = texts(source, column)
    if cells.null_count:
        row = int(pc.index(pc.is_null(cells), True).as_py())
        source.refuse(row, column, f"the {what} is empty; every row needs one")
    return cells


def factorized(cells: pa.ChunkedArray) -> pd.Categorical:
    """Give every different text a code; the categories are in order of appearance."""
    encoded = cells.dictionary_encode().unify_dictionaries().combine_chunks()
    codes = pc.fill_null(encoded.indices, MISSING).to_numpy(zero_copy_only=False)
    return pd.Categorical.from_codes(codes, categories=pd.Index(encoded.dictionary.to_pandas()))


def times(source: Source, column: str) -> Shaped[np.ndarray, "R"]:
    """Read a column of ISO 8601 times as datetime64[us], none of them missing.

    A time with a UTC offset is taken as the local time that is written, so that an hour is the
    hour on the shop's clock; a column has offsets everywhere or nowhere.

    Raises:
        DataError: A cell is empty or not a time, or only some have a UTC offset.
    """
    cells = _plain(source.columns[column])
    if _is_text(cells.type):
        cells = _parsed_times(source, column, keys(source, column, "time"))
    elif pa.types.is_timestamp(cells.type):
        local = pc.local_timestamp(cells) if cells.type.tz else cells
        cells = pc.cast(local, _MICROSECONDS, safe=False)
    elif pa.types.is_date(cells.type):
        cells = pc.cast(cells, _MICROSECONDS)
    else:
        source.refuse(_first_known(cells), column, "expected an ISO 8601 time: 2017-10-01T17:30:00")
    if cells.null_count:
        row = int(pc.index(pc.is_null(cells), True).as_py())
        source.refuse(row, column, "the time is empty; every row needs one")
    return np.asarray(cells.to_numpy(), dtype="datetime64[us]")


def _plain(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Undo encodings that compute functions do not all know."""
    if pa.types.is_dictionary(cells.type):
        cells = pc.cast(cells, cells.type.value_type)
    return pc.cast(cells, pa.large_string()) if pa.types.is_string_view(cells.type) else cells


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind))


def _first_known(cells: pa.ChunkedArray) -> int:
    """Give the first row with a value; row 0 where there is none."""
    return max(int(pc.index(pc.is_valid(cells), True).as_py()), 0)


def _float_texts(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Write whole numbers below 2**53 without a point or an exponent; NaN is missing."""
    cells = pc.cast(cells, pa.float64())
    whole = pc.and_(pc.equal(pc.floor(cells), cells), pc.less(pc.abs(cells), 2.0**53))
    integers = pc.cast(pc.if_else(whole, cells, 0.0), pa.int64())
    written = pc.if_else(whole, pc.cast(integers, pa.string()), pc.cast(cells, pa.string()))
    return pc.if_else(pc.is_nan(cells), None, written)


def _parsed_numbers(source: Source, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    try:
        return pc.cast(cells, pa.float64())
    except pa.ArrowInvalid:
        trimmed = pc.utf8_trim_whitespace(cells)
    missing = pc.is_in(pc.utf8_lower(trimmed), value_set=pa.array(_MISSING_WORDS, trimmed.type))
    cleaned = pc.if_else(missing, None, trimmed)
    try:
        return pc.cast(cleaned, pa.float64())
    except pa.ArrowInvalid:
        row = _first_uncastable(cleaned, pa.float64())
    comma = pc.match_substring_regex(cleaned.slice(row, 1), r"^[+-]?\d+,\d+$")[0].as_py()
    hint = "write the decimal point as a point, not as a comma" if comma else "write it like 3.14"
    source.refuse(row, column, f"the cell is not a number; {hint}")


def _parsed_times(source: Source, column: str, cells: pa.ChunkedArray) -> pa.ChunkedArray:
    aware = pc.match_substring_regex(cells, _OFFSET)
    if pc.any(aware).as_py():
        odd = pc.index(aware, not aware[0].as_py()).as_py()
        if odd >= 0:
            problem = "some times have a UTC offset and some do not; write all of them alike"
            source.refuse(int(odd), column, problem)
        cells = pc.replace_substring_regex(cells, r" *(Z|z|[+-]\d\d(:?\d\d)?)$", "")
    if pc.any(pc.match_substring(cells, ".")).as_py():
        cells = pc.replace_substring_regex(cells, r"(\.\d{6})\d+$", r"\1")
    try:
        return pc.cast(cells, _MICROSECONDS)
    except pa.ArrowInvalid:
        row = _first_uncastable(cells, _MICROSECONDS)
    source.refuse(row, column, "the cell is not an ISO 8601 time like 2017-10-01T17:30:00")


def _first_uncastable(cells: pa.ChunkedArray, kind: pa.DataType) -> int:
    """Find the first cell that a cast refuses, by halving."""
    low, high = 0, len(cells)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pc.cast(cells.slice(low, middle - low), kind)
        except pa.ArrowInvalid:
            high = middle
        else:
            low = middle
    return low


def _coded(cells: pa.ChunkedArray, code: Callable[[str], int | None]) -> Int64[np.ndarray, "R"]:
    """Look every different text up once; a missing word counts unless it is known."""
    coded = factorized(cells)
    table = [_code(str(text), code) for text in coded.categories]
    found = np.array([*table, MISSING], dtype=np.int64)
    return np.take(found, coded.codes)


def _code(text: str, code: Callable[[str], int | None]) -> int:
    known = code(text)
    if known is not None:
        return known
    return MISSING if text.lower() in _MISSING_WORDS else _UNKNOWN


def _refuse_unknown(
    source: Source, column: str, codes: Int64[np.ndarray, "R"], problem: str
) -> None:
    unknown = codes == _UNKNOWN
    if unknown.any():
        source.refuse(int(unknown.argmax()), column, problem)
