"""From files of text or conversations to datasets.

Start with ``text`` (``tokenize``) and ``chat`` (``tokenize_chat``). Files are cut into pieces by ``readers``, and their
``records`` encoded by ``encoder`` in the processes of ``worker_pool``.
"""
