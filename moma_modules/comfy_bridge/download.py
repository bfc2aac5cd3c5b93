"""Downloads that a node asks for."""

from ..download.client import fetch
from ..mllm.checkpoint import absent_files
from ..release import ADAPTER_FILE, MLLM_FILES
from .folders import release_folder
from .progress import FileProgress


def download_mllm() -> None:
    """Fetch the released MLLM, unless it is there in any form.

    Raises:
        RuntimeError: See `fetch`.
    """
    folder = release_folder()
    if not folder.is_dir() or absent_files(folder):
        fetch(folder, list(MLLM_FILES), FileProgress())


def download_adapter() -> None:
    """Fetch the released adapter, unless it is there.

    Raises:
        RuntimeError: See `fetch`.
    """
    fetch(release_folder(), [ADAPTER_FILE], FileProgress())
