"""ComfyUI's services and the disk, for all that happens here; nothing in it knows MoMA."""
