"""The adapter: its file, its networks, and loading them."""
