"""How far a run is: one line that is written over on a terminal, else a line when something changes."""

import sys
import time
from collections.abc import Callable

Counts = dict[str, int]


class Progress:
    """Shows counts; `line` is for everything else that is said."""

    def __init__(self, counts: Callable[[], tuple[Counts, Counts]]) -> None:
        """Take a function that gives the states of the encodings and of the pictures."""
        self._counts, self._shown, self._last = counts, "", 0.0
        self._terminal = sys.stderr.isatty()
        self._start, self._done_before = time.monotonic(), counts()[1].get("ok", 0)
        self._seconds = 0.5 if self._terminal else 10.0

    def tick(self, now: bool = False) -> None:
        """Show what has changed, not too often."""
        moment = time.monotonic()
        if not now and moment - self._last < self._seconds:
            return
        self._last = moment
        text = self._text(*self._counts())
        if self._terminal:
            sys.stderr.write(f"\r\x1b[K{text}" + ("\n" if now else ""))
            sys.stderr.flush()
        elif text != self._shown:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def line(self, text: str) -> None:
        """Say something else."""
        print(("\r\x1b[K" if self._terminal else "") + text, file=sys.stderr, flush=True)

    def _text(self, encodings: Counts, pictures: Counts) -> str:
        parts = []
        if any(encodings.get(state) for state in ("pending", "running")):
            parts.append(f"subjects {encodings.get('ok', 0)}/{sum(encodings.values()) - encodings.get('spare', 0)}")
        done, total = pictures.get("ok", 0), sum(pictures.values())
        parts.append(f"pictures {done}/{total}")
        failed = sum(pictures.get(state, 0) for state in ("invalid", "refused", "failed", "poison"))
        if failed:
            parts.append(f"failed {failed}")
        made = done - self._done_before
        if made:
            each = (time.monotonic() - self._start) / made
            left = pictures.get("pending", 0) + pictures.get("running", 0)
            parts.append(f"{each:.2f} s each, about {_hours(each * left)} left")
        return ", ".join(parts)


def _hours(seconds: float) -> str:
    minutes = int(seconds / 60 + 0.5)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
