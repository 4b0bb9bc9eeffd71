"""The loops of `common.discrete_gaussian` and `common.noise`: integers alone."""

from typing import Any

import numpy as np

from common.compiled import compiled


@compiled
def look_up(guide: Any, prefixes: Any, reach: int, places: Any, unsure: Any) -> int:
    """Write the samples that 16 bits settle into `places`, and which they do not into `unsure`.

    Args:
        guide: [G] of the table; below 0 where 16 bits do not do.
        prefixes: [N] uniforms below G.
        reach: What a sample is less than its place in the table.
        places: [N] samples.
        unsure: [N]; as many are written as are returned.

    Returns:
        How many are not settled.
    """
    count = 0
    for number in range(len(prefixes)):
        place = guide[prefixes[number]]
        places[number] = place - reach
        unsure[count] = number
        count += place < 0
    return count


@compiled
def settle(  # noqa: PLR0913, PLR0917  # numba's functions take nothing by name
    ends: Any,
    high: Any,
    prefixes: Any,
    unsure: Any,
    drawn: Any,
    reach: int,
    places: Any,
    tied: Any,
) -> int:
    """Write the samples that 64 bits settle; nearly always one threshold begins with the same 16.

    Args:
        ends: [T, 2] what follows the first 16 bits of each threshold, and of the next one if it
            begins alike.
        high: [T] the thresholds' upper 64 bits, ascending.
        prefixes: [N].
        unsure: [U] which ones.
        drawn: [U] a word for each, whose upper 48 bits follow the prefix.
        reach: What a sample is less than its place in the table.
        places: [N] samples; of the unsure ones, what `look_up` left there.
        tied: [U] places in `unsure` of those that equal a threshold; as many as are returned.

    Returns:
        How many equal a threshold in 64 bits.
    """
    ties = 0
    for number in range(len(unsure)):
        sample, word = unsure[number], drawn[number]
        least = -1 - (places[sample] + reach)
        threshold = ends[least, 0]
        place = least + (word >= threshold)
        # in what is compared; unsigned, so that a difference below 0 is large
        if (word - threshold) >> 16 == 0 or word >= ends[least, 1]:
            upper = np.uint64(prefixes[sample]) << np.uint64(48) | word >> np.uint64(16)
            place, above = least, len(high)
            while place < above:  # thresholds before `place` are passed, those from `above` not
                middle = (place + above) // 2
                if high[middle] < upper:
                    place = middle + 1
                else:
                    above = middle
            if place < len(high) and high[place] == upper:
                tied[ties] = number
                ties += 1
        places[sample] = place - reach
    return ties


@compiled
def add_multiple(one: Any, other: Any, multiplier: int, total: Any) -> None:
    """Write `one + multiplier * other` into `total`, int64; all [N]."""
    for place in range(len(total)):
        total[place] = one[place] + multiplier * other[place]


@compiled
def choose(words: Any, limit: Any, rows: Any, keys: Any) -> int:
    """Write which words' upper 53 bits lie below `limit` into `rows`, and these words into `keys`.

    Args:
        words: [N], uint64.
        limit: uint64.
        rows: [N], int64; as many are written as are returned.
        keys: [N], uint64; the same.

    Returns:
        How many.
    """
    count = 0
    for row in range(len(words)):
        rows[count], keys[count] = row, words[row]
        count += words[row] >> 11 < limit
    return count


@compiled
def any_twice(keys: Any, order: Any) -> bool:
    """Return whether two keys are equal; `order` [N] sorts them."""
    twice = False
    for place in range(1, len(order)):
        twice |= keys[order[place]] == keys[order[place - 1]]
    return twice
