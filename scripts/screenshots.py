"""Makes every picture of the documentation anew: `python3 scripts/screenshots.py [PART ...]`.

Does its own set-up, except for Chromium.
"""

import sys

from inside import comfyui_inside


def main() -> None:
    """Take all pictures, or the parts that the command line names."""
    comfyui = comfyui_inside(__file__)
    from screenshot_parts import take_all

    take_all(comfyui, sys.argv[1:])


if __name__ == "__main__":
    main()
