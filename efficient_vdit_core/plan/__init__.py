"""Plans: a tile pattern for every layer of a model, as an object, a JSON file and a line of text."""

from .tile_plan import ANY_FAMILY, TilePlan

__all__ = ["ANY_FAMILY", "TilePlan"]
