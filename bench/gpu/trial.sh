#!/usr/bin/env bash
# What to measure on a bare GPU machine that is at hand for minutes only (tried for sm_90, 16 cores, Python 3.12,
# torch 2.11 for CUDA 13.0, nvcc 13, no network):
#
#   bash bench/gpu/trial.sh prepare   where there is a package index, about 3 min: packs wheels and llama.cpp's source into .gpu/ (20 MB)
#   bash bench/gpu/trial.sh phase1    on that machine, in the checkout's root, at most 230 s: does every family and method train?
#   bash bench/gpu/trial.sh phase2    there too, at most 470 s: the figures. Best at once after phase1: llama.cpp was then built meanwhile
#   bash bench/gpu/trial.sh phase3    on another day, at most 570 s: the curricula of bench/curricula.py on the machine's cores; its GPU is
#                                     not used. ARMS="tapir uniform-refined" and SEEDS="1 2 3" choose; finished runs come back in runs.tgz
#
# Results and logs go to $OUT (default /tmp/out). Every step has a time limit of its own, and one that could not end
# before the deadline is left out. TINY=1 uses tiny students and no llama.cpp build, to try the script on a CPU; PY is
# the Python to use.
set -u
ROOT=$PWD
SITE=/tmp/site M=/tmp/m BUILD=/tmp/llama-build WORK=/tmp/trial
LLAMA=llama_cpp_python-0.3.36
TINY=${TINY:-}

