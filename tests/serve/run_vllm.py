"""Ask vLLM on the CPU for texts and counts of kept drafts, several folders in one process; runs in vLLM's environment.

    python run_vllm.py JOBS.json RESULTS.json

A job has `folder`, `speculative` (or null), `prompts` (ids) and `num_tokens`, and perhaps `dtype`, `max_len`, or
`together`: false for one prompt at a time; a result has `texts`, `num_drafts`, `num_draft_tokens`,
`num_accepted_tokens`, `num_accepted_tokens_per_pos` and `seconds`.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
    "MASTER_ADDR": "127.0.0.1",
}

import torch


def main(jobs: Path, results: Path) -> None:
    """Run all jobs; a job that fails leaves its error in its result."""
    library = _declare_torchvision()  # as long as this lives
    found = []
    for job in json.loads(jobs.read_text()):
        try:
            found.append(_run(job))
        except Exception as error:  # a refusal of the engine is a result
            found.append({"error": f"{type(error).__name__}: {error}"})
        results.write_text(json.dumps(found))
    del library


def _declare_torchvision() -> torch.library.Library:
    """Declare what torchvision's Python half registers: its wheel is built for CUDA, and Qwen3.5's code imports it.

    What an architecture is, vLLM asks in a process of its own, which would not know of them: it is asked here.
    """
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float least) -> Tensor")
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda question: question()
    return library


def _run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        job["folder"],
        skip_tokenizer_init=True,
        dtype=job.get("dtype", "float32"),
        enforce_eager=True,
        max_model_len=job.get("max_len", 256),
        max_num_seqs=16,
        speculative_config=job["speculative"],
        disable_log_stats=False,
        enable_prefix_caching=False,
        seed=0,
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    params = SamplingParams(temperature=0.0, max_tokens=job["num_tokens"], ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    batches = [prompts] if job.get("together", True) else [[prompt] for prompt in prompts]
    made = [one for batch in batches for one in llm.generate(batch, params, use_tqdm=False)]
    seconds = time.perf_counter() - began
    counts: dict[str, Any] = {"texts": [list(one.outputs[0].token_ids) for one in made], "seconds": seconds}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_"):
            name = metric.name.removeprefix("vllm:spec_decode_")
            counts[name] = list(metric.values) if hasattr(metric, "values") else metric.value
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return counts


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
