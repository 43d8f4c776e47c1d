#!/usr/bin/env bash
# A real model through every command, on two processes, in the directory demo/. Run it with `make demo`.
set -euo pipefail
cd "$(dirname "$0")/.."
examples=$PWD/examples

# The outputs of an earlier run are removed; the unpacked model is kept.
mkdir -p demo
cd demo
rm -rf language-reference.* checkpoint checkpoint-tp2 run trained exported

names=() seconds=() results=()

# step RESULT NAME COMMAND...: print the command, run it, record its time and the path of its result.
step() {
    local result=$1 name=$2 start=$SECONDS
    shift 2
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
    names+=("$name") seconds+=($((SECONDS - start))) results+=("$result")
}

if [ -f smollm2/config.json ]; then
    echo "(demo/smollm2 exists: the model is unpacked)"
else
    step demo/smollm2 "unpack the model" python "$examples/smollm2_to_hf.py" smollm2
fi
step demo/language-reference.jsonl "write the text" python "$examples/language_reference.py" language-reference.jsonl
step "demo/language-reference.{bin,idx}" "tokenize" \
    megacore tokenize --input language-reference.jsonl --tokenizer smollm2 --out language-reference --append-eod \
    --no-new-tokens
step demo/checkpoint "convert" megacore convert --model llama --from smollm2 --out checkpoint
step - "verify" megacore verify checkpoint --reference smollm2 --data language-reference --iters 10
step demo/checkpoint-tp2 "split" megacore split checkpoint --out checkpoint-tp2 --tp 2
step - "inspect" megacore inspect checkpoint-tp2 --check
step demo/trained "train" megacore train "$examples/smollm2.toml"
step demo/run/report.html "report" megacore report run
step - "generate" megacore generate trained --chat --prompt "What is a generator in Python?" --max-new-tokens 40
step demo/exported "export" megacore export trained --out exported
step - "verify the export" megacore verify trained --reference exported --data language-reference --iters 2

printf '\n%-20s %8s   %s\n' step seconds result
for i in "${!names[@]}"; do
    printf '%-20s %8d   %s\n' "${names[$i]}" "${seconds[$i]}" "${results[$i]}"
done
printf '%-20s %8d\n' total "$SECONDS"
