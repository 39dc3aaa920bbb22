#!/bin/sh
# Runs the CPU kernels' tests and the hostile operands of the soak campaign under AddressSanitizer and
# UndefinedBehaviorSanitizer, once for each instruction set, and then under ThreadSanitizer. Any finding is fatal.
# Arguments are passed on to pytest; CAPABILITIES names the instruction sets, OPERANDS the number of calls with hostile
# operands.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CXX=${CXX:-g++}
BUILD=build/sanitize
mkdir -p "$BUILD"

TORCH=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')

# build OUTPUT FLAG...: the Python API is not used, so the stable ABI needs no Python headers.
build() {
    output=$1
    shift
    "$CXX" -std=c++17 -O1 -g -fPIC -shared -ffp-contract=off -fno-omit-frame-pointer -Wall -Wextra "$@" \
        -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$TORCH/include" \
        csrc/bindings.cpp csrc/cpu/*.cpp -L"$TORCH/lib" -ltorch_cpu -lc10 -o "$output"
}

# preloading LIBRARY... -- COMMAND...: the runtimes of sanitizers come before everything else.
preloading() {
    preloaded=
    while [ "$1" != -- ]; do
        preloaded="$preloaded $("$CXX" -print-file-name="$1")"
        shift
    done
    shift
    LD_PRELOAD=$preloaded DSPA_LIBRARY="$LIBRARY" DSPA_CPU_CAPABILITY=$capability "$@"
}

operands() {
    preloading "$@" -- env PYTHONPATH=.:tests "$PYTHON" -m soak.operands "${OPERANDS:-3000}"
}

LIBRARY=$BUILD/_C.sanitized.so
# -fno-sanitize=vptr: torch's libraries carry no type information for it.
build "$LIBRARY" -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all
# Leaks are not looked for: the interpreter keeps much of its memory until the end.
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
for capability in ${CAPABILITIES:-avx512 avx2 portable}; do
    echo "sanitized hostile operands, $capability"
    operands libasan.so libubsan.so
    echo "sanitized kernel tests, $capability"
    preloading libasan.so libubsan.so -- "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider \
        -k "cpu and not lesser_instruction_sets and not compiles_as_one_graph and not same_bits and not explained \
and not leaves_nothing_allocated" "$@"
done

LIBRARY=$BUILD/_C.threads.so
build "$LIBRARY" -fsanitize=thread -DDSPA_STD_THREADS=3
export TSAN_OPTIONS=halt_on_error=1 OMP_NUM_THREADS=1
capability=avx512
echo "hostile operands under ThreadSanitizer"
operands libtsan.so
echo "kernel tests under ThreadSanitizer"
preloading libtsan.so -- "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider \
    -k "cpu and not lesser_instruction_sets and not compiles_as_one_graph and not same_bits and not explained and not leaves_nothing_allocated" "$@"
