#include "adapter_pass.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "blocks.h"
#include "row_kernels.h"

namespace dspa::cpu {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Room for the latents of one block and one token, on one thread.
struct BlockBuffers {
  explicit BlockBuffers(int64_t block_rows, int64_t tokens)
      : products(block_rows * tokens), lower(block_rows), upper(block_rows), latents(block_rows), values(block_rows) {}

  AlignedBuffer<float> products;  // [tokens, block_rows]
  AlignedBuffer<float> lower, upper;
  AlignedBuffer<int32_t> latents;
  AlignedBuffer<float> values;
};

DSPA_INLINE float least_of(float threshold) { return threshold < 0.0f ? 0.0f : threshold; }

// v of one latent (docs/method.md, section 6); whether it fires. NaN fires, unless the latent is masked.
DSPA_INLINE bool fires(AdapterActivation activation, float y, float threshold, float& v) {
  const float least = least_of(threshold);
  const bool soft = activation == AdapterActivation::soft_threshold;
  const float size = soft ? std::fabs(y) : y;
  v = soft ? std::copysign(size - least, y) : y;
  return !(size <= least) && least < infinity;
}

DSPA_INLINE bool is_harmless(float y, float threshold) { return is_finite(y) || threshold == infinity; }

// Products of `count` latents from `first` on to those that fire, in ascending order. False if one is not finite.
bool compact_block(const Adapter& adapter, int64_t first, int64_t count, const float* products, int32_t* latents,
                   float* values, int64_t& fired) {
  bool finite = true;
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float threshold = adapter.threshold[first + i];
    const float y = products[i] + adapter.bias[first + i];
    finite &= is_harmless(y, threshold);
    float v;
    const bool kept = fires(adapter.activation, y, threshold, v);
    latents[found] = static_cast<int32_t>(first + i);  // overwritten by the next one, if this one does not fire
    values[found] = v;
    found += kept ? 1 : 0;
  }
  fired = found;
  return finite;
}

// The same for some latents in ascending order, in place: `values` holds their products.
bool compact_gathered(const Adapter& adapter, int64_t count, int32_t* latents, float* values, int64_t& fired) {
  bool finite = true;
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t latent = latents[i];
    const float threshold = adapter.threshold[latent];
    const float y = values[i] + adapter.bias[latent];
    finite &= is_harmless(y, threshold);
    float v;
    const bool kept = fires(adapter.activation, y, threshold, v);
    latents[found] = latent;
    values[found] = v;
    found += kept ? 1 : 0;
  }
  fired = found;
  return finite;
}

// The latents of a block that the bounds do not rule out, in ascending order. Addition rounds monotonically, so bounds
// of a product become bounds of y. What is ruled out is finite.
int64_t suspects_of(const Adapter& adapter, int64_t first, int64_t count, const float* lower, const float* upper,
                    int32_t* latents) {
  const bool soft = adapter.activation == AdapterActivation::soft_threshold;
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float threshold = adapter.threshold[first + i], bias = adapter.bias[first + i];
    const float least = least_of(threshold);
    const float low = lower[i] + bias, high = upper[i] + bias;
    const bool above = !(high <= least && high < infinity);
    const bool below = soft ? !(low >= -least && low > -infinity) : !(low > -infinity);
    latents[found] = static_cast<int32_t>(first + i);
    found += (above || below) && !(threshold == infinity) ? 1 : 0;
  }
  return found;
}

// v to delta = max(v, -f) where v is negative, and drops what does not change. False if a product is not finite.
bool clip(const Sae& sae, const float* input, int64_t& count, int32_t* latents, float* values, int64_t& fell,
          int32_t* falling, float* scores) {
  const RowKernels& kernels = row_kernels();
  int64_t negative = 0;
  for (int64_t i = 0; i < count; ++i) {
    falling[negative] = latents[i];
    negative += values[i] < 0.0f ? 1 : 0;
  }
  fell += negative;
  if (negative == 0) return true;
  bool finite = true;
  kernels.gathered_products(sae.W_enc, falling, negative, input, scores);
  for (int64_t i = 0; i < negative; ++i) {
    finite &= is_finite(scores[i]);
    kernels.scores(sae, falling[i], 1, scores + i);
    finite &= is_finite(scores[i]);
  }
  int64_t kept = 0, next = 0;
  for (int64_t i = 0; i < count; ++i) {
    float delta = values[i];
    if (delta < 0.0f) {
      const float f = scores[next++];
      if (delta < -f) delta = -f;
    }
    latents[kept] = latents[i];
    values[kept] = delta;
    kept += delta != 0.0f ? 1 : 0;
  }
  count = kept;
  return finite;
}

}  // namespace

