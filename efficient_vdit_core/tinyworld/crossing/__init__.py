"""The crossing world: two shapes that pass a bar and each other, and their judge."""
