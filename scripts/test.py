"""The one test command: `python3 scripts/test.py` sets up what it needs, then lints, checks types and runs the tests.

All tests run on the newest ComfyUI, all but the slow ones on the oldest that the pack supports; with `COMFYUI_PATH`
set, all on that ComfyUI alone. What does not depend on ComfyUI's version runs on the newest only. A file on each core,
while the types are checked. Every process uses one thread: with more than there are cores, PyTorch takes ten times as
long.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chromium import chromium_path
from comfyui_source import CARRIER_VERSIONS, NEWEST, OLDEST, ROOT, SetupError
from frontends import FRONTENDS, find_frontend
from setup_env import Environment, environment

Step = Callable[[], bool]
"""Does something with its output shown; whether it succeeded."""

MOST_WORKERS = 4
"""How many processes one pytest may have: each has its own ComfyUI in memory, and maybe a server with models."""
NO_TESTS = 5
"""pytest's exit status; a failure unless the command line chooses among the tests."""


class Target(NamedTuple):
    """A ComfyUI to test on: a version, or None for the user's own; with or without the slow tests."""

    version: str | None
    slow: bool

    @property
    def name(self) -> str:
        """What the headings call it."""
        return f"ComfyUI {self.version}" if self.version else f"ComfyUI in {os.environ['COMFYUI_PATH']}"


class Steps:
    """Runs steps one after another and keeps what became of each."""

    def __init__(self) -> None:
        """Start without any."""
        self._results: list[tuple[str, bool, float]] = []

    def run(self, name: str, step: Step) -> bool:
        """Run one under a heading; whether it succeeded."""
        print(f"\n=== {name} ===", flush=True)
        start = time.monotonic()
        succeeded = step()
        seconds = time.monotonic() - start
        self._results.append((name, succeeded, seconds))
        print(f"=== {name}: {'ok' if succeeded else 'FAILED'}, {seconds:.1f} s ===", flush=True)
        return succeeded

    def summary(self) -> bool:
        """Print what became of every step; whether all succeeded."""
        print("\n=== Summary ===")
        for name, succeeded, seconds in self._results:
            print(f"{'ok' if succeeded else 'FAILED':<7}{seconds:8.1f} s  {name}", flush=True)
        return all(succeeded for _, succeeded, _ in self._results)


def command(found: Environment | None, *words: str) -> Step:
    """A step: a Python module run in an environment, from the repository's root; it fails without an environment."""

    def step() -> bool:
        if found is None:
            return _not_run()
        _announce(found, words)
        return subprocess.run([found.python, *words], cwd=ROOT, env=found.variables(), check=False).returncode == 0

    return step


def started(found: Environment | None, *words: str, log: Path | None = None, none_is_fine: bool = False) -> Step:
    """As `command`, but it starts at once; the step waits for its end.

    Args:
        log: Takes the output, which the step shows; where None it is shown as it comes.
        none_is_fine: Whether pytest may find no tests.
    """
    if found is None:
        return _not_run
    variables = {**found.variables(), "OMP_NUM_THREADS": "1"}
    output = log.open("wb") if log else None
    process = subprocess.Popen([found.python, *words], cwd=ROOT, env=variables, stdout=output, stderr=output)

    def step() -> bool:
        _announce(found, words)
        status = process.wait()
        if log:
            sys.stdout.flush()
            sys.stdout.buffer.write(log.read_bytes())  # its bytes: not every locale can print every letter
            sys.stdout.buffer.flush()
        return status == 0 or (none_is_fine and status == NO_TESTS)

    return step


def _not_run() -> bool:
    print("Not run: its environment could not be set up, see above.", flush=True)
    return False


def _announce(found: Environment, words: tuple[str, ...]) -> None:
    print(f"$ COMFYUI_PATH={shlex.quote(str(found.comfyui))} {shlex.join([str(found.python), *words])}", flush=True)


def set_up(steps: Steps, target: Target) -> Environment | None:
    """Set up for the target; None if that failed."""
    found: list[Environment] = []

    def step() -> bool:
        try:
            found.append(environment(target.version))
        except SetupError as error:
            print(f"error: {error}", flush=True)
        return bool(found)

    steps.run(f"Set-up for {target.name}", step)
    return found[0] if found else None


