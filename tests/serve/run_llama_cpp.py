"""Ask llama.cpp for texts and counts of kept drafts; runs in an environment with xllamacpp.

    python run_llama_cpp.py MODEL.gguf JOB.json RESULT.json

The vocabulary of the file is numbers in angle brackets, as `convert_for_llama_cpp.py` writes it.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def main(model: str, job: dict[str, Any], result: Path) -> None:
    """Answer all prompts, one after the other."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP]
    params.speculative.draft.n_max, params.speculative.draft.n_min = job["num_drafts"], 0
    params.speculative.draft.p_min = 0.0
    for cached in (params, params.speculative.draft):  # not rounded to fp16, as it is by default
        cached.cache_type_k = cached.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    asked = {"n_predict": job["num_tokens"], "temperature": 0.0, "top_k": 1, "ignore_eos": True, "cache_prompt": False}
    said = [server.handle_completions({"prompt": prompt, **asked}) for prompt in job["prompts"]]
    found = {
        "texts": [[int(one) for one in re.findall(r"<(\d+)>", answer["choices"][0]["text"])] for answer in said],
        "num_draft_tokens": [answer["timings"]["draft_n"] for answer in said],
        "num_accepted_tokens": [answer["timings"]["draft_n_accepted"] for answer in said],
    }
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]))
