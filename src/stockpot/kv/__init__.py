"""KV blocks: identity, prefix tree, tiers."""
