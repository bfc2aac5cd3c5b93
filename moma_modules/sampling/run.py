"""One sampling run: what it has computed so far."""

from typing import Any

import torch
from torch import Tensor

from ..host.messages import only_looking, show_text
from ..subject.run_log import FinishedRun
from .compilation import Compilation
from .features import SubjectRun, subject_run
from .forward import Forward
from .guard import Guard
from .live_mask import Film, LiveMask
from .patching import same_patches
from .placing import Placing
from .rows import Rows, attach_rows, subjects_in
from .settings import Gates, Settings, SubjectSettings
from .subject_mask import EvaluationMaps


class RunState:
    """What one run has computed so far. A class, so that ComfyUI's copies of the options share it.

    Attributes:
        subjects: Set when sampling starts.
        masks: [S, B, H, W] in 0..1 after the last evaluation; None before the first one has ended.
        film: How the masks evolved.
        guard: Sees to it that the run stays with MoMA.
    """

    def __init__(self, settings: Settings, guard: Guard, compilation: Compilation | None, placing: Placing) -> None:
        self.settings = settings
        self.placing = placing
        self.compilation = compilation
        self.guard = guard
        self.subjects: tuple[SubjectRun, ...] = ()
        self.masks: Tensor | None = None
        self.film = Film()
        self._live: list[LiveMask | None] = []
        self._blind = False
        self._collecting = False
        self._found: list[bool] = []
        self._gates: tuple[Gates, ...] = ()
        self._evaluation: EvaluationMaps | None = None
        self._options: dict[str, Any] = {}
        self._canvas: tuple[int, int, int] = (0, 0, 0)

    def __deepcopy__(self, _: Any) -> "RunState":
        """Nodes that copy a run's options deeply are still in the same run."""
        return self

    def prepare(self, guider: Any, model_options: dict[str, Any], noise: Tensor) -> None:
        """With the model loaded and the prompts processed: mark the rows, run the reference passes."""
        self.guard.prepare(guider, model_options, noise)
        keys = [entry.subject.key for entry in self.settings.subjects]
        self._canvas = (noise.shape[0], *noise.shape[-2:])
        self._found = subjects_in(guider.conds, keys)
        self.placing.prepare(guider.conds, self.settings, noise)
        self.masks = self.placing.masks_before(keys, self._canvas, noise.device)
        attach_rows(guider.conds, keys, noise)
        options = model_options["transformer_options"]
        self._live = [_live_mask(entry) for entry in self.settings.subjects]
        show_text(f"MoMA looks at the reference: {', '.join(entry.subject.word for entry in self.settings.subjects)}")
        where = self.placing.where
        self.subjects = tuple(subject_run(entry, guider, options, noise, where) for entry in self.settings.subjects)
        sampling = guider.inner_model.model_sampling
        self._gates = tuple(Gates.of(entry, sampling) for entry in self.settings.subjects)
        self.guard.prepared = True
        show_text("MoMA: sampling")

    @property
    def seeks_subjects(self) -> bool:
        """Whether some prompt knows where a subject is, so that there are automatic masks."""
        return any(self._found)

    def begin_evaluation(self, model_options: dict[str, Any], device: torch.device) -> None:
        """A guider starts to evaluate its prompts at one noise level."""
        self.guard.evaluated = True
        self._options = model_options["transformer_options"]
        self._evaluation = EvaluationMaps(len(self.subjects), self._canvas, device) if self.seeks_subjects else None

    def end_evaluation(self) -> None:
        """The maps that came together become the masks of the next evaluation."""
        if self._evaluation is not None and self._evaluation.has_maps and not self._evaluation.cut_short:
            self.masks = self._evaluation.masks(self.masks)
            self.guard.masked = True
            self._look(self.masks)
        self._evaluation = None
        self._options = {}

    def begin_call(self, model_options: dict[str, Any]) -> None:
        """A batch of prompts is evaluated; extra calls by PAG or skip-layer guidance come with other patches."""
        # The options may be a copy: AnimateDiff-Evolved makes one for every evaluation, other guiders deep ones.
        same = same_patches(model_options["transformer_options"], self._options)
        self._collecting = self._evaluation is not None and same

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
        self.guard.say_other_prompts()
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
            x=x,
            subjects=self.subjects,
            rows=rows,
            cross_factors=tuple(cross for cross, _ in factors),
            self_factors=tuple(own for _, own in factors),
            collecting=self._collecting,
            sparse_shortcut=x.device.type == "cpu" and not compiled,
            others_on_model=self.guard.calls.others_on_model,
        )

    def finish_forward(self, forward: Forward) -> None:
        """Put the forward's maps in their places on the canvas.

        Raises:
            ValueError: See `Guard.finish_forward`.
        """
        self.guard.finish_forward(forward.passes)
        if self._evaluation is None or not self._collecting:
            return
        maps = forward.mean_map()
        if maps is not None:
            self._evaluation.add(maps, forward.rows)
        elif forward.passes.started:
            self._evaluation.cut_short = True

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
        self.subjects, self.masks, self._evaluation, self._options = (), None, None, {}
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


def _times(mask: Tensor, area: Tensor | None) -> Tensor:
    return mask if area is None else mask * area
