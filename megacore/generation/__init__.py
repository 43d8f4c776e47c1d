"""Text generation: the tokens that a model predicts after a prompt, one at a time, and their text.

Start with ``launch.py``, the public call ``generate``. ``text_generator.py`` holds a loaded model, ``decoding.py`` is
the loop over tokens.
"""

from megacore.generation.chat import converse
from megacore.generation.launch import generate, run_with_generator
from megacore.generation.sampling import Sampling
from megacore.generation.text_generator import Generated, Limits, TextGenerator

__all__ = ["Generated", "Limits", "Sampling", "TextGenerator", "converse", "generate", "run_with_generator"]
