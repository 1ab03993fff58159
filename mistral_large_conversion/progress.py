"""The progress of acts that read or write all weights: a bar, or calls of the user's own."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Is told the bytes of tensors as they are done.
Progress = Callable[[int], object]


@contextmanager
def progress_calls(progress: Progress | bool, label: str, total_bytes: int) -> Iterator[Progress]:
    """Yield what an act tells its progress: `progress` itself, nothing for False, a bar for True.

    The bar is huggingface_hub's: in a notebook and at a terminal, on stderr, unless its `disable_progress_bars()` or
    `HF_HUB_DISABLE_PROGRESS_BARS` turns all of them off.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda _: None
    else:
        from huggingface_hub import utils

        # `disable=None` leaves pipes and log files without a bar.
        options = {"desc": label, "total": total_bytes, "unit": "B", "unit_scale": True, "disable": None}
        with utils.tqdm(**options) as bar:  # type: ignore[attr-defined, no-untyped-call]  # exported when first used
            yield bar.update
