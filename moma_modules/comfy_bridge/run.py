"""One sampling run: its state, and the wrappers through which ComfyUI's sampling reaches it.

`outer_sample` makes a fresh `RunState` for every run and drops it at the end, also after an interrupt or an error.
It travels in the run's own copy of the transformer options; nothing is kept on the model, in a module or in a patch.
"""

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor

from .attention import FORWARD
from .compilation import Compilation, take_compilation
from .conditioning import Rows, attach_rows, subjects_in, take_rows
from .editor import only_looking, show_text
from .evaluation import Evaluation
from .forward import Forward, SubjectRun
from .image_tokens import ImageTokenLayers, image_token_layers
from .live_mask import Film, LiveMask
from .neighbours import check_neighbours
from .placing import Placing
from .reference import reference_keys_values
from .reference_cache import KeysValues
from .run_log import FinishedRun
from .schedule import Gates
from .settings import KEY, Settings, SubjectSettings
from .slots import fill_slots
from .whereabouts import TILES, Whereabouts


class RunState:
    """What one run has computed so far. A class, so that ComfyUI's copies of the options share it.

    Attributes:
        subjects: Set when sampling starts.
        masks: [S, B, H, W] in 0..1 after the last evaluation; None before the first one has ended.
        film: How the masks evolved.
    """

    def __init__(self, settings: Settings, compilation: Compilation | None, placing: Placing) -> None:
        self.settings = settings
        self.placing = placing
        self.compilation = compilation
        self.subjects: tuple[SubjectRun, ...] = ()
        self.masks: Tensor | None = None
        self.film = Film()
        self._live: list[LiveMask | None] = []
        self._blind = False
        self._collecting = False
        self._found: list[bool] = []
        self._gates: tuple[Gates, ...] = ()
        self._evaluation: Evaluation | None = None
        self._patches: Any = None
        self._canvas: tuple[int, int, int] = (0, 0, 0)

    def prepare(self, guider: Any, model_options: dict[str, Any], noise: Tensor) -> None:
        """With the model loaded and the prompts processed: mark the rows, run the reference passes."""
        keys = [entry.subject.key for entry in self.settings.subjects]
        self._canvas = (noise.shape[0], *noise.shape[-2:])
        self._found = subjects_in(guider.conds, keys)
        self.placing.prepare(guider.conds, self.settings, noise)
        self.masks = self.placing.masks_before(keys, self._canvas, noise.device)
        for entry, found in zip(self.settings.subjects, self._found, strict=True):
            if not found and self.placing.where.kind != TILES:
                logging.warning(
                    f"MoMA: no positive prompt of this run knows where the subject {entry.subject.word!r} is, so its "
                    "features reach the whole picture. Encode it with MoMA Text Encode, or add MoMA Mark Subject."
                )
        attach_rows(guider.conds, keys, noise)
        options = model_options["transformer_options"]
        self._live = [_live_mask(entry) for entry in self.settings.subjects]
        show_text(f"MoMA looks at the reference: {', '.join(entry.subject.word for entry in self.settings.subjects)}")
        where = self.placing.where
        self.subjects = tuple(_subject_run(entry, guider, options, noise, where) for entry in self.settings.subjects)
        sampling = guider.inner_model.model_sampling
        self._gates = tuple(Gates.of(entry, sampling) for entry in self.settings.subjects)
        show_text("MoMA: sampling")

    def begin_evaluation(self, model_options: dict[str, Any], device: torch.device) -> None:
        """A guider starts to evaluate its prompts at one noise level."""
        self._patches = _replacements(model_options)
        self._evaluation = Evaluation(len(self.subjects), self._canvas, device) if any(self._found) else None

    def end_evaluation(self) -> None:
        """The maps that came together become the masks of the next evaluation."""
        if self._evaluation is not None and self._evaluation.has_maps:
            self.masks = self._evaluation.masks(self.masks)
            self._look(self.masks)
        self._evaluation = None
        self._patches = None

    def begin_call(self, model_options: dict[str, Any]) -> None:
        """A batch of prompts is evaluated; extra calls by PAG or skip-layer guidance come with other patches."""
        # The options themselves may be a copy: AnimateDiff-Evolved makes one for every evaluation.
        self._collecting = self._evaluation is not None and _replacements(model_options) is self._patches

    def end_call(self) -> None:
        """The batch is done."""
        if self._collecting and self._evaluation is not None:
            self._evaluation.end_call()
        self._collecting = False

    def unknown_rows(self, x: Tensor) -> Rows | None:
        """For a conditioning that another node made during the run: negative rows, if they have the run's size.

        The deprecated Perp-Neg node does so with its empty prompt.
        """
        batch, height, width = self._canvas
        if x.shape[0] % batch or x.shape[-2:] != (height, width):
            return None
        pixels = torch.arange(batch * height * width, device=x.device).view(batch, 1, height, width)
        return Rows(
            tokens=torch.zeros(x.shape[0], len(self.subjects), 1, device=x.device),
            positive=torch.zeros(x.shape[0], dtype=torch.int64, device=x.device),
            pixels=pixels.repeat(x.shape[0] // batch, 1, 1, 1),
        )

    def forward(self, rows: Rows, x: Tensor, sigma: Tensor | None) -> Forward:
        """What the layers of one UNet forward need."""
        compiled = self.compilation is not None and self.compilation.active
        factors = [self._factors(i, sigma, x.device) for i in range(len(self.subjects))]
        return Forward(
            subjects=self.subjects,
            rows=rows,
            cross_factors=tuple(cross for cross, _ in factors),
            self_factors=tuple(own for _, own in factors),
            size=(x.shape[-2], x.shape[-1]),
            collecting=self._collecting,
            selecting=x.device.type == "cpu" and not compiled,
        )

    def finish_forward(self, forward: Forward) -> None:
        """Put the forward's maps in their places on the canvas."""
        maps = forward.mean_map()
        if maps is not None and self._evaluation is not None:
            self._evaluation.add(maps, forward.rows)

    def log(self, samples: Tensor) -> None:
        """Write the masks of the run that returned `samples` into the log of each subject."""
        if not self.subjects:
            return  # nothing was sampled
        subjects = [run.settings.subject for run in self.subjects]
        masks = torch.stack(
            [
                self.masks[i].cpu() if self.masks is not None and found else torch.ones(self._canvas)
                for i, found in enumerate(self._found)
            ]
        )
        keys = tuple(subject.key for subject in subjects)
        run = FinishedRun.of(keys, masks, self.film.count, self.film.frames)
        for subject in subjects:
            subject.runs.record(samples, run)
        self.placing.end(samples, dict(zip(keys, run.masks, strict=True)), self.film.count)

    def clear(self) -> None:
        """Let go of everything on the device."""
        self.subjects, self.masks, self._evaluation, self._patches = (), None, None, None
        self.film = Film()

    def _look(self, masks: Tensor) -> None:
        if self._blind:
            return
        self._blind = True  # a look that fails once is not tried again
        with only_looking("showing the subject mask"):
            self.film.add(masks)
            for live, mask, found in zip(self._live, masks, self._found, strict=True):
                if live is not None and found:
                    live.show(mask)
            self._blind = False

    def _factors(self, i: int, sigma: Tensor | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        run, gate = self.subjects[i], self._gates[i]
        mask = torch.ones(self._canvas, device=device)
        if self.masks is not None and self._found[i]:
            mask = self.masks[i]
        image_tokens, shortcut = run.settings.image_tokens, run.settings.shortcut
        cross = own = None
        if image_tokens is not None and image_tokens.weight != 0:
            cross = gate.cross.apply(_times(mask * image_tokens.weight, run.cross_area), sigma)
        if shortcut is not None and shortcut.strength != 0:
            own = gate.shortcut.apply(_times(mask * shortcut.strength, run.self_area), sigma)
        return cross, own


def _live_mask(entry: SubjectSettings) -> LiveMask | None:
    part = entry.image_tokens
    return LiveMask(part.show_on) if part is not None and part.show_on is not None else None


def _subject_run(
    entry: SubjectSettings, guider: Any, options: dict[str, Any], noise: Tensor, where: Whereabouts
) -> SubjectRun:
    model, key = guider.inner_model, entry.subject.key
    image_tokens, shortcut = entry.image_tokens, entry.shortcut
    tokens: ImageTokenLayers | None = None
    reference: KeysValues = {}
    if image_tokens is not None and image_tokens.weight != 0 and not where.is_out(image_tokens, key):
        tokens = image_token_layers(entry, noise.device, model.get_dtype_inference())
    if shortcut is not None and shortcut.strength != 0 and not where.is_out(shortcut, key):
        reference = reference_keys_values(guider, entry, shortcut, options, noise.device)
    return SubjectRun(
        settings=entry,
        image_tokens=tokens,
        reference=reference,
        cross_area=where.area(image_tokens, key, noise),
        self_area=where.area(shortcut, key, noise),
    )


def _times(mask: Tensor, area: Tensor | None) -> Tensor:
    return mask if area is None else mask * area


def outer_sample(
    executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args: Any, **kwargs: Any
) -> Any:
    """OUTER_SAMPLE: gives the run its state, and logs the masks of a run that ended well."""
    guider = executor.class_obj
    settings = guider.model_patcher.get_attachment(KEY)
    original = guider.model_options
    check_neighbours(guider.model_patcher, settings, original["transformer_options"])
    guider.model_options = comfy.model_patcher.create_model_options_clone(original)
    options = guider.model_options["transformer_options"]
    fill_slots(options, settings.has_shortcut)
    placing = Placing(settings, latent_image, sigmas)
    options[KEY] = state = RunState(settings, take_compilation(guider.model_patcher, guider.model_options), placing)
    try:
        samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        with only_looking("keeping the masks of this run for MoMA Subject Mask"):
            state.log(samples)
        return samples
    finally:
        state.clear()
        guider.model_options = original


def sampler_sample(
    executor: Any, guider: Any, sigmas: Any, extra_args: Any, callback: Any, noise: Any, *args: Any
) -> Any:
    """SAMPLER_SAMPLE: the model is loaded and the prompts are processed; sampling is about to start."""
    model_options = extra_args["model_options"]
    state = _state(model_options)
    if state is not None:
        state.prepare(guider, model_options, noise)
    return executor(guider, sigmas, extra_args, callback, noise, *args)


def predict_noise(executor: Any, x: Any, timestep: Any, model_options: Any = None, *args: Any, **kwargs: Any) -> Any:
    """PREDICT_NOISE: one evaluation of all prompts."""
    state = _state(model_options)
    if state is None:
        return executor(x, timestep, model_options, *args, **kwargs)
    state.begin_evaluation(model_options, x.device)
    out = executor(x, timestep, model_options, *args, **kwargs)
    state.end_evaluation()
    return out


def calc_cond_batch(executor: Any, model: Any, conds: Any, x_in: Any, timestep: Any, model_options: Any) -> Any:
    """CALC_COND_BATCH: the evaluation itself, or an extra call by a guidance node within it."""
    state = _state(model_options)
    if state is None:
        return executor(model, conds, x_in, timestep, model_options)
    state.begin_call(model_options)
    try:
        return executor(model, conds, x_in, timestep, model_options)
    finally:
        state.end_call()


def apply_model(
    executor: Any,
    x: Any,
    t: Any,
    c_concat: Any,
    c_crossattn: Any,
    control: Any,
    transformer_options: Any,
    **kwargs: Any,
) -> Any:
    """APPLY_MODEL: one forward of the UNet over some rows."""
    rows = take_rows(kwargs)
    state = transformer_options.get(KEY)
    if rows is None and state is not None:
        rows = state.unknown_rows(x)
    if rows is None or state is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    if (rows.pixels.shape[0], *rows.pixels.shape[-2:]) != (x.shape[0], *x.shape[-2:]):
        raise ValueError(
            f"MoMA: another node changed the model's input to {tuple(x.shape)}, where {rows.pixels.shape[0]} rows of "
            f"{rows.pixels.shape[-2]}x{rows.pixels.shape[-1]} were expected. Nodes that cut the picture into tiles do "
            "that; remove them from this model."
        )

    def run(model: Callable[..., Any]) -> Any:
        forward = state.forward(rows, x, transformer_options.get("sigmas"))
        out = model(x, t, c_concat, c_crossattn, control, {**transformer_options, FORWARD: forward}, **kwargs)
        state.finish_forward(forward)
        return out

    return run(executor) if state.compilation is None else state.compilation.run(run, executor)


def _replacements(model_options: dict[str, Any]) -> Any:
    return model_options["transformer_options"].get("patches_replace")


def _state(model_options: dict[str, Any] | None) -> RunState | None:
    return (model_options or {}).get("transformer_options", {}).get(KEY)
