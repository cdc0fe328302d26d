"""Malformed input, made from a seed: each case is refused by a sentence of ours, or served, in bounded time and memory.

odd       values and texts that break parsers, and ways to spoil documents and bytes
cases     one function a kind: writes its files, and returns what is to be called with them
media     clips among them
command   the command line, run in the same process
worker    a process that runs cases one after the other and judges how each ended
run       the processes, their time and memory; `python -m fuzz.run --help` for the long form
"""
