"""What the user sees while something runs: texts, notices, pictures and progress on nodes, and Cancel.

Without a client that looks, nothing is sent.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context
from PIL import Image

from .disk import megabytes
from .pictures import picture as to_picture

PREVIEW_SIZE = 512

_LOG = logging.getLogger("comfyui_moma")
_LOG.setLevel(logging.WARNING)
"""Of its own: UltimateSDUpscale turns the root logger off while it works."""


@contextmanager
def only_looking(what: str) -> Iterator[None]:
    """For what the user may miss, `what`, but never at the cost of the picture: a failure is logged and ends there."""
    try:
        yield
    except Exception as error:
        _LOG.warning(f"MoMA: {what} failed; the picture is as it would be. {type(error).__name__}: {error}")


def executing_node() -> tuple[Any, str | None]:
    """The node that is being executed, as (prompt, node, index of its list), and its class if the prompt tells it."""
    context, kind = get_executing_context(), None
    if context is None:
        return None, None
    with only_looking("looking up which node runs"):
        server = _prompt_server()
        running = [] if server is None else server.prompt_queue.get_current_queue_volatile()[0]
        prompts = [item[2] for item in running if item[1] == context.prompt_id]
        kind = next((prompt[context.node_id]["class_type"] for prompt in prompts if context.node_id in prompt), None)
    return tuple(context), kind


def show_text(text: str) -> None:
    """Show a text on the node that is being executed."""
    with only_looking("showing a text on the node"):
        context, server = get_executing_context(), _server()
        if context is not None and server is not None:
            server.send_progress_text(text, context.node_id, server.client_id)


def warn(text: str) -> None:
    """Tell the user what went another way than meant: in the log, and as a notice in every view of the editor.

    `web/moma.js` shows the notice. Texts on nodes are not seen in app mode.
    """
    _LOG.warning(text)
    with only_looking("showing a notice"):
        server = _server()
        if server is not None:
            server.send_sync("moma.notice", {"text": text}, server.client_id)


def run_id() -> str:
    """The id of the prompt that is being executed, or a new one outside of any."""
    context = get_executing_context()
    return uuid4().hex if context is None else str(context.prompt_id)


def someone_looks() -> bool:
    """Whether a client is connected that would see a picture."""
    return _server() is not None


def show_mask(mask: Any, node_id: str) -> None:
    """Show a mask [B, h, w] in 0..1 as the picture on a node, the batch side by side; waits for the device."""
    context, server = get_executing_context(), _server()
    if context is None or server is None:
        return
    from server import BinaryEventTypes

    wide = mask.movedim(0, 1).flatten(1)
    shown = to_picture(wide).resize((wide.shape[1] * 8, wide.shape[0] * 8), Image.Resampling.BILINEAR)
    about = {
        "node_id": node_id,
        "display_node_id": node_id,
        "parent_node_id": node_id,
        "real_node_id": node_id,
        "prompt_id": context.prompt_id,
    }
    message = (("JPEG", shown, PREVIEW_SIZE), about)
    server.send_sync(BinaryEventTypes.PREVIEW_IMAGE_WITH_METADATA, message, server.client_id)


def _server() -> Any:
    """The server, if a client is connected; ComfyUI's own tools also run nodes without one."""
    server = None if get_executing_context() is None else _prompt_server()
    return server if server is not None and server.client_id is not None else None


def _prompt_server() -> Any:
    if "server" not in sys.modules:  # older ComfyUI can import it in a running server only
        return None
    from server import PromptServer

    return getattr(PromptServer, "instance", None)


TEXT_SECONDS = 0.25


class FileProgress:
    """A `Report` that shows bytes on the running node, and raises when the user cancels."""

    def __init__(self) -> None:
        """Show nothing yet."""
        self._bar = comfy.utils.ProgressBar(1)
        self._shown = 0.0

    def __call__(self, done: int, total: int, text: str) -> None:
        """Show it.

        Raises:
            comfy.model_management.InterruptProcessingException: The user cancels.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done, total)
        now = time.monotonic()
        context = get_executing_context()
        if context is not None and (now - self._shown > TEXT_SECONDS or done == total):
            from server import PromptServer  # where no server runs a node, there is none to import

            self._shown = now
            PromptServer.instance.send_progress_text(
                f"{text}\n{megabytes(done)} of {megabytes(total)}", context.node_id
            )
