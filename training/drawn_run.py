"""Pictures that the product drew in this process, as the folder of a finished run."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.utils import save_image

from ..moma_batch.workflow import SMALL_WORLD
from .drawn import SmallWorld
from .probe import Probe


class DrawnRun:
    """A run's folder in the making: table, pictures, results, and masks where the probe sees the subjects.

    Attributes:
        folder: The run's.
        masks: A mask for each picture, the same way for every setting, also for those in which MoMA finds none.
    """

    def __init__(self, folder: Path, probe: Probe) -> None:
        """An empty run."""
        self.folder, self.masks = folder, folder.parent / "masks"
        self._probe = probe
        self._rows: list[dict[str, str]] = []
        self._results: list[dict[str, str]] = []

    def add(
        self,
        world: SmallWorld,
        number: int,
        asked: tuple[str | None, str | None],
        pictures: Tensor,
        numbers: dict[str, str],
        notes: dict[str, str],
    ) -> None:
        """Pictures of a subject [seeds, 3, H, W] in -1..1 as rows, one for each seed.

        Args:
            asked: Place and material.
            numbers: Strength and weight.
            notes: Become columns `note.NAME`.
        """
        image, mask = f"{number}.png", f"{number}_mask.png"
        if not (self.folder.parent / image).is_file():
            picture, covered = world.shown(number)
            save_image((picture + 1) / 2, self._made(self.folder.parent / image))
            save_image(covered.float()[None], self.folder.parent / mask)
        with torch.inference_mode():
            seen = (self._probe(pictures).masks > 0).float()[:, None]
        seen = interpolate(seen, size=pictures.shape[-2:])
        for seed, picture in enumerate(pictures):
            name = f"{len(self._rows):05}"
            path = self._made(self.folder / "images" / f"{name}.png")
            save_image((picture.clamp(-1, 1) + 1) / 2, path)
            save_image(seen[seed], self._made(self.masks / f"{name}.png"))
            row = {"id": name, "image": image, "mask": mask, "prompt": world.prompt(number, *asked), "seed": str(seed)}
            self._rows.append({**row, **numbers, **{f"note.{key}": value for key, value in notes.items()}})
            result = {"id": name, "row": str(len(self._rows)), "status": "ok", "message": ""}
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            self._results.append({**result, "picture": f"images/{name}.png", "sha256": digest})

    def write(self) -> Path:
        """Write table and results; the run's folder."""
        table, workflow = self.folder.parent / "table.csv", self.folder.parent / SMALL_WORLD.name
        shutil.copyfile(SMALL_WORLD, workflow)
        for path, lines in ((table, self._rows), (self.folder / "results.csv", self._results)):
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(lines[0]))
                writer.writeheader()
                writer.writerows(lines)
        plan = {"version": 1, "run": "drawn", "table": str(table.resolve()), "workflow": str(workflow.resolve())}
        (self.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        return self.folder

    def _made(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
