"""Fewer tokens inside of a model: which, how many per layer, and the graph that merges them.

``flow`` finds where tokens may be merged and who reads them afterwards, ``schedule`` how many go in
which layer, ``matching`` chooses them, ``merging`` writes the reduction in one of two lowerings.
"""
