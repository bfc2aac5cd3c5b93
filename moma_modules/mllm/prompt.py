"""The instruction that MoMA gives its MLLM, as token ids (as in the released code, arXiv 2404.05674)."""

from sentencepiece import SentencePieceProcessor

IMAGE_TOKEN = -200
"""Stands where the image's features go; no id of the vocabulary."""

_BEFORE_IMAGE = "USER: "
_AFTER_IMAGE = "\n A photo of a {subject}. Describe a new image of the same {subject} in: {prompt}. ASSISTANT: *"


def prompt_ids(tokenizer: SentencePieceProcessor, subject: str, prompt: str) -> list[int]:
    """Token ids with one `IMAGE_TOKEN`.

    The text before and after the image is tokenised by itself, as LLaVA does. An `<image>` or `</s>` that a user
    writes stays plain text.
    """
    # One pass, so that "{prompt}" inside a subject word is not filled in.
    text = _AFTER_IMAGE.format(subject=subject, prompt=prompt)
    return [tokenizer.bos_id(), *tokenizer.encode(_BEFORE_IMAGE), IMAGE_TOKEN, *tokenizer.encode(text)]
