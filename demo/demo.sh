#!/usr/bin/env bash
# From a GGUF file to words: `make demo`. Needs `layerpack` on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."

show() {
    local word line='$'
    for word in "$@"; do
        [[ $word != *' '* ]] || word="\"$word\"" # as one would type it
        line+=" $word"
    done
    printf '\n%s\n' "$line"
    "$@"
}

gguf=$(python demo/smollm2_gguf.py .cache)
show layerpack convert "$gguf" demo-out --force
show layerpack generate demo-out --prompt "What is the capital of France?" --max-new-tokens 64
show layerpack inspect demo-out
