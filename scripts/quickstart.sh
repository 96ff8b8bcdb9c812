#!/usr/bin/env bash
# The whole story on small data and two CPU cores, in about 20 minutes: draws pictures, trains a language model,
# then a vision-language model in two stages, asks it, exports it. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh

out=out/demo
data=$out/data
hidden=128

echo "MiniMind-V quickstart. It downloads nothing but packages. Results, 0.5 GB, go to $out."
install
mkdir -p $out/done $out/begun

# A finished stage leaves $out/done/NAME: the seconds it took, then what made it.
made_by() { sed 1d "$out/done/$1" 2>/dev/null || true; }
mark() { printf '%s\n%s\n' "$2" "$3" >"$out/done/$1"; } # mark NAME SECONDS MADE_BY

# stage NAME OUTPUT COMMAND...: skipped where OUTPUT is there and the same command, code, encoder and data made it,
# unless a stage before it was not skipped. A training that was stopped goes on, unless any of these has changed.
redo=
stage() {
    local name=$1 output=$2 run=$out/runs/$(basename "${2%.*}") start=$SECONDS
    shift 2
    if [ -z "$redo" ] && [ -e "$output" ] && [ "$(made_by "$name")" = "$state $*" ]; then
        printf '\n== %s: done before\n' "$name"
        return
    fi
    redo=yes
    rm -f "$out/done/$name"
    if [ "$(cat "$out/begun/$name" 2>/dev/null)" != "$state $*" ]; then
        rm -rf "$run"
        printf '%s\n' "$state $*" >"$out/begun/$name"
    fi
    step "$name" .venv/bin/python "$@"
    [ ! -d "$run" ] || .venv/bin/python scripts/demo/loss_bands.py "$run" || true # it says what is not as usual
    mark "$name" "$((SECONDS - start))" "$state $*"
}

# Said once: later stages follow the weights that they start from.
model="--hidden_size $hidden --num_hidden_layers 4 --num_attention_heads 2 --num_key_value_heads 2"
# A model this narrow is no faster in bfloat16, also on hardware that is made for it; and figures should not
# depend on the machine.
dtype="--dtype float32"
common="$dtype --out_dir $out --batch_size 16 --warmup_iters 50 --num_workers 1 --epochs 100"
images="--images_path $data --cache_features $out/features"
samples="--sample_data_path $data/val.jsonl --sample_rows 9" # nine show most kinds of questions
score="eval_vlm.py $dtype --weight $out/sft_vlm_$hidden.pth --images_path $data --score --no_blank_baseline"

# Always run: it sees for itself whether its data are up to date, and changes nothing then.
start=$SECONDS
step "data" .venv/bin/python scripts/demo/make_demo_data.py --out_dir $data
manifest=$(cat $data/manifest.json)
[ "$(made_by data)" = "$manifest" ] || mark data "$((SECONDS - start))" "$manifest"

state=$({ find model dataset common trainer inference convert scripts ./*.py -name '*.py' | sort | xargs cat &&
    cat model/tokenizer/* model/vision_model/demo-encoder/* $data/manifest.json; } | cksum)
stage lm $out/lm_$hidden.pth \
    scripts/train_lm.py $model $common --data_path $data/lm.jsonl --learning_rate 2e-3 --max_steps 1500 \
    --log_interval 15
stage pretrain $out/pretrain_vlm_$hidden.pth \
    train_pretrain_vlm.py $common $images --vision_model_path model/vision_model/demo-encoder \
    --data_path $data/pretrain.jsonl --learning_rate 1e-3 --max_steps 750 \
    --log_interval 5 $samples --eval_interval 150
stage sft $out/sft_vlm_$hidden.pth \
    train_sft_vlm.py $common $images --data_path $data/sft.jsonl --learning_rate 1e-3 --max_steps 6000 \
    --log_interval 60 --eval_data_path $data/val.jsonl $samples --eval_interval 600
stage seen $out/report_seen.json $score --data_path $data/eval_seen.jsonl --report $out/report_seen.json
stage unseen $out/report_unseen.json $score --data_path $data/eval_unseen.jsonl --report $out/report_unseen.json
stage blank $out/report_blank.json \
    $score --data_path $data/eval_unseen.jsonl --blank_images --report $out/report_blank.json
stage export $out/hf/model.safetensors convert_to_hf.py --weight $out/sft_vlm_$hidden.pth --out $out/hf
step "report" .venv/bin/python scripts/demo/demo_report.py --out_dir $out
step "page" .venv/bin/python scripts/report.py $out/runs/sft_vlm_$hidden --out $out/report.html

cat <<END

Ask it yourself:
  .venv/bin/python eval_vlm.py --weight $out/sft_vlm_$hidden.pth --image dataset/eval_images/drawing_tiger.png --prompt "What is this?"
Its transformers folder is $out/hf, all figures are in $out/report.json.
See how it learnt, in a browser: $PWD/$out/report.html
END
