"""Which workers a command line asks for: servers that run, ComfyUIs to start here, or on a cluster."""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from .backend import Backend
from .models import are_small, find_comfyui, find_python, graphics_cards, may_have_weights
from .process import Launch
from .server import GoneError, Server
from .worker import Patience, Worker, WorkerSpec
from .workflow import DEFAULT, SMALL_WORLD

MEGABYTE = 1 << 20


def check_choice(options: argparse.Namespace) -> None:
    """See to it that the command line asks for one kind of workers.

    Raises:
        ValueError: It does not.
    """
    if options.workers is not None and options.workers < 1:
        raise ValueError(f"--workers {options.workers}: give a number from 1")
    if options.server and options.address:
        raise ValueError("--server names servers that run already, --address a cluster to start them on: give one")
    if options.server and (options.workers or options.comfyui):
        raise ValueError("--server names servers that run already: leave out --workers and --comfyui")
    urls = [Server(url).url for url in options.server]
    if len(set(urls)) < len(urls):
        raise ValueError("--server names one server twice")
    if options.address == "local":
        options.comfyui = find_comfyui(options.comfyui)
    elif options.address and not (options.comfyui and options.comfyui.is_absolute()):
        raise ValueError("--address needs --comfyui DIR: ComfyUI's folder on the cluster's machines, from the root on")


def choose_workflow(options: argparse.Namespace) -> None:
    """Without `--workflow`: the small world's, where no other weights can be, said in one line; else `DEFAULT`."""
    if options.workflow is not None:
        return
    options.workflow = SMALL_WORLD if _has_small_weights_only(options) else DEFAULT
    if options.workflow == SMALL_WORLD:
        print(
            "There are no weights of MoMA in models/moma: pictures are made with the small ones of the pack, 128x128 "
            f"({SMALL_WORLD.name}). --workflow names another graph.",
            file=sys.stderr,
        )


def _has_small_weights_only(options: argparse.Namespace) -> bool:
    """Of a server it is asked; of a cluster it is not known."""
    if options.server:
        with contextlib.suppress(GoneError):
            return are_small(Server(options.server[0]).choices("MoMALoadAdapter", "adapter_name"))
        return False
    if options.address not in (None, "local"):
        return False
    return not may_have_weights(find_comfyui(options.comfyui), shlex.split(options.comfyui_args))


def backend_for(options: argparse.Namespace, run_id: str) -> Backend:
    """The workers.

    Args:
        run_id: Names what they keep on the disks of other machines.

    Raises:
        ValueError, TableError: There can be none.
    """
    if options.address:
        return _on_cluster(options, run_id)
    return Backend({spec.name: Worker(spec) for spec in _here(options)})


def _here(options: argparse.Namespace) -> list[WorkerSpec]:
    patience = Patience(back=options.server_wait)
    if options.server:
        return [WorkerSpec(url, url, None, patience) for url in (Server(one).url for one in options.server)]
    comfyui = find_comfyui(options.comfyui)
    python, cards = find_python(options.python, comfyui), graphics_cards()
    more = shlex.split(options.comfyui_args)
    specs = []
    for number in range(options.workers or cards or 1):
        place = ["--cuda-device", str(number % cards)] if cards else [] if sys.platform == "darwin" else ["--cpu"]
        launch = Launch(comfyui, python, options.out / "workers" / str(number + 1), [*place, *more])
        name, memory = f"worker {number + 1}", options.max_memory * MEGABYTE
        specs.append(WorkerSpec(name, "", launch, patience, options.restart_after, memory))
    return specs


def _on_cluster(options: argparse.Namespace, run_id: str) -> Backend:
    from .cluster import cluster_backend, connect
    from .cluster_worker import ClusterSpec

    more, memory = tuple(shlex.split(options.comfyui_args)), options.max_memory * MEGABYTE
    patience, comfyui = Patience(back=options.server_wait), Path(options.comfyui)

    def describe(number: int, has_card: bool) -> ClusterSpec:
        name, folder = f"worker {number}", f"moma_batch-{run_id}-{number}"
        rest = (has_card, patience, options.restart_after, memory)
        return ClusterSpec(name, folder, comfyui, options.python, more, *rest)

    return cluster_backend(connect(options.address), options.workers, describe)
