// Drawing the factors of N dropout copies: the same numbers as kernels/triton/dropout.py, for four channels of one
// position from one Philox4x32-7 call. Tables: kernels/common/dropout_table.py.
#pragma once

#include "common.h"

enum class Combine { none, sum, mean };

struct Draw {
  uint32_t seed_low, seed_high, offset_low, offset_high;
  const int32_t* groups;   // [group_count, 3]: first column, bits, copies
  const int32_t* words;    // limit and alias of every column
  const float* means;      // of every outcome; null where all rates are equal
  const float* variances;
  int group_count;
  int copies;              // N where all rates are equal, else 0
  float per_copy, per_pair;
  bool whole_channels;
  Combine combine;
};

struct Quad {
  float factor[4], variance[4];  // result = factor * x, variance = variance * x^2
};

HOST_DEVICE void philox(uint32_t c[4], uint32_t k0, uint32_t k1) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = uint64_t{c[0]} * 0xD2511F53u, product1 = uint64_t{c[2]} * 0xCD9E8D57u;
    c[0] = uint32_t(product1 >> 32) ^ c[1] ^ k0;
    c[2] = uint32_t(product0 >> 32) ^ c[3] ^ k1;
    c[1] = uint32_t(product1);
    c[3] = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// quad: image * ceil(C / 4) + channel / 4.
HOST_DEVICE Quad draw_quad(const Draw& draw, uint32_t position, uint32_t quad) {
  Quad result = {};
  float drawn = 0.f;
  for (int group = 0; group < draw.group_count; ++group) {
    const int start = draw.groups[3 * group], bits = draw.groups[3 * group + 1];
    const float copies = float(draw.groups[3 * group + 2]), share = copies / (drawn + copies);
    drawn += copies;
    uint32_t random[4] = {draw.whole_channels ? 0u : position, quad, draw.offset_low,
                          draw.offset_high + (uint32_t(group) << 24)};
    philox(random, draw.seed_low, draw.seed_high);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = int(random[i] >> (32 - bits));
      const uint32_t coin = random[i] & ((1u << (32 - bits)) - 1), word = uint32_t(draw.words[start + column]);
      const int outcome = coin < (word >> bits) ? column : int(word & ((1u << bits) - 1));
      if (draw.copies) {
        const float kept = float(outcome);
        result.factor[i] = kept * draw.per_copy;
        result.variance[i] = kept * (float(draw.copies) - kept) * draw.per_pair;
      } else {
        const float delta = draw.means[start + outcome] - result.factor[i], rest = 1.f - share;
        result.variance[i] = rest * result.variance[i] + share * draw.variances[start + outcome] + share * rest * delta * delta;
        result.factor[i] += share * delta;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (draw.combine == Combine::sum) result.factor[i] += 1.f;
    if (draw.combine == Combine::mean) result.factor[i] = (result.factor[i] + 1.f) * 0.5f;
  }
  return result;
}
