"""Tables made of folders: DreamBench's subjects and prompts as rows of a run, pictures as rows whose masks are made.

DreamBench (github.com/google/dreambooth, `dataset/`): a folder of pictures for each subject, and
`prompts_and_classes.txt` with the class of each and two lists of 25 prompts, for objects and for live subjects.
"""

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .results import write_whole
from .table import TableError, seeds

LISTS = "prompts_and_classes.txt"
LIVE = ("cat", "dog")
"""The classes of DreamBench whose prompts are those for live subjects."""
REMOVER = Path(__file__).with_name("remove_background.json")
"""A workflow of ComfyUI's own background removal: a picture in, its mask out."""
_PICTURES = (".jpg", ".jpeg", ".png", ".webp")
_BESIDE = "_mask"


@dataclass(frozen=True)
class Lists:
    """What `prompts_and_classes.txt` says.

    Attributes:
        classes: Of each subject.
        objects, live: Prompts, `{1}` in them for the class.
    """

    classes: dict[str, str]
    objects: list[str]
    live: list[str]

    def prompts(self, kind: str) -> list[str]:
        """The prompts for a subject of this class."""
        return self.live if kind in LIVE else self.objects


def read_lists(folder: Path) -> Lists:
    """Read it.

    Raises:
        TableError: It is not there, or not of this form.
    """
    path = folder / LISTS
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TableError(f"{folder} is no DreamBench folder: {LISTS} cannot be read ({error}).") from error
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"object": [], "live": []}
    part = ""
    for line in map(str.strip, lines):
        if line.startswith(("Classes", "Object Prompts", "Live Subject Prompts")):
            part = line.split()[0].lower()
        elif found := re.match(r"""(['"])(.*)\1\.format\(""", line):
            prompts.setdefault(part, []).append(found[2])
        elif part == "classes" and "," in line and line != "subject_name,class":
            name, _, kind = line.partition(",")
            classes[name.strip()] = kind.strip()
    if not classes or not prompts["object"]:
        raise TableError(
            f"{path} is not of DreamBench's form: a part `Classes` with lines `subject,class`, parts `Object Prompts` "
            "and `Live Subject Prompts` with lines such as 'a {0} {1} in the snow'.format(unique_token, class_token),"
        )
    return Lists(classes, prompts["object"], prompts["live"] or prompts["object"])


def prompt_class(template: str) -> str:
    """What a prompt asks for, in the paper's words."""
    before, _, after = template.partition("{0}")
    if before.split()[1:]:
        return "property modification"
    return "accessorization" if re.search(r"\b(wearing|outfit)\b", after) else "recontextualization"


def dreambench(folder: Path, out: Path, seed: str, masks: Path | None, every: bool, without: bool) -> tuple[int, int]:
    """Write a table of every subject with every prompt; how many rows, of how many subjects.

    Args:
        seed: The cell of each row.
        masks: A folder with `SUBJECT/PICTURE.png`; else masks lie beside the pictures as `PICTURE_mask.png`.
        every: Every picture of a subject is a reference, not the first alone.
        without: Do without masks.

    Raises:
        TableError: The folder is not of DreamBench's form, or a mask is missing.
    """
    seeds(seed)
    lists = read_lists(folder)
    rows, lacking, subjects = [], [], 0
    for name, kind in lists.classes.items():
        pictures = _pictures(folder / name)
        if not pictures:
            raise TableError(f"{folder / name} has no picture, but {LISTS} names the subject {name!r}.")
        subjects += 1
        for picture in pictures if every else pictures[:1]:
            mask = _mask(picture, masks / name if masks else None)
            if mask is None and not _has_alpha(picture) and not without:
                lacking.append(picture)
            for number, template in enumerate(lists.prompts(kind), 1):
                prompt = " ".join(template.format("", kind).split())
                row_id = f"{name}/{picture.stem}_{number:02}" if every else f"{name}/{number:02}"
                cells = [row_id, _named(picture, out), "" if mask is None else _named(mask, out), kind, prompt, seed]
                rows.append([*cells, name, prompt_class(template)])
    if lacking:
        raise TableError(
            f"{len(lacking)} pictures have no mask, the first is {lacking[0]}. Put {lacking[0].stem}{_BESIDE}.png "
            f"beside it, or name a folder with {lacking[0].parent.name}/{lacking[0].stem}.png by --masks; --no-masks "
            "takes the whole pictures. ComfyUI's background removal makes masks: `moma_batch table masks "
            f"{folder} --out masks.csv --model NAME`, then `moma_batch run masks.csv --workflow {REMOVER} "
            "--out masks`, then --masks masks/images."
        )
    heads = ("id", "image", "mask", "subject", "prompt", "seed", "note.subject", "note.class")
    _write(out, heads, rows)
    return len(rows), subjects


def mask_table(folder: Path, out: Path, model: str) -> int:
    """Write a table for `REMOVER` of all pictures below a folder that have no mask beside them; how many.

    Args:
        model: The file in ComfyUI's `models/background_removal`.

    Raises:
        TableError: There are no pictures.
    """
    rows = []
    for picture in sorted(path for path in folder.rglob("*") if path.suffix.lower() in _PICTURES):
        if not picture.stem.endswith(_BESIDE) and "~" not in picture.stem and _mask(picture, None) is None:
            name = picture.relative_to(folder).with_suffix("").as_posix()
            rows.append([name, _named(picture, out), model])
    if not rows:
        raise TableError(f"{folder} has no pictures without masks.")
    _write(out, ("id", "image", "set.1.bg_removal_name"), rows)
    return len(rows)


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    return sorted(path for path in found if not path.stem.endswith(_BESIDE))


def _mask(picture: Path, folder: Path | None) -> Path | None:
    path = folder / f"{picture.stem}.png" if folder else picture.with_name(f"{picture.stem}{_BESIDE}.png")
    return path if path.is_file() else None


def _has_alpha(picture: Path) -> bool:
    """Whether it is a PNG with an alpha channel."""
    with picture.open("rb") as file:
        head = file.read(26)
    return head.startswith(b"\x89PNG") and len(head) == 26 and head[25] in (4, 6)


def _named(path: Path, out: Path) -> str:
    """As the table names it: by its place below the table's folder, else from the root on."""
    place, home = path.resolve(), out.resolve().parent
    return os.fspath(place.relative_to(home).as_posix() if place.is_relative_to(home) else place)


def outside(folder: Path, out: Path) -> Iterator[str]:
    """What a run of the table needs besides, if the folder does not lie below the table's."""
    if not folder.resolve().is_relative_to(out.resolve().parent):
        yield f"--inputs {folder.resolve()}"


def _write(out: Path, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerows([heads, *rows])
    write_whole(out, text.getvalue().encode())
