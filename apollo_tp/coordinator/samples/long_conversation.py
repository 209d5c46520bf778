"""Assistant turns of a long conversation, in time linear in the number of its messages.

Comparing the beginning of a conversation with the whole for every turn takes quadratic time: seconds for a thousand turns.
Here the first, the middle and the last turn of each kind are compared so. The text between the turn and the content of the
message before it, and that between the turn and the content of the message after it, are the same for all turns of a kind;
a turn around which they are not is compared by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from apollo_tp.coordinator.samples.template import MARK, Span, between_marks
from apollo_tp.errors import refuse

MAX_RENDERED = 20_000
"""Messages rendered to compare every turn of a conversation, at most: about 100 turns, 0.1 s."""
Kind = tuple[tuple[str, ...], ...]


class LongConversation:
    """Locates turns of ``messages``, whose rendering is ``text``. ``exactly`` locates one turn by rendering the conversation
    up to it, and raises RequestError where that is not how the text begins."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        text: str,
        render: Callable[[list[dict[str, Any]]], str],
        exactly: Callable[[int], Span],
    ) -> None:
        self._messages, self._text, self._exactly = messages, text, exactly
        self._contents = self._find_contents(render)
        self._rendered = 0

    def locate(self, learned: Sequence[int]) -> list[Span]:
        """The span of each message of ``learned``. Raises RequestError if one cannot be located."""
        found: dict[int, Span] = {}
        kinds: dict[Kind, list[int]] = defaultdict(list)
        for index in learned:
            if index - 1 in self._contents and index + 1 in self._contents:
                kinds[self._kind(index)].append(index)
            else:
                found[index] = self._exact(index)
        for turns in kinds.values():
            first = self._exact(turns[0])
            before = self._text[self._contents[turns[0] - 1][1] : first[0]]
            after = self._text[first[1] : self._contents[turns[0] + 1][0]]
            compared = {turns[0], turns[len(turns) // 2], turns[-1]}
            for index in turns:
                span = self._between(index, before, after)
                found[index] = self._exact(index) if span is None or index in compared else span
        return [found[index] for index in learned]

    def _exact(self, index: int) -> Span:
        self._rendered += 2 * index
        if self._rendered > max(4 * MAX_RENDERED, 12 * len(self._messages)):
            raise refuse(
                "messages", f"{len(self._messages)} messages, whose turns the template renders in many ways",
                "fewer, for example the conversation in parts",
            )  # fmt: skip
        return self._exactly(index)

    def _between(self, index: int, before: str, after: str) -> Span | None:
        """The turn between these texts; None if they are not around it."""
        begin, end = self._contents[index - 1][1], self._contents[index + 1][0]
        around = self._text.startswith(before, begin) and self._text.endswith(after, begin, end)
        span = begin + len(before), end - len(after)
        return span if around and span[0] <= span[1] else None

    def _kind(self, index: int) -> Kind:
        """Role and fields of the messages from the last user's to the one after ``index``."""
        begin = index - 1
        while begin > 0 and self._messages[begin]["role"] != "user":
            begin -= 1
        return tuple((message["role"], *sorted(message)) for message in self._messages[begin : index + 2])

    def _find_contents(self, render: Callable[[list[dict[str, Any]]], str]) -> dict[int, Span]:
        """Where the contents of the messages of others are; empty if marks around them change the text."""
        others = [index for index, message in enumerate(self._messages) if message["role"] != "assistant"]
        marked = [*self._messages]
        for index in others:
            marked[index] = between_marks(marked[index])
        parts = render(marked).split(MARK)
        if len(parts) != 2 * len(others) + 1 or "".join(parts) != self._text:
            return {}
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part))
        return {index: (starts[2 * n + 1], starts[2 * n + 2]) for n, index in enumerate(others)}
