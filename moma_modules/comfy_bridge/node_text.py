"""Text that the editor shows below a node's widgets."""

import sys


def show_at_node(text: str, node_id: str | None) -> None:
    """Show a line at a node of the running graph; without a server there is nobody to show it to."""
    # Not imported: a running ComfyUI has it, and elsewhere the import would start half of one.
    instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if instance is not None and node_id is not None:
        instance.send_progress_text(text, node_id)
