#!/usr/bin/env bash
# The whole story on small data and two CPU cores, in about 20 minutes: draws pictures, trains a language model,
# then a vision-language model in two stages, asks it, exports it. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh

out=out/demo
data=$out/data
hidden=128

echo "MiniMind-V quickstart. It downloads nothing but packages. Results, 0.3 GB, go to $out."
install
mkdir -p $out/done

# stage NAME COMMAND...: skipped where the same command has finished before, and so have all those before it.
redo=
stage() {
    local name=$1 mark=$out/done/$1 start=$SECONDS
    shift
    if [ -z "$redo" ] && [ -f "$mark" ] && [ "$(sed 1d "$mark")" = "$*" ]; then
        printf '\n== %s: done before\n' "$name"
        return
    fi
    redo=yes
    rm -f "$mark"
    step "$name" .venv/bin/python "$@"
    printf '%s\n%s\n' "$((SECONDS - start))" "$*" >"$mark"
}

model="--hidden_size $hidden --num_hidden_layers 4 --num_attention_heads 4 --num_key_value_heads 2"
common="$model --out_dir $out --batch_size 16 --learning_rate 3e-3 --warmup_iters 50 --num_workers 1 --epochs 100"
images="--images_path $data --vision_model_path model/vision_model/demo-encoder --cache_features $out/features"
score="eval_vlm.py --weight $out/sft_vlm_$hidden.pth --images_path $data --score"

stage data scripts/make_demo_data.py --out_dir $data
stage lm scripts/train_lm.py $common --data_path $data/lm.jsonl --max_steps 1000
stage pretrain train_pretrain_vlm.py $common $images --data_path $data/pretrain.jsonl --max_steps 750
stage sft train_sft_vlm.py $common $images --data_path $data/sft.jsonl --max_steps 4500 --log_interval 100 \
    --eval_data_path $data/val.jsonl
stage seen $score --data_path $data/eval_seen.jsonl --report $out/report_seen.json
stage unseen $score --data_path $data/eval_unseen.jsonl --report $out/report_unseen.json
stage blank $score --data_path $data/eval_unseen.jsonl --blank_images --report $out/report_blank.json
stage export convert_to_hf.py --weight $out/sft_vlm_$hidden.pth --out $out/hf
step "report" .venv/bin/python scripts/demo_report.py --out_dir $out

cat <<END

Ask it yourself:
  .venv/bin/python eval_vlm.py --weight $out/sft_vlm_$hidden.pth --image dataset/eval_images/drawing_tiger.png --prompt "What is this?"
Its transformers folder is $out/hf, all figures are in $out/report.json.
END
