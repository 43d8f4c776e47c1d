"""Training samples: windows of text, conversations, packing and mixtures."""
