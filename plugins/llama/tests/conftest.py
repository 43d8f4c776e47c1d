"""Published Llamas of random weights, and the processes that tests run functions on."""

from megacore.testing.ranks import ranks
from meta_files import meta_files
from published_llama import publish, read_tensors, shape, shapes

__all__ = ["meta_files", "publish", "ranks", "read_tensors", "shape", "shapes"]
