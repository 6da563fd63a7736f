#!/usr/bin/env bash
# Measurements for one sitting at a GPU: each STEP ends within ten minutes and writes to OUT as it goes.
#
#   OUT=results DATA=DIR bash benchmarks/gpu.sh STEP      STEP: tests plans training sharing trial inference airbench
#
# DATA: class folders of CIFAR-10. SMALL=1 tries the same steps with little work, on any machine. AIRBENCH: a script of
# the CIFAR-10 speed record, brought along for `airbench`: what the card can do with another recipe.
set -euo pipefail
step=$1
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
data=(data.name=images "data.root=${DATA:-}")
net=(architecture=final epochs=10 rounds=2)
plans=(precision=auto threads=8)
sizes=[1,8,64,256,1024,4096]
if [ -n "${SMALL:-}" ]; then
  data+=(data.limit=20)
  net=(architecture=model1 epochs=1 rounds=2)
  plans=("architectures=[baseline]" rounds=3 images=1000)
  sizes=[1,8]
fi
mkdir -p "$OUT"
case $step in
  tests) "$python" -m pytest -q -m gpu 2>&1 | tee "$OUT/tests.txt" ;;
  plans) "$python" -m benchmarks.plans "${plans[@]}" "out=$OUT/plans.csv" ;;
  training) "$python" -m benchmarks.training "${net[@]}" trials=2 "${data[@]}" "out=$OUT/training" ;;
  sharing)
    "$python" -m benchmarks.training "${net[@]}" trials=8 "arms=[harness_1,harness_2,harness_4,harness_8]" \
      "${data[@]}" "out=$OUT/sharing"
    ;;
  trial)
    "$python" -m harness.tune space=final "${data[@]}" search.samples=1 "stages=[search]" "run=$OUT/trial" \
      ${SMALL:+trial.architecture=model1 trial.epochs=1}
    ;;
  inference) # of what `trial` left
    "$python" -m export "run=$OUT/trial" "export.formats=[onnx,onnx_rewritten,onnx_int8,onnx_fp16]"
    "$python" -m benchmarks "run=$OUT/trial" benchmark.full=true \
      "benchmark.batch_sizes=$sizes" ${SMALL:+benchmark.replicates=2}
    ;;
  airbench) time "$python" "${AIRBENCH:?give the path of the script}" 2>&1 | tee "$OUT/airbench.txt" ;;
  *) echo "unknown step $step" >&2; exit 2 ;;
esac
