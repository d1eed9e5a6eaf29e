"""Int8 quantization of linear layers: sites, statistics, scales, weights, and the graph written.

``sites`` finds groups of linear layers that share an input, ``statistics`` watches those inputs,
``scales`` decides how each is scaled and shifted, ``weights`` rounds the weights, ``emit`` writes
the canonical Q/DQ form. All formulas use the symbols of ``scales``.
"""
