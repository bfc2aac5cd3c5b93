"""What the entries of a list ask of the language model, asked together though ComfyUI runs a node entry by entry.

Before the first entry runs, ComfyUI asks the node for each of them which inputs it still needs. There they are noted,
and the first that runs has the questions of all answered. (A node that takes whole lists would know them too, but then
an entry that another node has blocked would block all.)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from comfy_execution.utils import get_executing_context
from torch import Tensor

from .encode import picture_key, subject_hidden_states
from .hidden_state_cache import HiddenStateCache
from .loading import Mllm


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of one picture.

    Attributes:
        image: [H, W, 3] uint8.
        mask: [H, W] bool, True on the subject.
        text: The subject word(s) and the prompt.
    """

    image: np.ndarray
    mask: np.ndarray
    text: tuple[str, str]

    @cached_property
    def picture(self) -> str:
        """Names picture and mask by their content."""
        return picture_key(self.image, self.mask)


class Asking(Protocol):
    """What a node makes of one entry."""

    @property
    def questions(self) -> Sequence[Question]:
        """What it asks."""

    @property
    def cache(self) -> HiddenStateCache | None:
        """Where the answers are kept; None: they are not, and not looked for either."""


Entry = TypeVar("Entry", bound=Asking)


class RefusedEntryError(ValueError):
    """An entry of the list cannot be used. The message names it."""


@dataclass
class Entries(Generic[Entry]):
    """Those of the list that the executing node goes through with one model.

    Attributes:
        noted: By their number those that have not run yet, or why they cannot be used.
        count: How many there were to begin with.
    """

    noted: dict[int, Entry | str] = field(default_factory=dict)
    count: int = 0
    _answers: dict[tuple[str, tuple[str, str]], Tensor] = field(default_factory=dict, repr=False)

    def note(self, number: int, make: Callable[[], Entry]) -> None:
        """Note an entry, made now; what it is refused for is said where it runs."""
        self.count += number not in self.noted
        try:
            self.noted[number] = make()
        except ValueError as error:
            self.noted[number] = str(error)

    def entry(self, number: int, make: Callable[[], Entry]) -> Entry:
        """The one that runs, as it was noted or made now.

        Raises:
            ValueError: Whatever `make` raises.
        """
        found = self.noted.get(number)
        return make() if found is None or isinstance(found, str) else found

    def refused(self) -> list[str]:
        """What is wrong with those that cannot be used, each with its name."""
        return [self.named(number) + why for number, why in sorted(self.noted.items()) if isinstance(why, str)]

    def named(self, number: int) -> str:
        """The beginning of a message about an entry; nothing where there is no list."""
        return f"Entry {number + 1} of the list: " if number or self.count > 1 else ""

    def answers(self, mllm: Mllm, entry: Entry) -> list[Tensor]:
        """For each of the entry's questions the hidden state, see `subject_hidden_states`.

        With them those of all entries are asked, unless they have been: of a picture all texts in one go.

        Raises:
            RefusedEntryError: Another entry cannot be used, and the answers would be lost with it.
        """
        if any((question.picture, question.text) not in self._answers for question in entry.questions):
            if entry.cache is None and (refused := self.refused()):
                raise RefusedEntryError(refused[0])
            self._ask(mllm, [entry, *(one for one in self.noted.values() if not isinstance(one, str))])
        return [self._answers[question.picture, question.text] for question in entry.questions]

    def _ask(self, mllm: Mllm, entries: Iterable[Entry]) -> None:
        pictures: dict[tuple[HiddenStateCache | None, str], dict[tuple[str, str], Question]] = {}
        for entry in entries:
            for question in entry.questions:
                pictures.setdefault((entry.cache, question.picture), {})[question.text] = question
        for (cache, picture), questions in pictures.items():
            one, texts = next(iter(questions.values())), list(questions)
            ask = subject_hidden_states if cache is None else cache.hidden_states
            for text, hidden in zip(texts, ask(mllm, one.image, one.mask, texts), strict=True):
                self._answers[picture, text] = hidden


def note_entry(mllm: Mllm, make: Callable[[], Asking]) -> None:
    """Note an entry of the executing node's list before the first one runs.

    They lie on the model, and are gone with the last entry, or where one fails.
    """
    node, number = _place()
    if node is None:
        return
    if node not in mllm.asked:
        mllm.asked.clear()  # of a run that was stopped
        mllm.asked[node] = Entries()
    mllm.asked[node].note(number, make)


@contextmanager
def executing_entry(mllm: Mllm) -> Iterator[tuple[Entries[Any], int]]:
    """For as long as one entry runs: the entries, and its number from 0. An error about it names it."""
    node, number = _place()
    entries = mllm.asked.get(node) if node is not None else None
    entries = Entries() if entries is None else entries
    left = False
    try:
        yield entries, number
        entries.noted.pop(number, None)
        left = bool(entries.noted)
    except RefusedEntryError:
        raise
    except ValueError as error:
        raise ValueError(entries.named(number) + str(error)) from error
    finally:
        if not left:
            mllm.asked.clear()


def _place() -> tuple[tuple[str, str] | None, int]:
    """The prompt and node that are being executed, and the number of the entry."""
    context = get_executing_context()
    return (None, 0) if context is None else ((context.prompt_id, context.node_id), context.list_index or 0)
