#!/bin/bash
# Llama 3 8B on four nodes: tensor, sequence and pipeline parallel, the rest replicas.
set -euo pipefail

GPUS_PER_NODE=8
NNODES=${NNODES:-4}
TP=4; PP=${2:-2}                     # stages may be given as the second argument
CHECKPOINTS=${1:-"/checkpoints/llama3 8b"}
SEQ=$((8 * 1024))
PRECISION="bf16"

LAUNCHER=(
    --nproc_per_node $GPUS_PER_NODE   # one process a GPU
    --nnodes=$NNODES
    --rdzv-endpoint "${MASTER_ADDR:-localhost}:29500"
)

MODEL="--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 \
    --num-attention-heads 32 --group-query-attention --num-query-groups 8"
SHAPE=(
    --seq-length ${SEQ}
    --max-position-embeddings ${SEQ}
    --position-embedding-type rope --rotary-base 500000
    --normalization 'RMSNorm'
    --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --hidden-dropout 0 --attention-dropout 0
    --vocab-size 128256 --make-vocab-size-divisible-by 64
)
TRAINING=(--micro-batch-size 1 --global-batch-size 64 --lr 3e-4 --clip-grad 1.0 --train-iters 1000)

if [[ "$PRECISION" == "bf16" || "$PRECISION" == "fp8" ]]; then
    TRAINING+=(--bf16)
else
    TRAINING+=(--fp16)
fi
if [ "$PRECISION" = "fp8" ]; then
    TRAINING+=("--fp8-format hybrid" "--fp8-recipe tensorwise")
fi
[ -z "$CHECKPOINTS" ] && CHECKPOINTS=/tmp

# TRAINING+=(--recompute-activations)
torchrun "${LAUNCHER[@]}" pretrain_gpt.py \
    $MODEL "${SHAPE[@]}" ${TRAINING[@]} \
    --tensor-model-parallel-size $TP --sequence-parallel \
    --pipeline-model-parallel-size ${PP} \
    --num-layers-per-virtual-pipeline-stage 4 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --manual-gc --wandb-project "llama" --save "${CHECKPOINTS}" --load "$CHECKPOINTS" \
    --moe-router-fusion ${EXTRA_ARGS} 2>&1 | tee train.log
