"""What this package lets in from outside, and how it speaks of what it refuses.

documents   JSON and TOML of others: bytes, depth and count have bounds
numbers     numbers of users: finite, and within a range that the message names
memory      what a request would take, against what there is, before anything is allocated
quote       values and others' messages inside our own: short, and safe to print
texts       prompts: well-formed, and no longer than a model reads
packages    what to type for one that is missing
"""