def set_up_browser() -> bool:
    """Chromium for the tests of the editor: the one there is, or Debian's where this may install it."""
    if chromium_path() or sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"Chromium: {chromium_path() or 'none; the tests of the editor are left out'}", flush=True)
        return True
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update", "-qq"), ("install", "-qq", "-y", "--no-install-recommends", "chromium", "fonts-noto-cjk")):
        subprocess.run(["apt-get", *words], env=quiet, stdout=subprocess.DEVNULL, check=False)
    print(f"Chromium: {chromium_path() or 'could not be installed; the tests of the editor are left out'}", flush=True)
    return chromium_path() is not None or not os.environ.get("CI")


def set_up_frontends() -> bool:
    """Other versions of the editor for the browser; where npm has none, their tests are left out."""
    for version in FRONTENDS if chromium_path() else ():
        try:
            print(f"Frontend {version}: {find_frontend(version)}", flush=True)
        except SetupError as error:
            print(f"Frontend {version}: {error}", flush=True)
    return True


def targets(versions: list[str], quick: bool) -> list[Target]:
    """What to test on: these versions, else the user's own ComfyUI, else the newest and the oldest."""
    if versions:
        return [Target(version, slow=not quick) for version in versions]
    if os.environ.get("COMFYUI_PATH"):
        return [Target(None, slow=not quick)]
    newest = Target(NEWEST, slow=not quick)
    return [newest] if quick else [newest, Target(OLDEST, slow=False)]


def run_all(chosen: list[Target], pytest_arguments: list[str]) -> bool:
    """Run every step, also after a failure; whether all succeeded."""
    steps = Steps()
    environments = [set_up(steps, target) for target in chosen]
    if any(target.slow for target in chosen):
        steps.run("Set-up of the browser", set_up_browser)
        steps.run("Set-up of the browser's frontends", set_up_frontends)
    linting = next(filter(None, environments), None)
    steps.run("ruff format", command(linting, "-m", "ruff", "format", "--check"))
    steps.run("ruff check", command(linting, "-m", "ruff", "check"))
    with tempfile.TemporaryDirectory() as folder:
        types = started(linting, "-m", "mypy", log=Path(folder) / "mypy.log")
        run_tests(steps, list(zip(chosen, environments, strict=True)), types, pytest_arguments)
    return steps.summary()


def usable_cores() -> int:
    """How many cores this process may use; it may be kept from some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_tests(
    steps: Steps, pairs: list[tuple[Target, Environment | None]], types: Step, pytest_arguments: list[str]
) -> None:
    """First all but the slow tests, on one target after another; then the slow ones of each target that has them.

    Args:
        types: The check of the types, which has started.
    """
    workers = min(usable_cores(), MOST_WORKERS)
    spread = ("--numprocesses", str(workers), "--dist", "loadfile") if workers > 1 else ()

    def tests(found: Environment | None, marked: str) -> Step:
        words = ("-m", "pytest", "-m", marked, *spread, *pytest_arguments)
        return started(found, *words, none_is_fine=bool(pytest_arguments))

    for target, found in pairs:
        marked = "not slow" if target.version != OLDEST or len(pairs) == 1 else "not slow and not newest"
        steps.run(f"pytest on {target.name}, without the slow tests", lambda f=found, m=marked: tests(f, m)())
    steps.run("mypy", types)
    for target, found in pairs:
        if target.slow:
            steps.run(f"pytest on {target.name}, the slow tests", lambda f=found: tests(f, "slow")())


def parse_arguments(words: list[str]) -> tuple[list[Target], list[str]]:
    """The targets and the arguments for pytest."""
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options] [-- PYTEST_ARGUMENT ...]")
    help_ = "test on this version only, with the slow tests; may be repeated"
    parser.add_argument("--comfyui", action="append", default=[], choices=CARRIER_VERSIONS, help=help_)
    parser.add_argument("--quick", action="store_true", help="only the newest ComfyUI, without the slow tests")
    options = parser.parse_args(words[:split])
    return targets(options.comfyui, options.quick), words[split + 1 :]


def main() -> None:
    """Run what the command line asks for."""
    sys.exit(0 if run_all(*parse_arguments(sys.argv[1:])) else 1)


if __name__ == "__main__":
    main()
