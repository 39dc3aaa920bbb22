#include "amx_density.h"

#include "aligned_buffer.h"
#include "row_kernels.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include <immintrin.h>

namespace dspa::cpu {
namespace {

constexpr int64_t tile = 16;              // rows of a tile, and float32 columns
constexpr int64_t tile_pairs = chunk / 2;  // rows of a tile that holds pairs of bfloat16
constexpr int64_t block = 2 * tile;       // latents, and tokens, that are multiplied at a time
constexpr int64_t tile_elements = tile_pairs * 2 * tile;

// The operating system enables the matrix unit's registers on request only.
bool request_tiles() {
  constexpr long arch_req_xcomp_perm = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, tile_data) == 0;
}

bool processor_has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  return (edx & amx_bf16) != 0 && (edx & amx_tile) != 0;
}

// Tokens as tiles: [group of 16 tokens][chunk][part][pair][token][2].
class TokenTiles {
 public:
  TokenTiles(const std::vector<const float*>& inputs, int64_t columns, int parts, const ThreadPool& pool)
      : groups_((static_cast<int64_t>(inputs.size()) + block - 1) / block * 2),
        chunks_(packed_size(columns) / chunk),
        parts_(parts),
        values_(groups_ * chunks_ * parts * tile_elements) {
    pool.for_each(groups_, [&](int64_t group) {
      const int64_t group_size = chunks_ * parts_ * tile_elements;
      std::fill_n(values_.data() + group * group_size, group_size, uint16_t{0});
      const int64_t size = static_cast<int64_t>(inputs.size());
      for (int64_t t = group * tile; t < std::min(size, (group + 1) * tile); ++t)
        write(group, t - group * tile, inputs[static_cast<size_t>(t)]);
    });
  }

  int64_t chunks() const { return chunks_; }
  int parts() const { return parts_; }

  uint16_t* at(int64_t group, int64_t index, int part) const {
    return values_.data() + ((group * chunks_ + index) * parts_ + part) * tile_elements;
  }

 private:
  void write(int64_t group, int64_t token, const float* input) {
    for (int64_t c = 0; c < chunks_; ++c)
      for (int64_t i = 0; i < chunk; ++i) {
        float rest = input[c * chunk + packed_position(Dtype::bfloat16, i)];
        for (int part = 0; part < parts_; ++part) {
          const uint16_t term = bfloat16_of_float(rest);
          at(group, c, part)[i / 2 * 2 * tile + token * 2 + i % 2] = term;
          rest -= float_of_bfloat16(term);
        }
      }
  }

  int64_t groups_;
  int64_t chunks_;
  int parts_;
  AlignedBuffer<uint16_t> values_;
};

struct alignas(64) TileConfiguration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr TileConfiguration() {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = tile;
    }
  }
};

}  // namespace

// What follows runs only where the processor has AMX. As in row_kernels_impl.h, nothing in it may call a function
// template of the standard library.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq")
#endif

