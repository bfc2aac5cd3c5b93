"""The results as a table, and the tables of README and docs/performance.md: `python3 benchmarks/table.py`."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
README, DOCUMENT = ROOT / "README.md", ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks/table.py: begin -->", "<!-- benchmarks/table.py: end -->"
_FEW = {
    "step": (", both", ", the released MoMA code"),
    "run": (", next picture",),
    "memory": (", both: peak of sampling",),
    "leak": ("",),
}
"""How the rows of README end, by part."""

Results = dict[str, Any]


class Row(NamedTuple):
    """One figure beside its baseline.

    Attributes:
        part: Name of the part.
        what: What was measured.
        baseline: The baseline's name and value.
        ratio: How many times the baseline; empty for the baseline's own kind of figure.
        spread: Lowest and highest ratio of a round.
    """

    part: str
    what: str
    baseline: str
    ratio: str
    spread: str


Wanted = Callable[[Row], bool]
"""Whether a figure is shown."""

_HEAD = Row("part", "what", "baseline", "times the baseline", "lowest to highest")


def rows(results: Results) -> list[Row]:
    """All figures of a results file."""
    return [row for part, make in NAMES.items() if part in results for row in make(results[part])]


def text_table(found: list[Row]) -> str:
    """Columns of equal width."""
    lines = [_HEAD, *found]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def is_in_readme(row: Row) -> bool:
    """Whether a figure is one of the few that README shows."""
    return row.what.endswith(_FEW.get(row.part, ()))


def markdown(results: Results, wanted: Wanted) -> str:
    """The section for one results file: the machine, then a table of some figures."""
    machine = results["machine"]
    device = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    intro = (
        f"{device}; {machine['dtype']}, {machine['attention']} attention, torch {machine['torch']}, "
        f"ComfyUI {machine['comfyui']}."
    )
    lines = [_HEAD, Row(*["---"] * len(_HEAD)), *filter(wanted, rows(results))]
    return "\n".join([intro, "", *(f"| {' | '.join(line)} |" for line in lines)])


def section(wanted: Wanted) -> str:
    """What a document holds between the marks: one table per results file."""
    files = sorted(RESULTS.glob("*.json"))
    return "\n\n".join(markdown(json.loads(path.read_text(encoding="utf-8")), wanted) for path in files)


def with_section(text: str, wanted: Wanted) -> str:
    """`text` with the section renewed.

    Raises:
        ValueError: The marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"The text has no place for the table: lines {BEGIN} and {END}.")
    return f"{before}{BEGIN}\n{section(wanted)}\n{END}{after}"


def _ratio_rows(part: str, group: Results, baseline: str, names: dict[str, str], title: str) -> Iterator[Row]:
    value = f"{baseline}: {_seconds(group[f'{baseline}_s'])}"
    for name, label in names.items():
        if name in group:
            low, high = group["spread"][name]
            yield Row(part, f"{title}, {label}", value, _times(group[name]), f"{_times(low)} to {_times(high)}")


def _step(found: Results) -> Iterator[Row]:
    names = {
        "apply": "Apply MoMA Adapter",
        "shortcut": "Self-Attn Shortcut",
        "both": "both",
        "ipadapter": "an image adapter with as many tokens",
        "released": "the released MoMA code",
        "released_plain": "diffusers without it",
    }
    yield from _ratio_rows("step", found, "plain", names, _pixels(found["latent"]))
    value = f"plain: {_mib(found['memory']['plain_mb'])}"
    for name, label in names.items():
        if name in found["memory"]:
            what = f"{_pixels(found['latent'])}, {label}: memory of a step"
            yield Row("step", what, value, _times(found["memory"][name]), "")


def _run(found: Results) -> Iterator[Row]:
    names = {"first": "first picture of a subject", "next": "next picture"}
    yield from _ratio_rows("run", found, "plain", names, f"{_pixels(found['latent'])}, {found['steps']} steps")


def _scaling(found: Results) -> Iterator[Row]:
    for title, group in found.items():
        names = {name: name for name in group["memory"] if name != "plain_mb"}
        yield from _ratio_rows("scaling", group, "plain", names, title)
        value = f"plain: {_mib(group['memory']['plain_mb'])}"
        for name in names:
            yield Row("scaling", f"{title}, {name}: memory of a step", value, _times(group["memory"][name]), "")


def _share(found: Results) -> Iterator[Row]:
    for title, group in found.items():
        names = {name: name for name in group["spread"] if name != "plain_s"}
        yield from _ratio_rows("share", group, "plain", names, title)


