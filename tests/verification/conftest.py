"""Published Llamas of random weights, in the formats of Hugging Face and Meta."""

from meta_files import meta_files
from published_llama import publish, read_tensors, shape, shapes

__all__ = ["meta_files", "publish", "read_tensors", "shape", "shapes"]
