"""A tiny world of moving shapes: endless captioned clips, a reader that tells what a clip shows, and tiny models of
it."""
