#!/usr/bin/env bash
# The paper's release from texts to cards: SAEs on five layers of Qwen2.5-3B-Instruct, with one process per GPU.
#
#   bash scripts/safe_sail_qwen2.5-3b.sh                                    all GPUs of this machine
#   GPUS=2 bash scripts/safe_sail_qwen2.5-3b.sh                             two of them
#   bash scripts/safe_sail_qwen2.5-3b.sh --set train.stream_tokens=100000000    with another setting
#
# It fetches the model and the texts from the Hugging Face Hub. Stopped anywhere, the same command goes on.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RECIPE=hub/recipes/qwen2.5-3b.toml
OUT=${OUT:-runs/qwen2.5-3b}
PATH="$PWD/.venv/bin:$PATH" # where scripts/demo and scripts/test install; an activated environment will do as well

if [ -z "${GPUS:-}" ]; then
  GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
fi
if ! [[ "$GPUS" =~ ^[1-9][0-9]*$ ]]; then
  printf '%s\n' "safe_sail_qwen2.5-3b.sh: GPUS is '$GPUS'; this needs at least one GPU, as in: GPUS=1 bash $0" >&2
  exit 2
fi

# 1. The plan: tokens, FLOPs, memory of a GPU and of the machine, disk and time. It ends here if that cannot fit, with
#    the settings that would. WORLD_SIZE makes it the plan of so many processes without starting them.
WORLD_SIZE=$GPUS safesail run "$RECIPE" --out "$OUT" "$@" --dry-run

# 2. Harvest and train, one process per GPU: all make shards of activations, then each trains the SAEs of its own hook
#    points (five of them: more than five GPUs are of use only with --set runtime.parallel=data, where all train each
#    SAE on shares of its batches). --no-python, because `safesail` is a command and not a Python file.
torchrun --standalone --nproc-per-node "$GPUS" --no-python safesail run "$RECIPE" --out "$OUT" "$@" --until train

# 3. The rest in one process: fidelity, selection, examples, explanations, scores, and the folders with their cards.
safesail run "$RECIPE" --out "$OUT" "$@"

# 4. The inspector of the release.
printf '%s\n' "to look at it: safesail serve $OUT"
