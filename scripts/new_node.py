"""Begins a node: `python3 scripts/new_node.py BlurMask` makes MoMABlurMask, which runs and is complete but for its job.

Its file in nodes/, texts and help pages in four languages, rows in the documentation, a test. Says what is left to do.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from string import Template

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "new_node"
LANGUAGES = ("ja", "ko", "zh")
LEFT = """
$id works, and gives a subject on as it comes. What is left:

1. nodes/$stem.py: what it does, in moma_modules/; inputs, outputs, tooltips, words that people search it by.
2. tests/nodes/test_$stem.py: what it computes, and each of its messages. Once through the server, in tests/server/.
3. web/docs/$id.md, then locales/ and web/docs/$id/ (the tests warn of what is not translated).
4. What README and docs/architecture.md say of it; docs/comfyui_internals.md if it uses more of ComfyUI than `io`.
5. Its picture, with Chromium: python3 scripts/screenshots.py nodes
6. The contract: UPDATE_SNAPSHOT=1 python3 scripts/test.py --quick -- tests/server/test_server.py
   tests/nodes/test_contract.py then has the line for CHANGELOG.md. From the release on, id and inputs stay.
"""


def words(name: str) -> list[str]:
    """`BlurMask` as its words.

    Raises:
        ValueError: It is no name of this form.
    """
    if name.startswith("MoMA") or not re.fullmatch(r"(?:[A-Z][a-z0-9]+)+", name):
        raise ValueError(
            f"NAME: '{name}' is not of the form BlurMask. Begin each word with a capital; MoMA is put before it."
        )
    return re.findall(r"[A-Z][a-z0-9]+", name)


def insert(path: Path, after: str, line: str) -> None:
    """Put a line after the last one that begins with `after`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    place = max(i for i, known in enumerate(lines) if known.startswith(after))
    lines.insert(place + 1, line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write(path: Path, template: str, values: dict[str, str]) -> None:
    """Make a file of one of the templates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Template((TEMPLATES / template).read_text("utf-8")).substitute(values), encoding="utf-8")


def translate(values: dict[str, str]) -> None:
    """Put the node's texts into each language's, in the order of ids."""
    texts = json.loads(Template((TEMPLATES / "locales.json").read_text("utf-8")).substitute(values))
    for language in LANGUAGES:
        path = ROOT / "locales" / language / "nodeDefs.json"
        known = {**json.loads(path.read_text("utf-8")), values["id"]: texts[language]}
        ordered = dict(sorted(known.items(), key=lambda entry: entry[0].lower()))
        path.write_text(json.dumps(ordered, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def make(name: str) -> dict[str, str]:
    """Write everything; the values that the templates were filled with.

    Raises:
        ValueError: The name has not the form of one.
        FileExistsError: There is such a node.
    """
    parts = words(name)
    stem, title = "_".join(parts).lower(), " ".join(["MoMA", *parts])
    values = {"name": name, "id": f"MoMA{name}", "stem": stem, "title": title, "words": " ".join(parts).lower()}
    node, help_page = ROOT / "nodes" / f"{stem}.py", ROOT / "web" / "docs" / f"{values['id']}.md"
    for path in (node, help_page):
        if path.exists():
            raise FileExistsError(f"NAME: there is {path.relative_to(ROOT)} already. Choose another name.")
    write(node, "node.txt", values)
    write(ROOT / "tests" / "nodes" / f"test_{stem}.py", "test.txt", values)
    write(help_page, "en.md", values)
    for language in LANGUAGES:
        write(help_page.with_suffix("") / f"{language}.md", f"{language}.md", values)
    translate(values)
    listing = ROOT / "nodes" / "__init__.py"
    imports = [line for line in listing.read_text("utf-8").splitlines() if line.startswith("from .")]
    before = [line for line in imports if line < f"from .{stem} "] or ["from ..moma_modules"]
    insert(listing, before[-1], f"from .{stem} import {name}")
    insert(listing, "    ListItem", f"    {name},")
    insert(ROOT / "README.md", "| MoMA Contact Sheet", f"| {title} | Gives a subject on as it comes. |")
    insert(ROOT / "docs" / "architecture.md", "| `nodes/", f"| `nodes/{stem}.py` | A subject as it comes |")
    internals = ROOT / "docs" / "comfyui_internals.md"
    rows = [line.split(" | ")[0] for line in internals.read_text("utf-8").splitlines() if line.startswith("| `")]
    above = max(row for row in rows if row < f"| `nodes/{stem}.py`")
    insert(internals, above, f"| `nodes/{stem}.py` | `comfy_api.latest.io` | V3 node. |")
    return values


def main() -> None:
    """Read the command line, write, say what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="in one word, as in BlurMask")
    try:
        values = make(parser.parse_args().name)
    except (ValueError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    print(Template(LEFT.strip()).substitute(values))


if __name__ == "__main__":
    main()
