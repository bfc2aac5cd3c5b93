"""Sees to it that a run stays with MoMA, whatever other nodes do while it samples."""

from dataclasses import replace
from typing import Any, NoReturn

import torch
from comfy.model_management import load_models_gpu
from comfy.model_patcher import create_model_options_clone
from torch import Tensor

from ..host.messages import warn
from .forward import Passes
from .other_nodes import check_layers, check_prompts, others_on_model
from .patching import Wrappers, is_whole, put_back, unloaded_adapters
from .rows import Rows
from .settings import KEY, Settings
from .unet_calls import UnetCalls, watch


class Guard:
    """Of one run.

    Attributes:
        calls: Tells the run's own forwards from those of others.
        prepared: Whether sampling started through our wrapper.
        evaluated: Whether a guider has evaluated its prompts.
        masked: Whether an evaluation gave subject masks.
    """

    def __init__(self, settings: Settings, wrappers: Wrappers) -> None:
        self.calls = UnetCalls()
        self.prepared = self.evaluated = self.masked = False
        self._settings = settings
        self._wrappers = wrappers
        self._forwards = self._started = self._complete = self._own_complete = self._repaired = False
        self._other_text = self._other_prompts = False

    def prepare(self, guider: Any, model_options: dict[str, Any], noise: Tensor) -> None:
        """The model is loaded and the prompts are processed: look at who else is there, and that we are.

        Raises:
            ValueError: See `check_layers` and `check_prompts`.
        """
        check_layers(guider.inner_model.diffusion_model)
        check_prompts(guider.conds)
        self.calls.others_on_model = others_on_model(guider.model_patcher, model_options)
        unloaded = unloaded_adapters(guider.model_patcher, self._settings)
        if unloaded:
            patcher = guider.model_patcher
            # Together: on a tight card the adapters alone could make ComfyUI unload the UNet that is about to run.
            memory = patcher.model.memory_required([2 * noise.shape[0], *noise.shape[1:]])
            load_models_gpu([patcher, *unloaded], memory_required=memory)
        # Nothing to say of ComfyUI's deprecated Perp-Neg: it encodes its empty prompt in the run, and that is negative.
        function = model_options.get("sampler_cfg_function")
        self._other_prompts = getattr(function, "__module__", "").endswith("nodes_perpneg")

    def check_prepared(self) -> None:
        """Whether sampling started through our wrapper.

        Raises:
            ValueError: It did not.
        """
        if not self.prepared:
            self._refuse_options()

    def whole(self, state: Any, model_options: dict[str, Any] | None) -> dict[str, Any]:
        """An evaluation's model options; if another node made new ones for it, a copy that has us in it again."""
        options = (model_options or {}).get("transformer_options", {})
        if (
            model_options is not None
            and options.get(KEY) is state
            and is_whole(self._settings, options, self._wrappers)
        ):
            return model_options
        if not self._repaired:
            self._repaired = True
            warn(
                "MoMA: another node gives the model options of its own, without MoMA in them. MoMA is put back into "
                f"them.{self.calls.others_on_model}"
            )
        copy: dict[str, Any] = create_model_options_clone(model_options or {})
        options = copy.setdefault("transformer_options", {})
        options[KEY] = state
        put_back(self._settings, options, self._wrappers)
        watch(copy, self.calls)
        return copy

    def fitting(self, rows: Rows, text: Tensor | None) -> Rows:
        """The rows of a forward over a text [R, L, C]; without marks if that is not the text that was marked.

        Args:
            text: None for a model without.
        """
        if text is None or rows.tokens.shape[2] % text.shape[1] == 0:
            return rows
        if not self._other_text:
            self._other_text = True
            warn(
                "MoMA: another node gives the model other text than the prompts (ELLA does that), so MoMA cannot tell "
                "where the subject is in it, and there is no automatic subject mask. Encode the prompts with that "
                f"node, then add MoMA Mark Subject.{self.calls.others_on_model}"
            )
        return replace(rows, tokens=torch.zeros_like(rows.tokens))

    def say_other_prompts(self) -> None:
        """A conditioning that is none of the run's own, in the run's size, is taken for a negative one."""
        if not self._other_prompts:
            self._other_prompts = True
            warn(
                "MoMA: another node evaluates prompts that are not among those of the run (Dual Model CFG Guider does "
                "that with its negative prompt), so MoMA takes them for negative ones: they get no image tokens of the "
                f"subject, and no subject mask is looked for in them.{self.calls.others_on_model}"
            )

    def finish_forward(self, passes: Passes) -> None:
        """A forward of the run's own has ended.

        Raises:
            ValueError: The UNet ran and came to none of our patches, or to parts of a layer only.
        """
        passes.finish()
        if passes.started and not passes.touched and not self._complete:
            self._refuse()
        self._forwards = True
        self._started = self._started or passes.started
        self._complete = self._complete or passes.complete
        self._own_complete = self._own_complete or passes.own_complete

    def finish(self, seeks_subjects: bool) -> None:
        """The run ended well: say what did not work in it.

        Args:
            seeks_subjects: Whether there were to be automatic masks.

        Raises:
            ValueError: Sampling never came to us, or never went through the UNet.
        """
        self.check_prepared()
        if self.evaluated and not self._forwards:
            self._refuse_options()
        if self._forwards and not self._started:
            self._refuse()
        shortcuts = [entry.shortcut for entry in self._settings.subjects]
        wanted = any(shortcut is not None and shortcut.strength != 0 for shortcut in shortcuts)
        if self._complete and wanted and not self._own_complete:
            warn(
                "MoMA: no forward of this run came to MoMA's patches in all self-attention layers, so Self-Attn "
                "Shortcut did nothing there: another node replaces them while the run goes on. Remove that node, or "
                f"Self-Attn Shortcut.{self.calls.others_on_model}"
            )
        if self._complete and seeks_subjects and not self.masked:
            warn(
                "MoMA: no evaluation of this run gave a subject mask, so the features reached the whole picture: "
                "another node replaces attention layers while the run goes on, or leaves out some of them. Remove that "
                f"node.{self.calls.others_on_model}"
            )
        if self._forwards and not self._complete and seeks_subjects:
            warn(
                "MoMA: no forward of this run came to all attention layers once and in order, so there was no "
                "automatic subject mask and the features reached the whole picture: another node leaves out layers or "
                f"repeats them.{self.calls.others_on_model}"
            )

    def _refuse_options(self) -> NoReturn:
        raise ValueError(
            "MoMA: another node samples with options of its own, so that MoMA would do nothing in this run. Remove "
            f"that node, or MoMA.{self.calls.others_on_model}"
        )

    def _refuse(self) -> NoReturn:
        raise ValueError(
            "MoMA: another node runs this model without its attention layers, so that MoMA would do nothing: it "
            f"replaced the UNet or its blocks. Remove that node, or MoMA.{self.calls.others_on_model}"
        )
