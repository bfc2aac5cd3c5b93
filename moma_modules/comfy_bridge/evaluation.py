"""The attention maps of one evaluation of all prompts, and the subject masks made of them."""

import torch
from torch import Tensor

from ..subject_mask import subject_mask
from .conditioning import Rows


class Evaluation:
    """Attention maps of one evaluation, gathered on a canvas [S, 2, B * H * W] (negative, positive).

    `cut_short`: a forward came to some layers only (caches of the first block do that), so there are no masks.

    Guidance nodes (SAG) may evaluate a changed latent again with the same options: the first call to reach a place on
    the canvas counts.
    """

    def __init__(self, subjects: int, canvas: tuple[int, int, int], device: torch.device) -> None:
        self.canvas = canvas
        self.sums = torch.zeros(subjects, 2, canvas[0] * canvas[1] * canvas[2], device=device)
        self.counts = torch.zeros_like(self.sums)
        self.has_maps = False
        self.cut_short = False
        self._call_sums = torch.zeros_like(self.sums)
        self._call_counts = torch.zeros_like(self.sums)

    def add(self, maps: Tensor, rows: Rows) -> None:
        """Put the maps [R, S, h, w] of a forward's rows in their places."""
        known = rows.tokens.amax(dim=2).to(maps.dtype)[..., None, None].expand_as(maps)
        places = (rows.positive.view(-1, 1, 1, 1) * self.sums.shape[2] + rows.pixels).flatten()
        for canvas, values in ((self._call_sums, maps * known), (self._call_counts, known)):
            canvas.view(canvas.shape[0], -1).index_add_(1, places, values.transpose(0, 1).flatten(1))
        self.has_maps = True

    def end_call(self) -> None:
        """Keep what the call added where nothing was yet."""
        new = self.counts == 0
        self.sums += torch.where(new, self._call_sums, 0.0)
        self.counts += torch.where(new, self._call_counts, 0.0)
        self._call_sums.zero_()
        self._call_counts.zero_()

    def masks(self, previous: Tensor | None) -> Tensor:
        """[S, B, H, W]; where no positive row knew a subject of an image (timestep ranges), its mask stays."""
        subjects, (batch, height, width) = self.sums.shape[0], self.canvas
        by_image = (subjects, 2, batch, height * width)
        maps = (self.sums / self.counts.clamp(min=1)).view(by_image).transpose(1, 2)
        covered = (self.counts > 0).view(by_image).transpose(1, 2)
        found = subject_mask(maps, covered)
        before = torch.ones_like(found) if previous is None else previous.view_as(found)
        known = covered[:, :, 1].any(dim=-1, keepdim=True)
        return torch.where(known, found, before).view(subjects, batch, height, width)
