"""Run llama.cpp's own converter on a folder without a tokenizer: the vocabulary is numbers in angle brackets.

python convert_for_llama_cpp.py LLAMA_CPP_SOURCE FOLDER MODEL.gguf
"""

import runpy
import sys
from typing import Any

source, folder, model = sys.argv[1:]
sys.path[:0] = [f"{source}/gguf-py", source]

from conversion.qwen import Qwen3_5TextModel  # noqa: E402


def set_vocab(converter: Any) -> None:
    """Write as many tokens as the embedding has rows."""
    size, writer = converter.hparams["vocab_size"], converter.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"<{number}>" for number in range(size)])
    writer.add_token_types([1] * size)
    writer.add_token_merges(["< 0"])


Qwen3_5TextModel.set_vocab = set_vocab
sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", model, "--outtype", "f32"]
runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
