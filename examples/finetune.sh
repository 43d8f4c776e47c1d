#!/usr/bin/env bash
# Fine-tune a converted model on one or several nodes, with the recipe of finetune.toml. For example, on two nodes of 8 GPUs
# with tp 4 and so dp 4, where checkpoint, data and output are on a shared file system:
#
#   bash examples/finetune.sh llama2 --rank 0 --tp 4 --pp 1 --nodes 2 --addr node1 --size 7     # on node1
#   bash examples/finetune.sh llama2 --rank 1 --tp 4 --pp 1 --nodes 2 --addr node1 --size 7     # on node2
set -euo pipefail

usage() {
    cat <<EOF
Usage: bash $0 MODEL --size N [OPTION VALUE]...

A training checkpoint is saved every 800 iterations and at the end. With --resume the same command resumes from the
newest; with more --iters it extends a run that has ended. \`megacore report\` writes a page with its curves.

MODEL is one that \`megacore plugins\` lists: falcon, llama, llama2, codellama, ...

  --size N           billions of parameters; selects the checkpoint and the learning rate
  --tp N, --pp N     tensor- and pipeline-parallel size; the remaining processes are data-parallel  [1]
  --gpus N           processes per node  [its number of GPUs; without GPUs, tp × pp]
  --nodes N          number of nodes; start this script on each of them  [1]
  --rank R           rank of this node, from 0  [0]
  --addr HOST        address of node 0
  --port P           port on which node 0 listens  [29500]
  --micro-batch N    micro-batch size  [1]
  --global-batch N   global batch size  [12]
  --iters N          number of optimizer steps  [1000]
  --seq-len N        sequence length in tokens  [2048; llama2 4096; codellama 16384]
  --lr LR [MINLR]    peak and minimum learning rate; the minimum is a tenth of the peak by default
                     [3e-4; llama2 above 13: 1.5e-4; with --instruct 2e-5]
  --dtype DTYPE      bf16, fp16, fp32 or fp64  [bf16]
  --checkpoint DIR   native checkpoint to start from  [checkpoints/MODEL-SIZE]
  --data PREFIX      dataset of \`megacore tokenize\`, or of \`megacore tokenize-chat\` with --instruct  [data/text]
  --val-path PREFIX  validation dataset, evaluated every 200 iterations
  --instruct         train on conversations, with a loss on the assistant's tokens
  --loss-mask X      loss weight of all other tokens, with --instruct  [0]
  --out DIR          native checkpoint to create  [checkpoints/MODEL-SIZE-finetuned]
  --run DIR          run directory for metrics and training checkpoints  [runs/ and the last part of --out]
  --resume           resume from the newest training checkpoint of the run, if there is one
  --wandb            log to Weights & Biases, with the key of \`wandb login\` or WANDB_API_KEY
  --wandb-project P  project in Weights & Biases  [megacore]
  --wandb-name NAME  name of the run  [the name of the run directory]
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

data_options=(--set data.prefix="$data" --set data.seq_length="$seq_len")
if [ -n "$instruct" ]; then data_options+=(--set data.kind=instruction --set data.scalar_loss_mask="${loss_mask:-0}"); fi
if [ -n "$val_path" ]; then
    data_options+=(--set data.valid_prefix="$val_path" --set evaluation.interval=200 --set evaluation.iters=10)
fi

out=${out:-checkpoints/$model-$size-finetuned}
logger_options=()
if [ -n "$wandb" ]; then
    logger_options=(--set 'logging.loggers=["wandb"]' ${wandb_project:+--set logging.project="$wandb_project"})
    logger_options+=(${wandb_name:+--set logging.name="$wandb_name"})
fi

node_options=()
if [ "$nodes" -gt 1 ]; then
    node_options=(--nodes "$nodes" --node-rank "$rank" --port "$port" ${addr:+--addr "$addr"})
fi

megacore train "$(dirname "$0")/finetune.toml" ${resume:+--resume "$resume"} \
    --tp "$tp" --pp "$pp" ${gpus:+--nproc-per-node "$gpus"} "${node_options[@]}" \
    --set parallel.sequence_parallel="$sequence_parallel" \
    --set model.checkpoint="$checkpoint" --set model.dtype="$dtype" \
    "${data_options[@]}" "${logger_options[@]}" \
    --set optimizer.lr="$lr" --set optimizer.min_lr="$min_lr" \
    --set training.train_iters="$iters" \
    --set training.micro_batch_size="$micro_batch" --set training.global_batch_size="$global_batch" \
    --set output.checkpoint="$out" --set output.directory="${run:-runs/$(basename "$out")}"
