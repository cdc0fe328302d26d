"""The pool of workers: start it, talk to it, watch it, end it. Moves messages and computes nothing itself."""
