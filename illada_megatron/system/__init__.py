"""Files and the terminal of this machine, as every floor uses them.

In: text, bytes, paths.
Out: files that are there as a whole or not at all; text that only says what it says.
Never imported here: anything else of the package, torch.
"""
