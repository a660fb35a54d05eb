"""Weights on disk: what to download and from where, merging Vicuna, and the trained deltas."""
