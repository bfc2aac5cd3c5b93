"""Many rows of a table through one or more ComfyUI servers, each exactly once: `python3 moma_batch run table.csv ...`.

Needs only the standard library, Ray for `--address`, and for `evaluate` what ComfyUI's Python has.
Imports run downwards: command_line > evaluate.command, driver, report, workers; evaluate > dreambench, graphs;
workers > cluster > backend, cluster_worker > worker > server, process; plan > workflow, table; everything may use
index, journal, jobs and files.
"""
