"""Sparse weights of linear layers, without training.

``patterns`` says which weights may be zero together, ``layers`` which layers there are,
``statistics`` watches their inputs, ``methods`` scores and prunes a matrix, ``allocation`` shares
the zeros out among layers, ``planning`` does all of it on a copy of the model, and ``stored`` keeps
what was decided until it is written. A weight is W [K, N] of x W everywhere: K is the reduction
dimension, and the N columns are the output channels.
"""
