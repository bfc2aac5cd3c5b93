"""The small world: what a checkpoint of its sizes needs to be loaded."""
