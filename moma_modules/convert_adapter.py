"""Command line: convert `attn_adapters_projectors.th` to `.safetensors` (`python -m moma_modules.convert_adapter`).

The source is kept. ComfyUI reads either form; that of `.safetensors` cannot hold code.
"""

import argparse
from pathlib import Path

from .adapter.file import convert_adapter


def main() -> None:
    """Convert the file named on the command line; the source is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m moma_modules.convert_adapter", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("source", type=Path, help="attn_adapters_projectors.th")
    parser.add_argument("target", type=Path, nargs="?", help="default: the source's name with .safetensors")
    args = parser.parse_args()
    target = args.target or args.source.with_suffix(".safetensors")
    try:
        weights = convert_adapter(args.source, target)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    print(f"{target}: {len(weights.tensors) + len(weights.scales)} tensors, identity {weights.identity[:16]}")


if __name__ == "__main__":
    main()
