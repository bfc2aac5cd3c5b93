"""`moma_batch` with workers that answer at once: what remains is the driver. Run as a script by `batch_rows`.

batch_instant.py COUNT WORDS...: do COUNT tasks, then stop as after Ctrl-C; WORDS are for moma_batch.
"""

import argparse
import hashlib
import json
import os
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from moma_batch import command_line
from moma_batch.backend import Backend
from moma_batch.jobs import Job, Outcome, Produced
from moma_batch.pictures import PNG
from moma_batch.results import PICTURES

WORKERS = 4
FIRST = "CPU seconds until the first task: "
EMBEDDING_BYTES = 4096


class InstantWorker:
    """Gives a small picture, or a subject, for every job; after so many of all workers, the run is asked to stop."""

    done = 0
    lock = threading.Lock()

    def __init__(self, most: int) -> None:
        """Stop after so many."""
        self._most = most

    def make_well(self) -> None:
        """There is no server."""

    def prepare(self, job: Job) -> None:
        """Nothing is uploaded."""

    def execute(self, job: Job) -> Outcome:
        """At once."""
        with InstantWorker.lock:
            before = InstantWorker.done
            InstantWorker.done += len(job.keys)
            if not before:
                print(f"{FIRST}{time.process_time()}", flush=True)
            if before < self._most <= InstantWorker.done:
                os.kill(os.getpid(), signal.SIGINT)
        if not job.encodes:
            return Outcome("ok", files=(Produced("x.png", picture(job)),))
        photos = "".join(upload.name for upload in job.uploads)
        pictures = f"{hashlib.sha256(photos.encode()).hexdigest()}{PICTURES}"
        subjects = [Produced(f"{key}.safetensors", bytes.fromhex(key) * (EMBEDDING_BYTES // 32)) for key in job.keys]
        return Outcome("ok", files=(*subjects, Produced(pictures, bytes(1024))))

    def interrupt(self) -> None:
        """Nothing takes time."""

    def close(self) -> None:
        """There is nothing to end."""


def picture(job: Job) -> bytes:
    """A grey pixel that says whose it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))

    mark = b"moma_batch\0" + json.dumps(job.mark).encode()
    parts = (chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), chunk(b"tEXt", mark))
    return PNG + b"".join(parts) + chunk(b"IDAT", zlib.compress(b"\0\x80")) + chunk(b"IEND", b"")


def main() -> int:
    """Run `moma_batch` so."""
    most, words = int(sys.argv[1]), sys.argv[2:]

    def backend_for(options: argparse.Namespace, run_id: str) -> Backend:
        return Backend({f"worker {number + 1}": InstantWorker(most) for number in range(WORKERS)})

    command_line.backend_for = backend_for
    return command_line.main(words)


if __name__ == "__main__":
    sys.exit(main())
