"""Four lessons about prompt caching, each a small program: the wrong way, the right way, the figures."""