namespace {

// GCC's intrinsics do not declare the memory they read: it has to be written before they run.
#define DSPA_ALL_IS_WRITTEN __asm__ volatile("" ::: "memory")

// products[latent][token] of 32 latents and 32 tokens. Tiles 0 to 3 are sums, 4 and 5 latents, 6 and 7 tokens.
void multiply_block(const char* rows, int64_t row_bytes, const TokenTiles& tokens, int64_t index, float* products) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t c = 0; c < tokens.chunks(); ++c) {
    _tile_loadd(4, rows + c * 64, row_bytes);
    _tile_loadd(5, rows + c * 64 + tile * row_bytes, row_bytes);
    for (int part = 0; part < tokens.parts(); ++part) {
      _tile_loadd(6, tokens.at(2 * index, c, part), 64);
      _tile_loadd(7, tokens.at(2 * index + 1, c, part), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, products, block * 4);
  _tile_stored(1, products + tile, block * 4);
  _tile_stored(2, products + tile * block, block * 4);
  _tile_stored(3, products + tile * block + tile, block * 4);
}

// Whether one latent is active on each of 32 tokens; the same comparisons as in `RowKernels::scores`.
void find_active(const Sae& sae, int64_t latent, const float* products, int32_t* active) {
  const float b_enc = sae.b_enc[latent];
  const float norm = sae.decoder_norm == nullptr ? 1.0f : sae.decoder_norm[latent];
  if (sae.activation == Activation::gated) {
    const float scale = sae.magnitude_scale[latent], bias = sae.magnitude_bias[latent];
    for (int64_t t = 0; t < block; ++t)
      active[t] = ((products[t] + b_enc) * norm > 0.0f) & (products[t] * scale + bias > 0.0f);
    return;
  }
  const float threshold = sae.threshold[latent] > 0.0f ? sae.threshold[latent] : 0.0f;
  for (int64_t t = 0; t < block; ++t) active[t] = (products[t] + b_enc) * norm > threshold;
}

// Counts 32 latents from `first`, of which `latents` exist, on all tokens; `rows` holds 32 rows of whole chunks.
void count_block(const Sae& sae, const char* rows, int64_t row_bytes, int64_t first, int64_t latents,
                 const TokenTiles& tokens, const int64_t* segments, int64_t token_count, int32_t* counts) {
  alignas(64) float products[block * block];
  alignas(64) int32_t active[block];
  DSPA_ALL_IS_WRITTEN;
  for (int64_t start = 0; start < token_count; start += block) {
    multiply_block(rows, row_bytes, tokens, start / block, products);
    const int64_t end = start + block < token_count ? start + block : token_count;
    for (int64_t i = 0; i < latents; ++i) {
      find_active(sae, first + i, products + i * block, active);
      for (int64_t t = start; t < end;) {
        const int64_t segment = segments[t];
        int32_t sum = 0;
        for (; t < end && segments[t] == segment; ++t) sum += active[t - start];
        counts[segment * sae.d_sae() + first + i] += sum;
      }
    }
  }
}

void load_configuration() {
  static constexpr TileConfiguration configuration;
  DSPA_ALL_IS_WRITTEN;
  _tile_loadconfig(&configuration);
}

void release_tiles() { _tile_release(); }

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

bool amx_available() {
  static const bool available =
      std::strcmp(row_kernels().name, "avx512") == 0 && processor_has_amx() && request_tiles();
  return available;
}

void count_gates_amx(const std::vector<const float*>& inputs, const std::vector<int64_t>& segments, const Sae& sae,
                     int parts, int32_t* counts, const ThreadPool& pool) {
  const TokenTiles tokens(inputs, sae.d_model(), parts, pool);
  const int64_t blocks = (sae.d_sae() + block - 1) / block;
  const int64_t padded_bytes = tokens.chunks() * chunk * 2;
  pool.for_each(blocks, [&](int64_t index) {
    const int64_t first = index * block, latents = std::min(block, sae.d_sae() - first);
    const char* rows = sae.W_enc.row(first);
    int64_t row_bytes = sae.W_enc.row_bytes();
    std::vector<char> padded;
    if (latents < block || row_bytes != padded_bytes) {  // tiles are read whole
      padded.resize(static_cast<size_t>(block * padded_bytes));
      for (int64_t i = 0; i < latents; ++i)
        std::memcpy(padded.data() + i * padded_bytes, rows + i * row_bytes, static_cast<size_t>(row_bytes));
      rows = padded.data();
      row_bytes = padded_bytes;
    }
    load_configuration();
    count_block(sae, rows, row_bytes, first, latents, tokens, segments.data(), static_cast<int64_t>(segments.size()),
                counts);
    release_tiles();
  });
}

}  // namespace dspa::cpu

#else

namespace dspa::cpu {

bool amx_available() { return false; }

void count_gates_amx(const std::vector<const float*>&, const std::vector<int64_t>&, const Sae&, int, int32_t*,
                     const ThreadPool&) {}

}  // namespace dspa::cpu

#endif
