"""The prompt: where the subject is in it, and what a CONDITIONING carries of that."""
