"""PNG figures: reconstructions and contact sheets."""
