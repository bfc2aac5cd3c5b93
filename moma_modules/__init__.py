"""MoMA (arXiv 2404.05674), one folder for each thing that happens; imports run from `sampling` down to `host`."""
