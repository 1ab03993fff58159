"""The places of a batch: each has a cache of its own, which stays filled as the prefix of later prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from modeling_mistral_large.inference.common_prefix import common_length
from modeling_mistral_large.inference.growing_cache import GrowingCache
from modeling_mistral_large.serving.engine_thread import Job


class Slot:
    """A place of the batch.

    ids: the tokens in its cache.
    job: whose place it is; None where it is free and its tokens wait for a prompt that begins with them.
    """

    def __init__(self, cache: GrowingCache) -> None:
        self.cache = cache
        self.ids: list[int] = []
        self.job: Job | None = None
        self.last_use = 0

    @property
    def unread(self) -> int:
        """The number of its job's tokens that are not in the cache."""
        return 0 if self.job is None else len(self.job.tokens) - len(self.ids)

    def next_tokens(self, most: int) -> list[int]:
        """The next tokens of its job that are to be read."""
        assert self.job is not None
        return self.job.tokens[len(self.ids) : len(self.ids) + most]

    def crop(self, tokens: int) -> None:
        """Keep the first tokens only."""
        self.cache.crop_to(tokens)
        del self.ids[tokens:]

    def share(self, other: Slot, end: int) -> int:
        """Copy the tokens up to `end` that another slot has more, and return their number."""
        new = other.ids[len(self.ids) : end]
        self.cache.copy_from(other.cache, end)
        self.ids.extend(new)
        return len(new)


class SlotPool:
    """The slots, and which one a prompt gets.

    max_cached_tokens: of all slots together; None for no limit.
    """

    def __init__(self, config: Any, count: int, *, fp8: bool, max_cached_tokens: int | None) -> None:
        self.slots = [Slot(GrowingCache(config, fp8=fp8)) for _ in range(count)]
        self.max_cached_tokens = max_cached_tokens
        self._uses = 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    @property
    def busy(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.job is not None]

    def place(self, job: Job) -> Slot | None:
        """Give a job a free slot, with what of its prompt is in the cache already; None while there is no room."""
        free = sorted(
            (slot for slot in self.slots if slot.job is None), key=lambda slot: (bool(slot.ids), slot.last_use)
        )
        if not free:
            return None
        room = self._room_beside(job)
        if room is not None and room < 0:
            return None
        source, common = self._longest_prefix(job.tokens)
        target = free[0] if free[0] is not source or len(free) == 1 else free[1]
        # Tokens that follow the prefix are lost with it, so it is copied where they are more than it has, if they fit.
        if (
            source is not None
            and source.job is None
            and (2 * common >= len(source.ids) or (room is not None and len(source.ids) > room))
        ):
            target = source
        if room is not None:
            idle = [slot for slot in free if slot is not target]
            # The source last.
            idle.sort(key=lambda slot: slot is source)
            while sum(len(slot.ids) for slot in idle) > room:
                idle.pop(0).crop(0)
        # Before anything that may fail.
        target.job = job
        target.crop(common_length(target.ids, job.tokens[:-1]))
        job.stream.cached_tokens = len(target.ids)
        return target

    def share_prefix(self, slot: Slot) -> None:
        """Copy what any slot has of the tokens that a slot would read next."""
        job = slot.job
        assert job is not None
        source, common = self._longest_prefix(job.tokens)
        if source is not None and common > len(slot.ids):
            job.stream.cached_tokens += slot.share(source, common)

    def release(self, slot: Slot) -> None:
        """Take the job from a slot; its tokens stay, if the free slots then hold no more memory than is free."""
        self._uses += 1
        slot.job, slot.last_use = None, self._uses
        idle = sorted(self._idle, key=lambda slot: slot.last_use)
        held = sum((slot.cache.bytes_by_device() for slot in idle), Counter())
        limits = {device: (held[device] + free_memory(device)) / 2 for device in held}
        for oldest in idle:
            if all(held[device] <= limit for device, limit in limits.items()):
                return
            held -= oldest.cache.bytes_by_device()
            oldest.crop(0)

    def drop_idle(self) -> bool:
        """Free the memory of all free slots; return whether there was any."""
        idle = self._idle
        for slot in idle:
            slot.crop(0)
        return bool(idle)

    @property
    def _idle(self) -> list[Slot]:
        return [slot for slot in self.slots if slot.job is None and slot.ids]

    def _room_beside(self, job: Job) -> int | None:
        """How many tokens may stay cached in free slots if a job is taken; below 0 if it has to wait."""
        if self.max_cached_tokens is None:
            return None
        reserved = sum(slot.job.reserved_tokens for slot in self.slots if slot.job is not None)
        return self.max_cached_tokens - reserved - job.reserved_tokens

    def _longest_prefix(self, prompt: list[int]) -> tuple[Slot | None, int]:
        """The slot with the longest prefix of a prompt but its last token, which is always read, and its length."""
        tokens = prompt[:-1]
        lengths = [common_length(slot.ids, tokens) for slot in self.slots]
        longest = max(lengths)
        return (self.slots[lengths.index(longest)] if longest else None), longest


def free_memory(device: torch.device) -> float:
    """The bytes that a device has left; infinity where it does not say."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return torch.cuda.mem_get_info(device)[0] + reserved - allocated
    return psutil.virtual_memory().available if device.type == "cpu" else float("inf")
