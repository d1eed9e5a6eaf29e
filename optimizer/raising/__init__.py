"""The rules of ``canonicalize``, one module per family of spellings.

Every rule module has ``run(model) -> RuleReport`` (``optimizer.raising.base``), rewrites in place
and says why it left a near match alone.
"""
