"""Work of the pack's code in several processes of one thread each: small tensors gain little from more threads."""

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from .bootstrap import bootstrap

_worker: Callable[[Any], Any]
"""Of this process, where it is one of several."""


class SideBySide:
    """Processes that each made a worker; use it as a context manager."""

    def __init__(self, processes: int, module: str, name: str, *arguments: Any) -> None:
        """Each process calls `name` of a module of the pack, which gives its worker.

        Args:
            arguments: For that call; nothing of the pack's own, which is not imported yet.
        """
        context = multiprocessing.get_context("spawn")
        begin = (module, name, arguments)
        self._pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=begin)

    def __enter__(self) -> "SideBySide":
        """Ready."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes; what has not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)

    def map(self, asked: Iterable[Any]) -> Iterator[Any]:
        """What the workers say to each, in order.

        Raises:
            Exception: What a worker raised; or its process ended.
        """
        return self._pool.map(_work, asked)


def _begin(module: str, name: str, arguments: tuple[Any, ...]) -> None:
    global _worker
    bootstrap()
    import torch

    torch.set_num_threads(1)
    _worker = getattr(importlib.import_module(module), name)(*arguments)


def _work(asked: Any) -> Any:
    return _worker(asked)
