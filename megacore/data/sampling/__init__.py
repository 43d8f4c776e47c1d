"""The samples that training takes from datasets: windows of text, conversations, packing and mixtures.

Start with ``samples``: ``MixedSamples`` maps a position of the run to a sample of one of its sources.
"""
