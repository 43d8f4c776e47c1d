"""The kit that plugins build layers from, and the decoder that stacks them.

Start with ``decoder.py``: token ids to logits or to a loss. ``attention.py``, ``mlp.py`` and ``norms.py`` are what
layers are made of, ``loading.py`` builds a model from a checkpoint.
"""

from megacore.model.attention import SelfAttention
from megacore.model.cache import KeyValueCache
from megacore.model.decoder import DecoderModel, model_specs
from megacore.model.dropout import HiddenDropout
from megacore.model.loading import load_model, load_stages, read_config
from megacore.model.mlp import ACTIVATIONS, MLP, GatedMLP, activation_function
from megacore.model.norms import LayerNorm, RMSNorm, build_norm
from megacore.model.options import ComputeOptions, apply_options
from megacore.model.positions import Positions
from megacore.model.rotary import apply_rotary, inverse_frequencies, rotary_table

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ComputeOptions",
    "DecoderModel",
    "GatedMLP",
    "HiddenDropout",
    "KeyValueCache",
    "LayerNorm",
    "Positions",
    "RMSNorm",
    "SelfAttention",
    "activation_function",
    "apply_options",
    "apply_rotary",
    "build_norm",
    "inverse_frequencies",
    "load_model",
    "load_stages",
    "model_specs",
    "read_config",
    "rotary_table",
]
