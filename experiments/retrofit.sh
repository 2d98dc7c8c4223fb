#!/usr/bin/env bash
# Can a model that was pretrained without pauses still learn to use them? Continues its pretraining with and without
# pauses, then finetunes the four variants [Goyal et al. 2023] on SQuAD, CommonsenseQA and GSM8K, five seeds each.
#
#   python data/openwebtext.py --tokenizer=HuggingFaceTB/SmolLM2-135M
#   bash experiments/retrofit.sh HuggingFaceTB/SmolLM2-135M
#
# One GPU. Run it again to continue after an interruption. CONTINUE and VARIANTS are more arguments of train.py and of
# experiments/four_variants.py, OUT is the folder of everything; a trial on a CPU:
#   CONTINUE="--max_steps=2 --batch_size=2" VARIANTS="--seeds=1 --limit=4 --train=--max_steps=2" bash experiments/retrofit.sh ...
set -euo pipefail
cd "$(dirname "$0")/.."
model=${1:?name the model: bash experiments/retrofit.sh HuggingFaceTB/SmolLM2-135M}
out=${OUT:-out/retrofit}

for kind in standard pause; do
  # shellcheck disable=SC2086
  python train.py config/$kind.py config/continue.py --init_from="$model" --out_dir="$out/$kind" --resume ${CONTINUE:-}
done
# shellcheck disable=SC2086
python experiments/four_variants.py --pretrained_std="$out/standard" --pretrained_pause="$out/pause" \
  --tasks=squad,csqa,gsm8k --pauses=10 --seeds=5 --out_dir="$out/variants" ${VARIANTS:-}
