"""Command line: convert an MLLM to one `.safetensors` file (`python -m moma_modules.convert_mllm`)."""

import argparse
from pathlib import Path

from .host.disk import megabytes
from .mllm.convert import PRECISIONS, convert_mllm


def main() -> None:
    """Convert what the command line names; the source is kept."""
    parser = argparse.ArgumentParser(prog="python -m moma_modules.convert_mllm", description=__doc__)
    parser.add_argument("source", type=Path, help="the folder MoMA_llava_7b")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    help_ = "keep: as it is; fp8, int8: the matrices of the language layers in 8 bit (default: %(default)s)"
    parser.add_argument("--precision", choices=PRECISIONS, default="keep", help=help_)
    args = parser.parse_args()
    printed = [""]

    def report(done: int, total: int, text: str) -> None:
        line = f"{text} {100 * done // total} %"
        if line != printed[-1]:
            printed.append(line)
            print(line, flush=True)

    try:
        convert_mllm(args.source, args.target, args.precision, report)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
    except KeyboardInterrupt:
        raise SystemExit(
            f"Stopped. The same command goes on where it stopped; {args.target}.part may be removed."
        ) from None
    print(f"{args.target}: {megabytes(args.target.stat().st_size)}")


if __name__ == "__main__":
    main()
