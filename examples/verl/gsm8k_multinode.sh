#!/usr/bin/env bash
# GSM8K with verl on several nodes, optimising an objective file of mirrorpo.
#
#   1. once:         examples/verl/gsm8k_multinode.sh data
#   2. head node:    examples/verl/gsm8k_multinode.sh head
#   3. other nodes:  HEAD=10.0.0.1 examples/verl/gsm8k_multinode.sh worker
#   4. head node:    NODES=4 examples/verl/gsm8k_multinode.sh train examples/objectives/kl3_prob_l2.yaml [verl settings]
#
# Every node needs the same environment: verl 0.9 with vLLM as verl's own documentation installs it, then
# `pip install --no-deps mirrorpo pyyaml pydantic`. The data folder must be on a shared file system or copied to every
# node; the objective file is needed on the head only: its content travels in verl's settings.
# Not run on GPUs here; what is tested on CPU is listed in docs/scale.md.
set -euo pipefail

NODES=${NODES:-2}
GPUS=${GPUS:-8}
MODEL=${MODEL:-Qwen/Qwen3-8B}
DATA=${DATA:-$PWD/data/gsm8k}
PORT=${PORT:-6379}
# Loads mirrorpo in every process, and stops verl if its hooks have moved.
export VERL_USE_EXTERNAL_MODULES=mirrorpo.integrations.verl

usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

data() {
    python - "$DATA" <<'PYTHON'
import sys
from pathlib import Path

from datasets import load_dataset

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
ASK = 'Let\'s think step by step and output the final answer after "####".'


def row(example, index, split):
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{example['question']} {ASK}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": example["answer"].split("####")[1].strip().replace(",", "")},
        "extra_info": {"split": split, "index": index},
    }


for split in ("train", "test"):
    rows = load_dataset("openai/gsm8k", "main", split=split)
    rows.map(lambda e, i: row(e, i, split), with_indices=True, remove_columns=rows.column_names).to_parquet(
        str(folder / f"{split}.parquet")
    )
PYTHON
}

train() {
    local objective=$1
    shift
    # Refuses, before anything starts, what verl cannot express.
    local text settings
    text=$(python -m mirrorpo.integrations verl "$objective")
    mapfile -t settings <<<"$text"
    [[ -f $DATA/train.parquet ]] || { echo "$DATA/train.parquet: no such file; run '$0 data' first" >&2; exit 2; }
    python -m verl.trainer.main_ppo \
        "${settings[@]}" \
        data.train_files="$DATA/train.parquet" \
        data.val_files="$DATA/test.parquet" \
        data.train_batch_size=1024 \
        data.max_prompt_length=512 \
        data.max_response_length=1024 \
        data.filter_overlong_prompts=True \
        data.truncation=error \
        actor_rollout_ref.model.path="$MODEL" \
        actor_rollout_ref.model.enable_gradient_checkpointing=True \
        actor_rollout_ref.model.use_remove_padding=True \
        actor_rollout_ref.actor.strategy=fsdp2 \
        actor_rollout_ref.actor.optim.lr=1e-6 \
        actor_rollout_ref.actor.ppo_mini_batch_size=256 \
        actor_rollout_ref.actor.use_dynamic_bsz=True \
        actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
        actor_rollout_ref.rollout.name=vllm \
        actor_rollout_ref.rollout.n=8 \
        actor_rollout_ref.rollout.tensor_model_parallel_size=2 \
        actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
        trainer.project_name=mirrorpo \
        trainer.experiment_name="$(basename "${objective%.*}")" \
        trainer.logger='["console"]' \
        trainer.nnodes="$NODES" \
        trainer.n_gpus_per_node="$GPUS" \
        trainer.save_freq=50 \
        trainer.test_freq=10 \
        trainer.total_epochs=15 \
        "$@"
}

case ${1:-} in
    data) data ;;
    head) ray start --head --port="$PORT" --num-gpus="$GPUS" ;;
    worker) ray start --address="${HEAD:?the address of the head node}:$PORT" --num-gpus="$GPUS" ;;
    train) [[ $# -ge 2 ]] || usage; shift; train "$@" ;;
    *) usage ;;
esac
