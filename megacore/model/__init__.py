"""The kit that plugins build layers from, and the decoder that stacks them."""

from megacore.model.attention import Positions, SelfAttention
from megacore.model.decoder import DecoderModel, model_specs
from megacore.model.loading import load_model, read_config
from megacore.model.mlp import ACTIVATIONS, MLP, GatedMLP, activation_function
from megacore.model.norms import LayerNorm, RMSNorm, build_norm
from megacore.model.rotary import apply_rotary, inverse_frequencies, rotary_table

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "DecoderModel",
    "GatedMLP",
    "LayerNorm",
    "Positions",
    "RMSNorm",
    "SelfAttention",
    "activation_function",
    "apply_rotary",
    "build_norm",
    "inverse_frequencies",
    "load_model",
    "model_specs",
    "read_config",
    "rotary_table",
]
