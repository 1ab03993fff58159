"""How much memory the tensors of a computation take at once, without the noise of processes and allocators."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _storages(values: Any) -> list[torch.UntypedStorage]:
    # Tensors on `meta` have no bytes.
    return [
        value.untyped_storage()
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and not value.is_meta
    ]


class PeakMemory(TorchDispatchMode):
    """Counts, while it is entered, the bytes of storages that operators make; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A view shares the storage of what it is made of.
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in given | self._counted:
                self._counted.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self._now)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._counted.remove(key)
        self._now -= size
