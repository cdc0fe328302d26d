"""Who holds which tokens, what travels between the ranks, how the parts merge, and what it costs. Starts no process."""
