"""Many rows of a table through one or more ComfyUI servers, each exactly once: `python3 moma_batch run table.csv ...`.

Needs only the standard library. Imports run downwards: command_line > driver, report > backend > worker > server,
process; plan > workflow, table; everything may use index, journal, jobs and files.
"""
