"""The turns of a chat: a message is answered, tools are called, turns are taken back, and the oldest are left out."""

from collections.abc import Callable, Sequence
from typing import Any

from mistral_large_conversion.errors import ConversationError

from .chat_screen import ChatScreen, call_text
from .conversation_file import Conversation, Message
from .generation_session import GenerationSession
from .terminal import one_line
from .tools_file import Tool

# Attribute of a function that changes nothing, so that nobody is asked before it runs.
READ_ONLY = "read_only"
# Of the room, what is free after turns were left out, so that not every turn changes the beginning of the prompt.
FREE = 8


class ChatTurns:
    """A conversation with a model.

    ask: returns what is typed at a question of the terminal; None where nobody can be asked, or wants to be.
    more_tools: tools next to those of the conversation's file.
    """

    def __init__(
        self,
        screen: ChatScreen,
        conversation: Conversation,
        session: GenerationSession,
        max_rounds: int,
        *,
        ask: Callable[[str], str] | None,
        more_tools: Sequence[Tool] = (),
    ) -> None:
        self.screen, self.conversation, self.session = screen, conversation, session
        self._max_rounds = max_rounds
        self._ask = ask
        self._more_tools = list(more_tools)
        self._always: set[str] = set()
        self._window = ContextWindow(self._count, session.chat.context_length)

    @property
    def tools(self) -> list[Tool]:
        """What the model may call."""
        return [*self.conversation.tools, *self._more_tools]

    @property
    def prompt_messages(self) -> list[Message]:
        """What the next prompt holds of the conversation."""
        return self.conversation.with_system(self._window.kept(self.conversation.messages))

    def answer(self, message: Message, before: Sequence[Message]) -> None:
        """Let the model respond to a message, call tools and respond again; an empty response takes the message back.

        before: the messages that come first; they and the new ones are the conversation if there is a response.
        """
        from modeling_mistral_large.generation.tool_loop import run_tool_loop

        messages = [*before, message]
        printed = len(messages)
        was_stopped = False

        def print_results(history: Sequence[Message]) -> None:
            nonlocal printed
            for each in history[printed:]:
                if each["role"] == "tool":
                    self.screen.show_result(each["content"])
            printed = len(history)

        def generate(history: list[Message], tools: Sequence[Tool]) -> Message:
            nonlocal was_stopped
            print_results(history)
            response, was_stopped = self._respond(history, tools)
            return response

        try:
            messages = run_tool_loop(
                generate,
                messages,
                self.tools,
                max_rounds=self._max_rounds,
                prompt_format=self.session.tokenizer.prompt_format,
                approve=None if self._ask is None else self._approve,
            )
        except KeyboardInterrupt:
            self.screen.note("\nstopped in a tool: this turn is forgotten")
            return
        print_results(messages)
        if messages[-1]["role"] == "tool":
            self.screen.note(f"the model still calls tools after {self._max_rounds} rounds")
        if was_stopped:
            self.screen.note("stopped")
        if messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip():
            # No prompt can hold an empty response.
            self.screen.note("no response: this turn is forgotten")
            return
        self.conversation.messages = messages

    def last_turn(self) -> int:
        """Return where the last message of the user's is.

        Raises:
            ConversationError: there is none.
        """
        for index in range(len(self.conversation.messages) - 1, -1, -1):
            if self.conversation.messages[index]["role"] == "user":
                return index
        raise ConversationError("no turn: nothing was said yet; write a message")

    def _respond(self, history: list[Message], tools: Sequence[Tool]) -> tuple[Message, bool]:
        before = self._window.dropped
        kept = self._window.fit(history, self.session.sampling.max_new_tokens)
        if len(self._window.dropped) > len(before):
            turns = sum(message["role"] == "user" for message in self._window.dropped)
            self.screen.note(
                f"the context is full: the oldest turns ({turns}) are left out of the prompt; /save keeps them"
            )
        try:
            message, was_stopped = self.session.respond(
                self.conversation.with_system(kept), tools, self.screen.show, self.screen.show_prefill
            )
        finally:
            self.screen.end_response()
        if self.screen.console.is_terminal:
            # Calls go on with their results.
            if not message.get("tool_calls"):
                self.screen.note(self.session.meter.line())
        elif self.session.meter.has_drafts:
            self.screen.note(self.session.meter.drafts())
        return message, was_stopped

    def _count(self, messages: list[Message]) -> int:
        return len(self.session.prompt(self.conversation.with_system(messages), self.tools))

    def _approve(self, tool: Tool, name: str, arguments: dict[str, Any]) -> bool:
        """Ask whether a function may run; what says of itself that it changes nothing runs unasked."""
        assert self._ask is not None
        if getattr(tool, READ_ONLY, False) is True or name in self._always:
            return True
        call = one_line(call_text({"name": name, "arguments": arguments}))
        while True:
            answer = self._ask(f"run {call}? [y]es/[n]o/[a]lways ").strip().lower()
            if answer in ("a", "always"):
                self._always.add(name)
            if answer in ("y", "yes", "a", "always"):
                return True
            if answer in ("", "n", "no"):
                return False


class ContextWindow:
    """What is left out of prompts; a turn is a message of the user's with all that follows until the next one.

    count: returns the tokens of the prompt of some messages.
    """

    def __init__(self, count: Callable[[list[Message]], int], context_length: int) -> None:
        self._count, self._context_length = count, context_length
        # Messages at the beginning that are left out.
        self.dropped: list[Message] = []

    def kept(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages without those that were left out last, if they begin with them."""
        has_same_start = list(messages[: len(self.dropped)]) == self.dropped
        return list(messages[len(self.dropped) :] if has_same_start else messages)

    def fit(self, messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
        """Return the messages with those turns that fit next to a response; the last turn always stays.

        A response gets the tokens it may have, but no more than half of the context.
        """
        room = self._context_length - min(max_new_tokens, self._context_length // 2)
        if self._count(list(messages)) <= room:
            self.dropped = []
            return list(messages)
        kept = self.kept(messages)
        first = len(messages) - len(kept)
        later = [index for index in range(first + 1, len(messages)) if messages[index]["role"] == "user"]
        if not later or (first and self._count(kept) <= room):
            return kept
        smaller = room - room // FREE
        # The first turn from which on all fits; the prompt grows with each that comes before it.
        low, high = 0, len(later) - 1
        while low < high:
            middle = (low + high) // 2
            if self._count(list(messages[later[middle] :])) <= smaller:
                high = middle
            else:
                low = middle + 1
        self.dropped = list(messages[: later[low]])
        return list(messages[later[low] :])
