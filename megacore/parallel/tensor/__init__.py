"""Tensor parallelism: each layer cut over several ranks.

Start with ``sharding`` (how a parameter is cut), then ``module`` (modules that declare their parameters so) and
``layers`` (the linear layers and the embedding); ``collectives``, ``overlap`` and ``loss`` are what these compute with.
"""
