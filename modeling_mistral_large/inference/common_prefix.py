"""What the token ids of two prompts have in common, so that one cache serves both."""

from collections.abc import Sequence


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens at the start of two lists that are the same, by comparisons of slices."""
    low, high = 0, min(len(first), len(second))
    step = 16
    # The first slices are short, as most lists differ early.
    while low < high:
        end = min(high, low + step)
        if first[low:end] == second[low:end]:
            low, step = end, step * 4
        elif end - low == 1:
            return low
        else:
            high, step = end, (end - low) // 2
    return low
