"""One process of the benchmark: measures some cases with ComfyUI and writes what it found as JSON.

`run.py` starts it, with ComfyUI's Python and the folders benchmarks and scripts on the path.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from comfyui_source import add_workbench

add_workbench()
from workbench.bootstrap import bootstrap, comfyui_path


def start_comfyui() -> None:
    """Import ComfyUI with its PyTorch attention (on CPUs its default is a slower one), and the pack."""
    sys.path.insert(0, str(comfyui_path()))
    from comfy.cli_args import args

    args.use_pytorch_cross_attention = True
    bootstrap()


def measured(plan_name: str, moma_repo: Path | None, cases: list[list[str]]) -> dict[str, Any]:
    """What every [part, case] gives, with the machine and the precisions that the language model can have."""
    import torch
    from comfyui_moma.nodes.loaders import LoadMllm
    from machine import machine
    from parts import PARTS
    from plan import plan_for
    from session import Session

    session = Session(plan_for(plan_name, torch.cuda.is_available()), moma_repo)
    found: dict[str, Any] = {}
    for part, case in cases:
        found.setdefault(part, {})[case] = PARTS[part].measure(session, case)
    precision = next(item for item in LoadMllm.define_schema().inputs if item.id == "precision")
    precisions = [name for name in precision.options if name != "auto"]
    return {"machine": machine(session.dtype), "precisions": precisions, "found": found}


def main() -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plan")
    parser.add_argument("out", type=Path)
    parser.add_argument("--moma-repo", type=Path)
    parser.add_argument("--case", nargs=2, action="append", default=[], metavar=("PART", "CASE"))
    options = parser.parse_args()
    start_comfyui()
    options.out.write_text(json.dumps(measured(options.plan, options.moma_repo, options.case)), encoding="utf-8")


if __name__ == "__main__":
    main()
