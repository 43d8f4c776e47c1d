#!/usr/bin/env bash
# Fine-tune a model that `megacore convert` has converted, on one node or on several, with the recipe of finetune.toml.
# On two nodes of 8 GPUs, with tp 4 and so dp 4; checkpoint, data and output are on a file system that both share:
#
#   bash examples/finetune.sh llama2 --rank 0 --tp 4 --pp 1 --nodes 2 --addr node1 --size 7     # on node1
#   bash examples/finetune.sh llama2 --rank 1 --tp 4 --pp 1 --nodes 2 --addr node1 --size 7     # on node2
set -euo pipefail

usage() {
    cat <<EOF
Usage: bash $0 MODEL --size N [OPTION VALUE]...

A training checkpoint is saved every 800 iterations and at the end. With --resume the same command goes on from the
newest; with more --iters, too, where the run had ended. \`megacore report\` makes a page of its curves.

MODEL is one that \`megacore plugins\` lists: falcon, llama, llama2, codellama, ...

  --size N           billions of parameters: names the checkpoint and chooses the learning rate
  --tp N, --pp N     tensor- and pipeline-parallel size; what is left of the processes is data-parallel  [1]
  --gpus N           processes of a node  [its GPUs; without any, as many as the model is cut over]
  --nodes N          nodes, on each of which this is started  [1]
  --rank R           which of them this one is, from 0  [0]
  --addr HOST        address of node 0
  --port P           port at which node 0 listens for the others  [29500]
  --micro-batch N    samples computed at once  [1]
  --global-batch N   samples of an optimizer step  [12]
  --iters N          optimizer steps  [1000]
  --seq-len N        tokens of a sample  [2048; llama2 4096; codellama 16384]
  --lr LR [MINLR]    learning rate, from its peak to its lowest, by default a tenth
                     [3e-4; llama2 above 13: 1.5e-4; with --instruct 2e-5]
  --dtype DTYPE      bf16, fp16, fp32 or fp64  [bf16]
  --checkpoint DIR   to start from  [checkpoints/MODEL-SIZE]
  --data PREFIX      dataset of \`megacore tokenize\`, or of \`megacore tokenize-chat\` with --instruct  [data/text]
  --val-path PREFIX  another one, which is evaluated every 200 iterations
  --instruct         train on conversations, of which the assistant's words are learned
  --loss-mask X      what the others' words count for in the loss, with --instruct  [0]
  --out DIR          checkpoint to create  [checkpoints/MODEL-SIZE-finetuned]
  --run DIR          directory of the run: its metrics and training checkpoints  [runs/, with the last name of --out]
  --resume           go on from the newest training checkpoint of the run, if there is one
  --wandb            tell Weights & Biases too, as the key of \`wandb login\` or WANDB_API_KEY says
  --wandb-project P  what it files the run under  [megacore]
  --wandb-name NAME  what it calls the run  [the name of the run's directory]
EOF
}

fail() {
    echo "$0: $1" >&2
    exit 2
}

case ${1:-} in
    -h | --help) usage; exit ;;
    "" | -*) usage >&2; exit 2 ;;
esac
model=$1
shift

size="" tp=1 pp=1 nodes=1 rank=0 port=29500 iters=1000 micro_batch=1 global_batch=12 dtype=bf16 data=data/text
gpus="" addr="" lr="" min_lr="" seq_len="" checkpoint="" out="" val_path="" instruct="" loss_mask=""
run="" resume="" wandb="" wandb_project="" wandb_name=""
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit ;;
        --instruct) instruct=true; shift ;;
        --resume) resume=auto; shift ;;
        --wandb) wandb=true; shift ;;
        --lr)
            [ $# -gt 1 ] || fail "--lr needs a value"
            lr=$2
            shift 2
            if [ $# -gt 0 ] && [[ $1 != --* ]]; then min_lr=$1; shift; fi
            ;;
        --size | --tp | --pp | --gpus | --nodes | --rank | --addr | --port | --micro-batch | --global-batch | --iters | \
            --seq-len | --dtype | --checkpoint | --data | --out | --val-path | --loss-mask | --run | \
            --wandb-project | --wandb-name)
            [ $# -gt 1 ] || fail "$1 needs a value"
            name=${1#--}
            printf -v "${name//-/_}" %s "$2"
            shift 2
            ;;
        *) fail "there is no option $1; bash $0 --help lists them" ;;
    esac
done

command -v megacore >/dev/null || fail "the command megacore is not found: install it, or put its bin/ into PATH"
for option in tp pp nodes rank port iters micro_batch global_batch ${gpus:+gpus} ${seq_len:+seq_len}; do
    case ${!option} in
        "" | *[!0-9]*) fail "--${option//_/-} takes a whole number, not '${!option}'" ;;
    esac
done
if [ "$nodes" -eq 1 ] && [ "$rank" -gt 0 ]; then fail "--rank $rank needs --nodes, which says how many nodes there are"; fi
for rate in "$lr" "$min_lr"; do
    case $rate in *[!0-9.eE+-]*) fail "--lr takes a number, or two, not '$rate'" ;; esac
done
if [ -n "$wandb_project$wandb_name" ] && [ -z "$wandb" ]; then fail "--wandb-project and --wandb-name need --wandb"; fi
if [ -n "$loss_mask" ] && [ -z "$instruct" ]; then fail "--loss-mask is for conversations: it needs --instruct"; fi

if ! megacore plugins | tr -s ', ' '\n\n' | grep -xF -- "$model" >/dev/null; then
    fail "megacore has no model $model: \`megacore plugins\` lists those that it has"
fi
case $size in
    "" | *[!0-9.]*) fail "--size N says how large the model is, in billions of parameters" ;;
esac
checkpoint=${checkpoint:-checkpoints/$model-$size}
if [ ! -d "$checkpoint" ]; then
    fail "there is no checkpoint $checkpoint. Make it with
    megacore convert --model $model --size $size --out $checkpoint"
fi
family=$(megacore inspect "$checkpoint" | sed -n 's/^family *//p')
[ "$family" = "$model" ] || fail "$checkpoint is a checkpoint of $family, and MODEL is $model"

case $model in
    llama2) seq_len=${seq_len:-4096} ;;
    codellama) seq_len=${seq_len:-16384} ;;
    *) seq_len=${seq_len:-2048} ;;
esac
if [ -n "$instruct" ]; then lr=${lr:-2e-5}
elif [ "$model" = llama2 ] && [ "${size%%.*}" -gt 13 ]; then lr=${lr:-1.5e-4}
else lr=${lr:-3e-4}; fi
min_lr=${min_lr:-$(awk "BEGIN { print $lr / 10 }")}
sequence_parallel=$([ "$tp" -gt 1 ] && echo true || echo false)

about_data=(--set data.prefix="$data" --set data.seq_length="$seq_len")
if [ -n "$instruct" ]; then about_data+=(--set data.kind=instruction --set data.scalar_loss_mask="${loss_mask:-0}"); fi
if [ -n "$val_path" ]; then
    about_data+=(--set data.valid_prefix="$val_path" --set evaluation.interval=200 --set evaluation.iters=10)
fi

out=${out:-checkpoints/$model-$size-finetuned}
told=()
if [ -n "$wandb" ]; then
    told=(--set 'logging.loggers=["wandb"]' ${wandb_project:+--set logging.project="$wandb_project"})
    told+=(${wandb_name:+--set logging.name="$wandb_name"})
fi

several_nodes=()
if [ "$nodes" -gt 1 ]; then
    several_nodes=(--nodes "$nodes" --node-rank "$rank" --port "$port" ${addr:+--addr "$addr"})
fi

megacore train "$(dirname "$0")/finetune.toml" ${resume:+--resume "$resume"} \
    --tp "$tp" --pp "$pp" ${gpus:+--nproc-per-node "$gpus"} "${several_nodes[@]}" \
    --set parallel.sequence_parallel="$sequence_parallel" \
    --set model.checkpoint="$checkpoint" --set model.dtype="$dtype" \
    "${about_data[@]}" "${told[@]}" \
    --set optimizer.lr="$lr" --set optimizer.min_lr="$min_lr" \
    --set training.train_iters="$iters" \
    --set training.micro_batch_size="$micro_batch" --set training.global_batch_size="$global_batch" \
    --set output.checkpoint="$out" --set output.directory="${run:-runs/$(basename "$out")}"
