"""Starting ranks on one or several nodes, and the errors of those that fail.

Start with ``launcher`` (``run_on_ranks``), then ``nodes`` (several nodes), ``failures`` (which error is the cause),
``process_group``, ``restarts`` (under torchrun) and ``slurm`` (under srun).
"""
