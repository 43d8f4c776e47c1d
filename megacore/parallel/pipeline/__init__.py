"""Pipeline parallelism: a model cut between layers, and its stages run on micro-batches.

Start with ``stages`` (which layers a stage has), then ``schedule`` (training, with torch's pipeline schedules) and
``forward_only`` (evaluation and generation).
"""
