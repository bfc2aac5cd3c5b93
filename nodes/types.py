"""The socket types of this pack."""

from comfy_api.latest import io

MomaMllm = io.Custom("MOMA_MLLM")
MomaAdapter = io.Custom("MOMA_ADAPTER")
MomaSubject = io.Custom("MOMA_SUBJECT")

CATEGORY = "MoMA"
SEARCH_ALIASES = ["personalize", "subject", "reference", "IPAdapter", "LLaVA", "MoMA"]
