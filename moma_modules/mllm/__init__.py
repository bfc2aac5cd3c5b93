"""MoMA's multimodal language model: a LLaVA-1.5 checkpoint in its original format, one forward per subject."""
