"""What the language model made of the beginnings of its instructions, kept in RAM as long as its weights are loaded.

A prompt changes the last words of an instruction; the picture and the words before are the same again, and so are their
keys and values in every layer.
"""

from collections import OrderedDict
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from comfy_execution.utils import get_executing_context
from torch import Tensor

LIMIT = 2 << 30
"""Bytes kept for one model: with the released one 6 pictures in 16 bit, 3 in fp32. The longest unused go first."""

Layers = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [1, heads, tokens, width of a head]; the positions are in the keys."""

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Beginning:
    """The first tokens of an instruction about one picture.

    Attributes:
        ids: Theirs, the picture's one id among them.
        layers: Their keys and values, on the CPU.
    """

    ids: tuple[int, ...]
    layers: Layers

    @property
    def tokens(self) -> int:
        """How many positions they take; the picture's id takes many."""
        return self.layers[0][0].shape[2]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for layer in self.layers for part in layer)


class Beginnings:
    """The beginnings kept for one loaded model, by what it sees of a picture; they go when the model leaves its device.

    On a card they stay while ComfyUI makes room there for another model of the same run, as they take no room there: a
    sampler that follows would else undo them each time.
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        """Of the model that this patcher loads and unloads."""
        self._kept: OrderedDict[str, Beginning] = OrderedDict()
        self._on_cpu = patcher.load_device.type == "cpu"
        patcher.add_callback(CallbacksMP.ON_DETACH, lambda _, unpatch_all: self._left(unpatch_all))

    def get(self, picture: str) -> Beginning | None:
        """What is kept of a picture, now the latest used."""
        found = self._kept.get(picture)
        if found is not None:
            self._kept.move_to_end(picture)
        return found

    def put(self, picture: str, beginning: Beginning) -> None:
        """Keep this in place of what was kept of the picture, if the limit and the free RAM have room for it."""
        self._kept.pop(picture, None)
        if beginning.size > min(LIMIT, comfy.model_management.get_free_memory(_CPU)):
            return
        self._kept[picture] = beginning
        while self.size > LIMIT:
            self._kept.popitem(last=False)

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(beginning.size for beginning in self._kept.values())

    def _left(self, unpatch_all: bool) -> None:
        """The model has left its device: "Unload models", or because room was needed there.

        Without `unpatch_all` ComfyUI only lists it anew, as it does at each use.
        """
        if unpatch_all and (self._on_cpu or get_executing_context() is None or self._ram_is_short()):
            self._kept.clear()

    def _ram_is_short(self) -> bool:
        return comfy.model_management.get_free_memory(_CPU) < 2 * self.size
