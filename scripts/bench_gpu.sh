#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests marked gpu, then all benchmarks. Tables go to the screen and to the
# folder given as first argument (default runs/bench-gpu).
#
#   bash scripts/bench_gpu.sh            # tests, benchmarks
#   TUNE=1 bash scripts/bench_gpu.sh     # first measure this GPU's tiles and write them into the package's table
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
if [ ! -x "$python" ] && ! command -v "$python" >/dev/null; then
  source scripts/setup.sh
  ensure_environment test
fi
out="${1:-runs/bench-gpu}"
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name(), torch.__version__)'
"$python" -m pytest -q -m gpu tests | tee "$out/tests.txt"
"$python" -m pytest -q tests/ops/test_packed_linear.py tests/ops/test_grouped_packed_linear.py tests/ops/test_gumbel_softmax.py -k "gpu or kernels" |
  tee "$out/kernel-tests.txt"
if [ "${TUNE:-0}" = 1 ]; then
  "$python" scripts/bench_linear.py --tune | tee "$out/tune.txt"
fi
"$python" scripts/bench_sampling.py --json "$out/sampling.json" | tee "$out/sampling.txt"
for model in 8b 70b; do
  "$python" scripts/bench_linear.py --model "$model" --json "$out/linear-$model.json" --figure "$out/linear-$model.png" |
    tee "$out/linear-$model.txt"
done
"$python" scripts/bench_experts.py --device cuda | tee "$out/experts.txt"
"$python" scripts/bench_block.py --device cuda --sequences 8 --tokens 2048 | tee "$out/block.txt"
