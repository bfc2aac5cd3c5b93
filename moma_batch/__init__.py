"""Many rows of a table through one or more ComfyUI servers, each exactly once: `python3 moma_batch run table.csv ...`.

Needs only the standard library, and Ray for `--address`. Imports run downwards: command_line > driver, report, workers;
workers > cluster > backend, cluster_worker > worker > server, process; plan > workflow, table; everything may use
index, journal, jobs and files.
"""