prepare() {
  set -e
  mkdir -p .gpu
  local wheels=${WHEELS:-/tmp/gpu-wheels} site pip package tree vendor source wheel
  mkdir -p "$wheels"; site=$(mktemp -d)
  pip="python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp"
  for tag in 2_28 2_27 2_24 2_17; do pip="$pip --platform manylinux_${tag}_x86_64"; done
  pip="$pip --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d $wheels"
  # what such a machine lacks; the versions were tried together
  for package in unsloth==2026.10.7 unsloth_zoo==2026.10.7 trl==1.14.2 peft==0.21.2 datasets==4.8.5 dill==0.4.1 \
    multiprocess==0.70.19 bitsandbytes==0.50.2 cut_cross_entropy==25.1.1 gguf==0.19.0 pydantic==2.14.4 \
    pydantic_core==2.50.5 annotated-types typing-inspection typing-extensions openai==3.57.0 httpx2==2.16.2 \
    httpcore2==2.16.2 truststore sniffio distro jiter anyio idna click rich sqlite-utils==4.2.1 sqlite-fts4 \
    click-default-group pluggy lz4==4.4.5 zstandard==0.25.0 orjson==3.13.0 rapidfuzz==3.14.6 diskcache; do $pip "$package"; done
  for wheel in "$wheels"/*.whl; do
    case $wheel in
      */unsloth-*) unzip -qo "$wheel" 'unsloth/*' '*.dist-info/METADATA' -d "$site" ;;  # without its studio, 80 MB
      */bitsandbytes-*) unzip -qo "$wheel" -x '*cuda11*' '*cuda12*' '*cuda132*' '*rocm*' '*xpu*' -d "$site" ;;
      *) unzip -qo "$wheel" -d "$site" ;;
    esac
  done
  [ -f "$wheels/$LLAMA.tar.gz" ] || python3 -m pip download -q --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36 -d "$wheels"
  tree=$(mktemp -d); tar xzf "$wheels/$LLAMA.tar.gz" -C "$tree"; vendor=$tree/$LLAMA/vendor/llama.cpp
  mkdir -p "$site/llama_cpp/lib" "$site/$LLAMA.dist-info"; cp "$tree/$LLAMA"/llama_cpp/*.py "$site/llama_cpp/"
  printf 'Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n' >"$site/$LLAMA.dist-info/METADATA"
  tar cf - -C "$site" . | xz -T0 -6 >.gpu/site.txz
  source=$(mktemp -d); mkdir -p "$source/ggml/src" "$source/tools"
  cp -r "$vendor"/{CMakeLists.txt,cmake,src,include,common,vendor,scripts} "$source/"; cp "$vendor"/*.in "$source/" 2>/dev/null || true
  cp -r "$vendor"/ggml/{CMakeLists.txt,cmake,include} "$source/ggml/"
  find "$vendor/ggml/src" -maxdepth 1 -type f -exec cp {} "$source/ggml/src/" \;
  cp -r "$vendor"/ggml/src/{ggml-cpu,ggml-cuda} "$source/ggml/src/"; cp -r "$vendor/tools/batched-bench" "$source/tools/"
  printf 'find_package(Threads REQUIRED)\nadd_subdirectory(batched-bench)\n' >"$source/tools/CMakeLists.txt"
  tar cf - -C "$source" . | xz -T0 -6 >.gpu/llama.txz
  rm -rf "$site" "$tree" "$source"
  ls -la .gpu
}

# ---- on the GPU machine ---------------------------------------------------------------------------------------------
begin() {  # seconds that this phase may take
  START=$(date +%s); DEADLINE=$((START + $1))
  OUT=${OUT:-/tmp/out}; LOGS=/tmp/logs; mkdir -p "$OUT" "$LOGS" "$WORK"
  [ -d /dev/shm ] && [ "$(df --output=avail -k /dev/shm | tail -1)" -gt 40000000 ] && M=/dev/shm/m  # 15 GB of weights
  mkdir -p "$M"
  export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= TMPDIR=$WORK
  PY=${PY:-$(command -v python3)}
  [ -n "$TINY" ] && { export PYTHONPATH=$ROOT; return; }
  export PYTHONPATH=$SITE:$ROOT
  CUDA=$($PY -c 'import nvidia,os; print(os.path.join(list(nvidia.__path__)[0],"cu13"))')
  export LD_LIBRARY_PATH=$CUDA/lib:/usr/local/cuda/lib64:${LD_LIBRARY_PATH:-}
  [ -d $SITE/trl ] || { mkdir -p $SITE && tar xJf "$ROOT/.gpu/site.txz" -C $SITE; }
}
left() { echo $((DEADLINE - $(date +%s))); }
step() {  # name, most seconds, fewest seconds that make sense, command...
  local name=$1 most=$2 least=$3 began rc; shift 3; began=$(date +%s)
  [ "$(left)" -lt "$least" ] && { echo "== $name left out, $(left) s left"; return 1; }
  [ "$(left)" -lt "$most" ] && most=$(left)
  timeout -k 3 "$most" "$@" >"$LOGS/$name.out" 2>"$LOGS/$name.err"; rc=$?
  echo "== $name rc $rc, $(($(date +%s) - began)) s"; return $rc
}
show() { [ -s "$LOGS/$1.out" ] && tail -c "${2:-1500}" "$LOGS/$1.out"; [ -s "$LOGS/$1.out" ] || tail -c 900 "$LOGS/$1.err"; }
info() {
  nvidia-smi --query-gpu=name,memory.total,memory.free,driver_version --format=csv,noheader
  grep -E 'MemTotal|MemAvailable' /proc/meminfo; nproc; df -h /tmp /dev/shm | tail -2; nvcc --version | tail -2 | head -1; g++ --version | head -1
  $PY -c 'import torch, transformers, peft, trl, datasets, numpy; print(torch.__version__, transformers.__version__, peft.__version__, trl.__version__, datasets.__version__, numpy.__version__, torch.cuda.get_device_capability())'
  $PY -c 'import sysconfig, os; print("Python.h", os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))'
}
build_llama() {  # in the background, nice: 141 CUDA files, some 2,300 CPU-seconds for one architecture
  [ -n "$TINY" ] || [ -e $SITE/llama_cpp/lib/libggml-cuda.so ] && return
  mkdir -p /tmp/llama && tar xJf "$ROOT/.gpu/llama.txz" -C /tmp/llama
  local driver vmm=-DGGML_CUDA_NO_VMM=ON
  driver=$(ls /usr/local/nvidia/lib64/libcuda.so.1 /usr/lib/x86_64-linux-gnu/libcuda.so.1 2>/dev/null | head -1)
  [ -n "$driver" ] && vmm=-DCUDA_cuda_driver_LIBRARY=$driver
  setsid nice -n 19 bash -c "
    cmake -G Ninja -S /tmp/llama -B $BUILD -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DGGML_CUDA=ON \
      -DCMAKE_CUDA_ARCHITECTURES=90-real -DGGML_NATIVE=OFF -DGGML_AVX512=OFF -DGGML_CCACHE=OFF -DGGML_CUDA_FA_QUANTS=f16-f16 \
      -DGGML_CUDA_NCCL=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
      -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_COMMON=ON \
      -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=\$ORIGIN' -DCMAKE_CUDA_FLAGS=-I$CUDA/include -DCMAKE_CXX_FLAGS=-I$CUDA/include \
      -DCUDA_cublas_LIBRARY=$CUDA/lib/libcublas.so.13 -DCUDA_cublasLt_LIBRARY=$CUDA/lib/libcublasLt.so.13 \
      $vmm -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined &&
    ninja -C $BUILD -j 14 ggml-cuda llama llama-batched-bench && cp -P $BUILD/bin/lib*.so* $SITE/llama_cpp/lib/ && echo BUILT \$(date +%s)
  " >$LOGS/build.out 2>&1 </dev/null &
}
built() { [ -n "$TINY" ] || grep -q BUILT $LOGS/build.out; }
wait_built() {
  while ! built && [ "$(left)" -gt "$1" ] && ! grep -q 'FAILED\|CMake Error' $LOGS/build.out; do sleep 2; done
  [ -n "$TINY" ] || tail -1 $LOGS/build.out
  built
}
finish() {
  rm -f $LOGS/*.tgz; tar czf "$OUT/logs.tgz" -C /tmp logs; cp $LOGS/*.jsonl "$OUT/" 2>/dev/null; ls -la "$OUT"
  echo "seconds $(($(date +%s) - START))"
}

phase1() {
  begin 215; info 2>&1 | tee $LOGS/info.out; build_llama
  local names="smollm2-135m qwen2-0.5b mistral-tiny gemma2-tiny qwen3-0.6b gemma3-270m" less=
  [ -n "$TINY" ] && names="llama3-tiny qwen2-tiny gemma2-tiny" less="--rows 24 --length 160"
  rm -f $LOGS/trl.jsonl $LOGS/unsloth.jsonl
  step students 40 10 "$PY" bench/gpu/students.py "$M" $names; show students 400
  step families-trl 150 20 "$PY" bench/gpu/families.py train trl "$M" $LOGS/trl.jsonl $names $less & local trl=$!
  step families-unsloth 150 20 "$PY" bench/gpu/families.py train unsloth "$M" $LOGS/unsloth.jsonl $names $less; wait $trl
  "$PY" bench/gpu/families.py summary $LOGS/trl.jsonl $LOGS/unsloth.jsonl
  tail -2 $LOGS/families-unsloth.err | cut -c1-300; [ -n "$TINY" ] || tail -1 $LOGS/build.out | cut -c1-100; finish
}

phase2() {
  begin 455; info 2>&1 | tee $LOGS/info.out | head -3; build_llama
  local small=qwen2-1.5b smaller=qwen2-0.5b large=qwen2-7b batched="--batched-bench $BUILD/bin/llama-batched-bench" gpu=--gpu rows=160 length=1024
  [ -n "$TINY" ] && { small=qwen2-tiny smaller=llama3-tiny large=mistral-tiny batched= gpu= rows=96 length=256; }
  local layers=32 hidden=4096; [ -n "$TINY" ] && layers=1 hidden=256
  nice -n 10 "$PY" -c "import sys; sys.path[:0] = ['bench']; from pathlib import Path; from gpu_generate import write_model; write_model(Path('$WORK/7b-q8_0.gguf'), $layers, $hidden)" >$LOGS/gguf.out 2>&1 & local gguf=$!
  step students 70 20 "$PY" bench/gpu/students.py "$M" $small $smaller $large; show students 300
  wait $gguf
  if wait_built 60; then
    # 1. a whole run with Unsloth: train, export, gate, answers, a second training from the first
    rm -rf $WORK/cache
    step quickstart 150 60 "$PY" cli.py distill --rounds 1 --cache $WORK/cache; tail -c 1200 $LOGS/quickstart.err; tail -c 1500 $LOGS/quickstart.out
    tar czf "$OUT/run.tgz" -C $WORK/cache --exclude='*.gguf' --exclude='*.safetensors' --exclude='teacher.db*' . 2>/dev/null
    local gguf_path; gguf_path=$(find $WORK/cache -name student.gguf | head -1)
    for first in torch llama; do
      step together-$first 40 15 cuda-gdb -batch -ex run -ex 'bt 20' --args "$PY" bench/gpu/together.py $first "$gguf_path"; show together-$first 1500
    done
    step together-hidden 20 10 env CUDA_VISIBLE_DEVICES= "$PY" bench/gpu/together.py torch "$gguf_path"; show together-hidden 300
    step tests 60 30 env TAPIR_TEST_GPU=1 "$PY" -m pytest -n0 -q -p no:cacheprovider tests/test_gpu.py -k 'llama_cpp or main_process'; show tests 800
    step tests-hidden 60 30 "$PY" -m pytest -n0 -q -p no:cacheprovider tests/inference/test_generate.py tests/inference/test_device_choice.py; show tests-hidden 800
  fi
  # 2. Unsloth beside plain TRL and PEFT, real shapes, 16 rows a step, after llama.cpp has been built
  local train="bench/gpu_train.py --length $length --batch 16 --micro 4 --logs $LOGS --deadline"
  step train-1.5b 120 60 "$PY" $train $((DEADLINE - 40)) --rows $((2 * rows)) --plan "$M/$small:lora:unsloth" "$M/$small:lora:trl"; show train-1.5b
  step train-full 120 60 "$PY" $train $((DEADLINE - 40)) --rows $((2 * rows)) --plan "$M/$smaller:full:trl" "$M/$smaller:full:unsloth"; show train-full
  # 3. answering: ours, the loop, llama-batched-bench. Tokens chosen by NumPy first: a fault of the choice on the device
  # then costs only the steps after it. The second model has a vocabulary of 152,000.
  if built; then
    local seven="$WORK/7b-q8_0.gguf $gpu --parallel 64 --prompt-tokens 128 --max-tokens 128 --threads 8 --repeats 2"
    local wide="$WORK/small.gguf $gpu --parallel 128 --prompt-tokens 128 --max-tokens 64 --threads 8 --repeats 2"
    step generate-7b 80 30 "$PY" bench/generate.py $seven $batched --loop-prompts 3 --choose numpy; show generate-7b
    step export-1.5b 40 25 "$PY" -c "from pathlib import Path; from tapir_local.export.export import export_gguf; export_gguf(Path('$M/$small'), Path('$WORK/small.gguf'), adapter=None, quant='q8_0')" \
      && { step generate-1.5b 60 20 "$PY" bench/generate.py $wide $batched --loop-prompts 0 --choose both; show generate-1.5b; }
  fi
  step train-7b 130 80 "$PY" $train $((DEADLINE - 40)) --rows $rows --plan "$M/$large:qlora:unsloth" "$M/$large:qlora:trl"; show train-7b
  finish
}

phase3() {  # the pocket student is too small for a GPU; a core makes a run of three rounds in two to three minutes
  begin 560; export CUDA_VISIBLE_DEVICES= PYTHONPATH=/tmp/site-cpu:$PYTHONPATH
  if [ -z "$TINY" ]; then  # a llama.cpp without CUDA: with CUDA it crashes beside torch
    mkdir -p /tmp/llama /tmp/site-cpu && tar xJf "$ROOT/.gpu/llama.txz" -C /tmp/llama && cp -r $SITE/llama_cpp /tmp/site-cpu/
    rm -f /tmp/site-cpu/llama_cpp/lib/*
    step build-cpu 200 60 bash -c "cmake -G Ninja -S /tmp/llama -B $BUILD-cpu -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON \
      -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF \
      -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_TOOLS=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=\$ORIGIN' &&
      ninja -C $BUILD-cpu -j $(nproc) llama && cp -P $BUILD-cpu/bin/lib*.so* /tmp/site-cpu/llama_cpp/lib/" || { show build-cpu; finish; return; }
  fi
  local arms=${ARMS:-"tapir-refine-all refine-all-wsd uniform-refined uniform-refined-wsd refine-all-one-round refine-all-one-round-wsd"}
  local seeds=${SEEDS:-"1 2 3 4 5"} less=
  [ -n "$TINY" ] && arms="uniform-refined" seeds=1 less="--set seeds.limit=300 --set seeds.holdout=40 --set curriculum.rows=32 --set curriculum.pool=40 --set curriculum.first_rows=32 --set classifier.labelled=100 --set rounds=1"
  local bench="bench/curricula.py --folder $WORK/curricula --arms $arms --seeds $seeds $less"
  step curricula $(($(left) - 40)) 60 "$PY" $bench --workers $(nproc); tail -5 $LOGS/curricula.err
  step report 30 5 "$PY" $bench --report; show report 9000
  tar czf "$OUT/runs.tgz" -C $WORK/curricula --exclude='*.gguf' --exclude='*.safetensors' --exclude='teacher.db*' --exclude='*.pt' . ; finish
}

case ${1:-} in
  prepare) prepare ;; phase1) phase1 ;; phase2) phase2 ;; phase3) phase3 ;;
  *) echo "usage: $0 prepare|phase1|phase2|phase3" >&2; exit 2 ;;
esac
