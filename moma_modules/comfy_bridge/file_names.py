"""Names for new files that a graph gives: inside their folder, and possible on every system."""

import re

SUFFIX = ".safetensors"
LONGEST = 200
"""Bytes of a name; systems allow 255, and a number and suffixes come on top."""

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]')
_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[\d¹²³]|LPT[\d¹²³])", re.IGNORECASE)


def check_new_name(input_name: str, name: str, root: str) -> None:
    """Check that a name is a file name, with subfolders if wanted, that every system can have.

    Args:
        input_name: The node's input that the message names.
        root: The folder that the file is to be in, for the message.

    Raises:
        ValueError: Naming the input, what is wrong with it and what to do.
    """
    *folders, last = portable(name).split("/")
    problem = None
    if not last.strip():
        problem = "ends without a name"
    elif folders[:1] == [""]:
        problem = f"is an absolute path; the file goes below {root} only"
    elif ".." in (*folders, last):
        problem = f"leads out of its folder with '..'; the file goes below {root} only"
    else:
        problem = next(filter(None, map(_problem, [*folders, f"{last}{SUFFIX}"])), None)
    if problem:
        raise ValueError(f"{input_name} {name[:80]!r} {problem}. Give a name such as 'cup' or 'cars/red'.")


def portable(name: str) -> str:
    """One spelling on every system, so that a workflow saved on Windows finds its files elsewhere, and back."""
    return name.strip().replace("\\", "/")


def _problem(part: str) -> str | None:
    """What keeps some system from having a file or folder of this name."""
    if found := _FORBIDDEN.search(part):
        return f"holds {found[0]!r}, which not every system allows in a file name"
    if not part.rstrip(". "):
        return f"has the folder name {part!r}"
    if part != part.rstrip(". "):
        return f"has the folder name {part!r}, which ends in a dot or space"
    if _DEVICES.fullmatch(part.split(".")[0].rstrip()):
        return f"has the name {part.removesuffix(SUFFIX)!r}, which is a device on Windows"
    if len(part.encode()) > LONGEST:
        return f"has a name of {len(part.encode())} bytes; at most {LONGEST} are possible"
    return None
