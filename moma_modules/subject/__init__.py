"""The subject: from a picture and a mask to what a run needs, and its file."""
