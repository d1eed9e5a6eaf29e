"""Half precision: which nodes of a graph can compute in a 16-bit type, and the graph written so.

``limits`` holds the number formats, ``retyping`` what a node's definition allows, ``rules`` what is
known of operators, ``constants`` and ``masks`` look at stored numbers, ``ranges`` at the numbers of
a run, ``plan`` decides node by node, ``cut`` places the casts, ``cast`` writes the graph.
``convert`` puts them in order.
"""
