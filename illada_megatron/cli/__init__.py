"""The command line: parse, call one library function, show the result.

In: words of a shell.
Out: calls, tables, exit codes (2: the user's mistake).
Never imported here: torch or megatron-core, before a command runs.
"""
