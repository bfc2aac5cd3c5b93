"""The socket types of this pack."""

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

MomaMllm = io.Custom("MOMA_MLLM")
MomaAdapter = io.Custom("MOMA_ADAPTER")
MomaSubject = io.Custom("MOMA_SUBJECT")

CATEGORY = "MoMA"

_FLAG = "has_intermediate_output"
# Newer than the oldest ComfyUI that the pack supports, where the preview is lost when the page is loaded again.
KEEPS_PREVIEW: dict[str, Any] = {_FLAG: True} if _FLAG in {field.name for field in fields(io.Schema)} else {}
"""For the schema of a node that shows a picture without being an output."""
