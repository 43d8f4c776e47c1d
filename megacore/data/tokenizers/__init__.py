"""Tokenizers: the defining libraries, added tokens, fast engines and chat templates."""
