"""A sampling run: settings on a MODEL, a run, an evaluation, a forward, a layer."""
