"""What a run made sparse, how long it took, and what that can gain."""
