#!/usr/bin/env bash
# Checks that lmms-eval runs on an exported folder: bash scripts/lmms_eval/test_lmms_eval.sh [ENVIRONMENT]
# Makes an environment of its own (.venv-lmms, 2.5 GB), trains a model of eighteen rows, has lmms-eval score it
# without network on local tasks in POPE's and MMMU's format, and compares with the known scores.
set -euo pipefail
cd "$(dirname "$0")/../.."

venv=${1:-.venv-lmms}
folder=out/lmms_eval_test
lmms_eval=0.7.3
uv=0.13.9
torch=$(sed -n 's/^torch==//p' constraints.txt)
transformers=$(sed -n 's/^transformers==//p' constraints.txt)
wanted="$lmms_eval $(cksum <constraints.txt)"

if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "== packages into $venv: about 1 GB of downloads"
    ${PYTHON:-python3} -m venv --clear "$venv"
    pip="$venv/bin/python -m pip install --quiet"
    $pip "torch==$torch+cpu" 2>/dev/null || {
        $pip "uv==$uv"
        "$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --torch-backend cpu "torch==$torch" torchvision
    }
    # Packages that it shares with us in our versions: its own range lets in ones that break it. Without torch in
    # this command too, the newest torchvision would bring another one, with CUDA.
    $pip "lmms-eval==$lmms_eval" "torch==$torch" "transformers==$transformers" -c constraints.txt
    # The default package index has torchvision for CUDA only, which does not load beside a CPU build of torch.
    # Nothing here needs it, and transformers would stumble over a broken one.
    "$venv/bin/python" -c "import torchvision" 2>/dev/null || "$venv/bin/python" -m pip uninstall --quiet -y torchvision
    echo "$wanted" >"$venv/installed"
fi

export HF_HUB_OFFLINE=1
rm -rf "$folder"
echo "== model and tasks"
"$venv/bin/python" scripts/lmms_eval/lmms_eval_local_task.py make "$folder"
echo "== lmms-eval"
"$venv/bin/python" scripts/lmms_eval/lmms_eval_model.py --model minimind_v --model_args "pretrained=$folder/hf" \
    --tasks pope_local,mmmu_local --include_path "$folder/tasks" --batch_size 5 --device cpu \
    --output_path "$folder/results" --log_samples
echo "== scores"
"$venv/bin/python" scripts/lmms_eval/lmms_eval_local_task.py check "$folder"
