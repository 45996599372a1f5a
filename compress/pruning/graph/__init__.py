"""How channels pass through a network: which dimension of a tensor carries which channels behind each operation."""
