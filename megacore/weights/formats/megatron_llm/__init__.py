"""The format megatron-llm: a tracker file, and one ``model_optim_rng.pt`` for each (tensor, pipeline) parallel rank.

::

    latest_checkpointed_iteration.txt                          "release", or the number of an iteration
    release/mp_rank_00/model_optim_rng.pt                      the only rank, or one of
    release/mp_rank_<tp>_<pp>/model_optim_rng.pt               several; <pp> only with several stages
    iter_<iteration>/mp_rank_<tp>_<pp>/model_optim_rng.pt      after training
    tokenizer.model

Each file holds ``args`` (an ``argparse.Namespace``), ``checkpoint_version``, ``iteration`` and ``model``; after
training, also the state of the optimizer, of the learning rate and of random numbers, which only that run can use.

Tensor names have two spellings, of converted and of trained files. The weight maps use the second, with the
ranks' parts merged and layers numbered through the whole model.
Start with ``rank_files``, which ``reading`` and ``writing`` use.
"""

from megacore.weights.formats.megatron_llm.writing import MegatronLlmFormat as MegatronLlmFormat
