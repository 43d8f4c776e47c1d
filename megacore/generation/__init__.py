"""Text generation: the tokens that a model predicts after a prompt, one at a time, and their text.

Start with ``launch.py``, the public call ``generate``. ``text_generator.py`` holds a loaded model, ``decoding.py`` is
the loop over tokens.
"""

from megacore.generation.chat import converse as converse
from megacore.generation.launch import generate as generate, run_with_generator as run_with_generator
from megacore.generation.sampling import Sampling as Sampling
from megacore.generation.text_generator import Generated as Generated, Limits as Limits, TextGenerator as TextGenerator
