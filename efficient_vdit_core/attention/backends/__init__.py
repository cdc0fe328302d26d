"""What computes attention under a tile pattern. Each backend is a file of its own, and none imports another."""
