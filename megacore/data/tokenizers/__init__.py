"""Tokenizers: the libraries that define the ids, added tokens, faster engines and chat templates.

Start with ``tokenizer``: ``load_tokenizer`` opens a file, and ``Tokenizer`` is what the rest of the package uses.
"""
