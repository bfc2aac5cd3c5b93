"""Progress of work on files: a bar and bytes on the node that runs, and Cancel."""

import time

import comfy.model_management
import comfy.utils
from comfy_execution.utils import get_executing_context

from ..files import megabytes

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