AdapterPassWork adapter_pass(const AdapterStep& step, const std::vector<AdapterToken*>& tokens, const ThreadPool& pool) {
  const RowKernels& kernels = row_kernels();
  const Adapter& adapter = step.adapter;
  const Matrix& W = adapter.weight;
  const int64_t batch = static_cast<int64_t>(tokens.size());
  bool has_codes = step.codes.values != nullptr;
  for (const AdapterToken* token : tokens) has_codes &= token->code != nullptr && token->code_factors.usable;

  Blocks blocks(W.rows, W.row_bytes());
  const int64_t block_rows = blocks.block_rows();
  const int64_t block_count = (W.rows + block_rows - 1) / block_rows;
  std::vector<int32_t> changes(static_cast<size_t>(block_count * batch));  // by block and token
  std::vector<int32_t> falls(adapter.clip ? changes.size() : 0);
  std::atomic<int64_t> rows{0}, code_rows{0}, screened{0}, rescored{0}, fired_in_all{0};

  std::vector<const float*> inputs;
  std::vector<const int16_t*> codes;
  for (const AdapterToken* token : tokens) {
    inputs.push_back(token->input);
    codes.push_back(token->code);
  }

  blocks.on_threads(pool, [&] {
    BlockBuffers buffers(block_rows, batch);
    AlignedBuffer<int32_t> falling(block_rows);
    AlignedBuffer<float> scores(block_rows);
    blocks.for_each([&](int64_t first, int64_t count, int64_t upcoming) {
      // Where more than a third of the latents have to be computed anyway, the codes are read for nothing.
      const bool screens = has_codes && 3 * rescored.load(std::memory_order_relaxed) <=
                                            screened.load(std::memory_order_relaxed) + 4 * block_rows * batch;
      if (screens) {
        kernels.code_products(step.codes.row(first), step.codes.row_size, count,
                              upcoming < 0 ? nullptr : step.codes.row(upcoming), codes.data(), batch,
                              buffers.products.data(), block_rows);
        code_rows += count;
        screened += count * batch;
      } else {
        kernels.products(W, first, count, upcoming < 0 ? nullptr : W.row(upcoming), inputs.data(), batch,
                         buffers.products.data(), block_rows);
        rows += count;
      }
      for (int64_t t = 0; t < batch; ++t) {
        AdapterToken& token = *tokens[static_cast<size_t>(t)];
        const float* products = buffers.products.data() + t * block_rows;
        int32_t* latents = token.latents + first;
        float* values = token.deltas + first;
        int64_t found = 0;
        bool finite;
        if (screens) {
          bound_products(step.codes, token.code_factors, first, count, products, buffers.lower.data(),
                         buffers.upper.data());
          const int64_t suspects = suspects_of(adapter, first, count, buffers.lower.data(), buffers.upper.data(),
                                               buffers.latents.data());
          kernels.gathered_products(W, buffers.latents.data(), suspects, token.input, buffers.values.data());
          finite = compact_gathered(adapter, suspects, buffers.latents.data(), buffers.values.data(), found);
          rescored += suspects;
          rows += suspects;
        } else {
          finite = compact_block(adapter, first, count, products, buffers.latents.data(), buffers.values.data(), found);
        }
        fired_in_all += found;
        int64_t fell = 0;
        if (adapter.clip && found > 0)
          finite &= clip(step.sae, token.encoder_input, found, buffers.latents.data(), buffers.values.data(), fell,
                         falling.data(), scores.data());
        if (!finite) token.finite = false;
        std::memcpy(latents, buffers.latents.data(), static_cast<size_t>(found) * sizeof *latents);
        std::memcpy(values, buffers.values.data(), static_cast<size_t>(found) * sizeof *values);
        const size_t slot = static_cast<size_t>(first / block_rows * batch + t);
        changes[slot] = static_cast<int32_t>(found);
        if (!falls.empty()) falls[slot] = static_cast<int32_t>(fell);
      }
      return true;
    });
  });

  // The blocks' parts move together, which keeps the order.
  pool.for_each(batch, [&](int64_t t) {
    AdapterToken& token = *tokens[static_cast<size_t>(t)];
    for (int64_t block = 0; block < block_count; ++block) {
      const size_t slot = static_cast<size_t>(block * batch + t);
      const int64_t found = changes[slot];
      std::memmove(token.latents + token.changes, token.latents + block * block_rows,
                   static_cast<size_t>(found) * sizeof(int32_t));
      std::memmove(token.deltas + token.changes, token.deltas + block * block_rows,
                   static_cast<size_t>(found) * sizeof(float));
      token.changes += found;
      if (!falls.empty()) token.fell += falls[slot];
    }
  });
  AdapterPassWork work;
  work.rows = rows;
  work.code_rows = code_rows;
  work.screened = screened;
  work.rescored = rescored;
  work.fired = fired_in_all;
  return work;
}

}  // namespace dspa::cpu
