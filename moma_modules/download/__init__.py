"""Fetching the released files from the Hugging Face hub, in a process of its own."""
