#!/bin/sh
# Builds the library with AddressSanitizer and UndefinedBehaviorSanitizer and runs the CPU kernel tests and the hostile
# operands of the soak campaign under them, once for each instruction set. Any finding is fatal. Arguments are passed on
# to pytest; CAPABILITIES names the instruction sets, OPERANDS the number of calls with hostile operands.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
CXX=${CXX:-g++}
BUILD=build/sanitize
LIBRARY=$BUILD/_C.sanitized.so
mkdir -p "$BUILD"

TORCH=$("$PYTHON" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
# The Python API is not used, so the stable ABI needs no Python headers.
# -fno-sanitize=vptr: torch's libraries carry no type information for it.
"$CXX" -std=c++17 -O1 -g -fPIC -shared -ffp-contract=off -fno-omit-frame-pointer -Wall -Wextra \
    -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all \
    -DTORCH_TARGET_VERSION=0x020a000000000000 -isystem "$TORCH/include" \
    csrc/bindings.cpp csrc/cpu/*.cpp -L"$TORCH/lib" -ltorch_cpu -lc10 -o "$LIBRARY"

# Leaks are not looked for: the interpreter keeps much of its memory until the end.
sanitized() {
    LD_PRELOAD="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so)" \
        ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 \
        UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
        DSPA_LIBRARY="$LIBRARY" DSPA_CPU_CAPABILITY=$capability \
        "$@"
}

for capability in ${CAPABILITIES:-avx512 avx2 portable}; do
    echo "sanitized hostile operands, $capability"
    sanitized env PYTHONPATH=.:tests "$PYTHON" -m soak.operands "${OPERANDS:-3000}"
    echo "sanitized kernel tests, $capability"
    sanitized "$PYTHON" -m pytest tests/kernels -q -p no:cacheprovider -k "cpu and not lesser_instruction_sets \
and not compiles_as_one_graph and not same_bits and not explained and not leaves_nothing_allocated" "$@"
done
