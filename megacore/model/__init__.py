"""The kit that plugins build layers from, and the decoder that stacks them.

Start with ``decoder.py``: token ids to logits or to a loss. ``attention.py``, ``mlp.py`` and ``norms.py`` are what
layers are made of, ``loading.py`` builds a model from a checkpoint.
"""

from megacore.model.attention import SelfAttention as SelfAttention
from megacore.model.cache import KeyValueCache as KeyValueCache
from megacore.model.decoder import DecoderModel as DecoderModel, model_specs as model_specs
from megacore.model.dropout import HiddenDropout as HiddenDropout
from megacore.model.loading import load_model as load_model, load_stages as load_stages, read_config as read_config
from megacore.model.mlp import (
    ACTIVATIONS as ACTIVATIONS,
    MLP as MLP,
    GatedMLP as GatedMLP,
    activation_function as activation_function,
)
from megacore.model.norms import LayerNorm as LayerNorm, RMSNorm as RMSNorm, build_norm as build_norm
from megacore.model.options import ComputeOptions as ComputeOptions, apply_options as apply_options
from megacore.model.positions import Positions as Positions
from megacore.model.rotary import (
    apply_rotary as apply_rotary,
    inverse_frequencies as inverse_frequencies,
    rotary_table as rotary_table,
)
