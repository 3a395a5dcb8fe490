#!/bin/bash
# Runs on the GPU host, in the folder that pack.sh's parts unpack to: run.sh RESULTS [8b|mid]. Each answer is a JSON
# file in RESULTS; a failure leaves its message in a .err file beside it, and the script goes on.
set -u
results=$(mkdir -p "${1:?usage: run.sh RESULTS [8b|mid]}" && cd "$1" && pwd)
shape=${2:-mid}
cd "$(dirname "$0")"
export PYTHONPATH=$PWD/site LD_LIBRARY_PATH=$PWD/.tensorrt:${LD_LIBRARY_PATH:-}

ask() { # name, command…: standard output is the answer
    local name=$1
    shift
    echo "== $name: $*" >&2
    "$@" >"$results/$name.json" 2>"$results/$name.err" || echo "   failed: $(tail -n 1 "$results/$name.err")" >&2
    [ -s "$results/$name.err" ] || rm -f "$results/$name.err"
    [ -s "$results/$name.json" ] || rm -f "$results/$name.json"
}

# 1. The machine, and the plans that the libraries accept.
ask machine python3 machine.py
ask doctor ./aotron doctor --format json
ask acceptance python3 acceptance.py

# The target whose plans run on this card, by its compute capability.
case $(python3 -c 'import torch; print(*torch.cuda.get_device_capability())') in
"8 0") target=a100 ;;
"9 0") target=h100 ;;
*) target=none ;;
esac

# 2. Logits and answers compared with the CPU's, for each precision. Prepared packages are finished first.
for engine in engines/$target-*; do
    [ -d "$engine" ] || continue
    name=${engine##*/}
    if [ $target = h100 ]; then
        ask "finish-$name" python3 timed.py ./aotron build "$engine" --finish
    fi
    ask "logits-$name" python3 compare_logits.py ./aotron "$engine" $target
done

# 3. Speed: prefill and decode at batch 1, 8 and 32, with and without CUDA graphs; the first start and the second.
ask checkpoint python3 timed.py python3 make_checkpoint.py checkpoint-$shape --shape "$shape"
for precision in bf16 fp8 int8 int4; do
    engine=engines/$shape-$precision
    ask "build-$precision" python3 timed.py ./aotron build checkpoint-$shape --recipe "$target:$precision" \
        --slots 32 --max-sequence-tokens 1024 -o "$engine"
    [ -d "$engine" ] || continue
    ask "start-cold-$precision" python3 timed.py ./aotron run "$engine" --target $target --token-ids 1,2,3 --max-tokens 2
    ask "start-warm-$precision" python3 timed.py ./aotron run "$engine" --target $target --token-ids 1,2,3 --max-tokens 2
    speed="./aotron bench $engine --target $target --prompt-tokens 512 --decode-tokens 128 --batch 1,8,32 --format json"
    ask "speed-$precision" $speed
    ask "speed-$precision-no-graphs" $speed --no-cuda-graphs
done

# 4. The same workload in transformers with torch.compile, and the card's bandwidth.
ask peer python3 peer.py checkpoint-$shape
ask bandwidth python3 machine.py --bandwidth

python3 summary.py "$results"