def _compile(found: Results) -> Iterator[Row]:
    names = {"both_compiled": "both, compiled", "plain": "plain, not compiled", "both": "both, not compiled"}
    title = f"{_pixels(found['latent'])}, TorchCompileModel"
    for row in _ratio_rows("compile", found, "plain_compiled", names, title):
        yield row._replace(baseline=f"plain, compiled: {_seconds(found['plain_compiled_s'])}")
    graphs = found["graphs"]
    first = f"the two models: {graphs['first']}"
    yield Row("compile", f"{title}: graphs compiled after the first step", first, str(graphs["later"]), "")


def _mllm(found: Results) -> Iterator[Row]:
    labels = {"load_s": "loading", "forward_s": "a first look", "peak_mb": "peak memory"}
    further = {  # results from before these were measured lack them
        "next_prompt": ("the picture's next prompt", "a first look"),
        "ten_prompts": ("ten prompts at once", "a first look"),
        "next_over_casting": ("the picture's next prompt", "casting all weights once"),
    }
    yield from _mllm_files(found.get("files", {}))
    for size, figures in found.items():
        if size == "files":
            continue
        if size != "small":  # whose products are too short to be what a look takes
            for precision, seconds in figures["arithmetic_s"].items():
                value = f"its matrix products alone: {_seconds(seconds)}"
                ratio = figures["forward_over_arithmetic"][precision]
                yield Row("mllm", f"{size} model, {precision}: a first look", value, _times(ratio), "")
            for figure, (what, baseline) in further.items():
                for precision, ratio in figures.get(figure, {}).items():
                    yield Row("mllm", f"{size} model, {precision}: {what}", baseline, _times(ratio), "")
        for figure in (name for name in labels if name in figures):
            values = dict(figures[figure])
            base = values.pop("fp32")
            shown = f"fp32: {_mib(base) if figure == 'peak_mb' else _seconds(base)}"
            for precision, ratio in values.items():
                yield Row("mllm", f"{size} model, {precision}: {labels[figure]}", shown, _times(ratio), "")


def _mllm_files(found: Results) -> Iterator[Row]:
    labels = {"warm_s": "to the first hidden state, in memory", "next_s": "the next prompt", "peak_mb": "peak memory"}
    for form, figures in found.items():
        if form == "layers":
            continue
        title = f"{found['layers']} layers, {form} file"
        if "cold_s" in figures:
            warm = f"in memory: {_seconds(figures['warm_s'])}"
            ratio = _times(figures["cold_s"] / figures["warm_s"])
            yield Row("mllm", f"{title}: to the first hidden state, from the disk", warm, ratio, "")
        for figure, label in labels.items() if form != "bf16" else ():
            base = found["bf16"][figure]
            shown = f"bf16 file: {_mib(base) if figure == 'peak_mb' else _seconds(base)}"
            yield Row("mllm", f"{title}: {label}", shown, _times(figures[figure] / base), "")


def _memory(found: Results) -> Iterator[Row]:
    labels = {"sampling_mb": "in use while sampling", "peak_sampling_mb": "peak of sampling", "peak_mb": "peak"}
    for figure, label in labels.items():
        values = dict(found[figure])
        base = values.pop("plain")
        for case, ratio in values.items():
            yield Row("memory", f"whole graph, {case}: {label}", f"plain: {_mib(base)}", _times(ratio), "")


def _leak(found: Results) -> Iterator[Row]:
    growth = f"{found['moma_kb_per_run']:+.1f} KiB a run"
    yield Row("leak", f"growth over {found['runs']} runs", f"plain: {found['plain_kb_per_run']:+.1f} KiB", growth, "")


def _times(value: float) -> str:
    return f"{value:.3f}"


def _seconds(value: float) -> str:
    return f"{value:.3f} s" if value < 1 else f"{value:.2f} s"


def _mib(value: float) -> str:
    return f"{value:.0f} MiB"


def _pixels(latent: list[int]) -> str:
    return f"{8 * latent[1]}x{8 * latent[0]}"


NAMES: dict[str, Callable[[Results], Iterator[Row]]] = {
    "step": _step,
    "run": _run,
    "scaling": _scaling,
    "share": _share,
    "compile": _compile,
    "mllm": _mllm,
    "memory": _memory,
    "leak": _leak,
}
"""The parts in their order, and how each becomes rows."""

DOCUMENTS: dict[Path, Wanted] = {README: is_in_readme, DOCUMENT: lambda _: True}
"""Where the tables are, and which figures each shows."""


def main() -> None:
    """Renew the sections."""
    for path, wanted in DOCUMENTS.items():
        path.write_text(with_section(path.read_text(encoding="utf-8"), wanted), encoding="utf-8")


if __name__ == "__main__":
    main()
