"""Generating text: what a model says after a prompt, token after token."""

from megacore.generation.chatting import converse
from megacore.generation.generating import generate
from megacore.generation.generator import Generated, Limits, TextGenerator, with_generator
from megacore.generation.sampling import Sampling

__all__ = ["Generated", "Limits", "Sampling", "TextGenerator", "converse", "generate", "with_generator"]
