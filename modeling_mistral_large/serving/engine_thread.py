"""The thread of an engine, and the queue before it."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from modeling_mistral_large.errors import GenerationError
from modeling_mistral_large.serving.requests import GenerationRequest
from modeling_mistral_large.serving.token_choice import TokenChooser
from modeling_mistral_large.serving.token_stream import Outbox, TokenStream, check_request


class Job:
    """A request in the engine, and its response so far.

    tokens: of prompt and response.
    begun: the engine's step in which it left the queue.
    """

    def __init__(self, request: GenerationRequest, stream: TokenStream, chooser: TokenChooser) -> None:
        self.request, self.stream, self.chooser = request, stream, chooser
        self.tokens = list(request.prompt)
        self.begun = 0

    @property
    def reserved_tokens(self) -> int:
        """The most tokens it can have in the cache."""
        return len(self.request.prompt) + self.request.max_new_tokens


class EngineThread:
    """What engines have in common: a daemon thread, a queue that an event loop fills, and an outbox for the results.

    `submit` and `close` are called from the thread of the event loop.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.waiting: deque[Job] = deque()
        self.outbox = Outbox()
        self._changed = threading.Condition()
        # Whether the responses are to end.
        self.is_closed = False
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> TokenStream:
        """Queue a request; called in the thread of a running event loop.

        Raises SettingError for one that cannot be served, and ValueError for settings that no token can be chosen by.
        """
        check_request(self.model, request)
        job = Job(request, TokenStream(self._wake), TokenChooser(request, self.model.device))
        self.check(job)
        with self._changed:
            if self.is_closed:
                raise GenerationError("the engine is closed; it takes no requests any more; start another one")
            self.waiting.append(job)
            self._changed.notify()
        return job.stream

    def close(self) -> None:
        """End all responses and the thread, after the forward pass that runs now."""
        self.is_closed = True
        self._wake()
        self._thread.join()

    def check(self, job: Job) -> None:
        """Raise SettingError for a request that this engine cannot serve."""

    def jobs(self) -> list[Job]:
        """The jobs that have left the queue."""
        raise NotImplementedError

    def step(self) -> None:
        """Do a part of the work, after which the results are sent."""
        raise NotImplementedError

    def fail_all(self, error: Exception) -> None:
        """End the jobs that have left the queue by an error."""
        raise NotImplementedError

    def drop_cancelled(self) -> None:
        """Take jobs that were cancelled out of the queue."""
        with self._changed:
            for job in [job for job in self.waiting if job.stream.is_cancelled]:
                self.waiting.remove(job)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _run(self) -> None:
        with torch.no_grad():
            while self._wait():
                try:
                    self.step()
                # Nothing that one step meets may leave later requests without a thread.
                except Exception as error:
                    self.fail_all(error)
                self.outbox.send()
        for job in [*self.waiting, *self.jobs()]:
            self.outbox.put(job.stream, None)
        self.outbox.send()

    def _wait(self) -> bool:
        """Wait until there is something to do; return whether the engine goes on."""
        with self._changed:
            self._changed.wait_for(lambda: self.is_closed or self.waiting or self.jobs())
            return not self.is_closed
