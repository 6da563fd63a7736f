#!/usr/bin/env bash
# What this project measures on a GPU: each step in turn, what it printed in OUT/STEP.log, how it ended in OUT/steps.csv.
#
#   OUT=results DATA=DIR bash benchmarks/gpu.sh [STEP ...]     default: all but airbench
#
#   machine    GPU, driver, versions, what sees the GPU
#   tests      pytest -m gpu
#   plans      every way to execute a training step: the same gradients, images a second, what choosing costs
#   trial      `final` for ten epochs with the harness's defaults: accuracy, seconds by kind of work, peak memory
#   export     its files, compared with PyTorch on every test image
#   inference  every runtime with every file, host and device arrays, batches of 1 to 4,096
#   training   trials per hour against plain PyTorch and Ray's tutorial
#   sharing    1, 2, 4 and 8 trials at once on the GPU
#   airbench   the time of AIRBENCH, a script of the CIFAR-10 speed record: what the GPU can do with another recipe
#
# DATA: class folders of CIFAR-10; without it, it is downloaded. DEADLINE: seconds after which no step goes on. SMALL=1
# tries the same with little work, on any machine. Where a step fails the others go on (`export` and
# `inference` need `trial`), and the exit code is 1.
set -uo pipefail
top=$PWD # where DATA and OUT are relative to
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} deadline=${DEADLINE:-86400} failed=0
OUT=$(cd "$top" && mkdir -p "${OUT:?give the folder for the results}" && realpath "$OUT")
DATA=${DATA:+$(cd "$top" && realpath "$DATA")}
export OUT DATA
data=(data.name=cifar10)
[ -z "$DATA" ] || data=(data.name=images "data.root=$DATA")
network=(trial.architecture=final trial.epochs=10)
plans=(precision=auto threads=8)
training=(architecture=final epochs=10 trials=2 rounds=3)
together=(architecture=final epochs=10 trials=8 rounds=2 "arms=[harness_1,harness_2,harness_4,harness_8]")
sizes=[1,8,64,256,1024,4096] replicates=3
if [ -n "${SMALL:-}" ]; then
  data+=(data.limit=20)
  network=(trial.architecture=baseline trial.epochs=1)
  plans=("architectures=[baseline]" precision=float32 rounds=3 images=1000)
  training=(architecture=baseline epochs=1 trials=1 rounds=2 loader_workers=0)
  together=(architecture=baseline epochs=1 trials=2 rounds=2 "arms=[harness_1,harness_2]")
  sizes=[1,8] replicates=2
fi

machine() {
  command -v nvidia-smi >/dev/null && nvidia-smi
  "$python" - <<'PY'
import json
from harness.run import gpus, system

print(json.dumps(system.environment().to_json(), indent=2))
print(gpus.unusable() or f"PyTorch uses {gpus.usable()} GPUs")
import onnxruntime, torch
print("onnxruntime", onnxruntime.__version__, onnxruntime.get_available_providers())
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability())
PY
}

inference() {
  local scope=host
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' && scope=both
  "$python" -m benchmarks "run=$OUT/run" benchmark.full=true benchmark.scope=$scope "benchmark.batch_sizes=$sizes" \
    benchmark.replicates=$replicates
}

run() {
  case $1 in
    machine) machine ;;
    tests) "$python" -m pytest -q -m gpu ;;
    plans) "$python" -m benchmarks.plans "${plans[@]}" "out=$OUT/plans.csv" ;;
    trial)
      "$python" -m harness.tune space=final "${data[@]}" "${network[@]}" search.samples=1 \
        "stages=[search,confirm]" "run=$OUT/run"
      ;;
    export)
      "$python" -m export "run=$OUT/run" "export.formats=[onnx,onnx_rewritten,onnx_int8,onnx_fp16]" export.uint8=false
      ;;
    inference) inference ;;
    training) "$python" -m benchmarks.training "${training[@]}" "${data[@]}" "out=$OUT/training" ;;
    sharing) "$python" -m benchmarks.training "${together[@]}" "${data[@]}" "out=$OUT/sharing" ;;
    airbench) time "$python" "${AIRBENCH:?give the path of the script}" ;;
    *) echo "unknown step $1" >&2; return 2 ;;
  esac
}

if [ "${1:-}" = --one ]; then # of the loop below, which limits its time
  run "$2"
  exit
fi
[ $# -gt 0 ] || set -- machine tests plans trial export inference training sharing
[ -f "$OUT/steps.csv" ] || echo step,seconds,exit_code >"$OUT/steps.csv"
for step in "$@"; do
  left=$((deadline - SECONDS)) begun=$SECONDS
  if [ "$left" -lt 15 ]; then echo "$step: left out, $left s are left"; failed=1; continue; fi
  timeout -k 10 "$left" bash benchmarks/gpu.sh --one "$step" >"$OUT/$step.log" 2>&1
  code=$?
  [ $code -eq 0 ] || failed=1
  tail -n 12 "$OUT/$step.log" | cut -c1-300
  echo "== $step: exit code $code after $((SECONDS - begun)) s"
  echo "$step,$((SECONDS - begun)),$code" >>"$OUT/steps.csv"
done
exit $failed
