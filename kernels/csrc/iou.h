// Loss of a pair of boxes and its derivatives by all eight corners. Formulas: kernels/ops/iou_loss.py.
#pragma once

#include <cmath>

#include "common.h"

enum class Kind { iou, giou, diou, ciou };

struct Box {
  float x1, y1, x2, y2;
};

struct PairLoss {
  float loss;
  Box by_a, by_b;
};

// d max(a, b) / da, half at a tie as in PyTorch.
HOST_DEVICE float share_of_larger(float a, float b) { return a > b ? 1.f : a == b ? 0.5f : 0.f; }

struct Aspect {
  float angle, by_w, by_h;
};

// atan(w / h) of sides clamped to 0, and its derivatives; all 0 for a point.
HOST_DEVICE Aspect aspect(float w, float h) {
  const float w0 = fmaxf(w, 0.f), h0 = fmaxf(h, 0.f), square = w0 * w0 + h0 * h0;
  if (!(square > 0.f)) return {0.f, 0.f, 0.f};
  return {atan2f(w0, h0), w > 0.f ? h0 / square : 0.f, h > 0.f ? -w0 / square : 0.f};
}

template <Kind kind>
HOST_DEVICE PairLoss pair_loss(const Box& a, const Box& b, float eps) {
  const float aw = a.x2 - a.x1, ah = a.y2 - a.y1, bw = b.x2 - b.x1, bh = b.y2 - b.y1;
  const float raw_w = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1), raw_h = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
  const float overlap_w = fmaxf(raw_w, 0.f), overlap_h = fmaxf(raw_h, 0.f), overlap = overlap_w * overlap_h;
  const float union_ = aw * ah + bw * bh - overlap, inverse_union = 1.f / fmaxf(union_, eps);
  const float iou = overlap * inverse_union;
  float loss = 1.f - iou, by_union = union_ >= eps ? iou * inverse_union : 0.f;
  // Which box bounds the overlap on each side; the enclosing box is bounded by the other one.
  const float left = share_of_larger(a.x1, b.x1), top = share_of_larger(a.y1, b.y1);
  const float right = 1.f - share_of_larger(a.x2, b.x2), bottom = 1.f - share_of_larger(a.y2, b.y2);
  float by_ew = 0.f, by_eh = 0.f, by_dx = 0.f, by_dy = 0.f, by_aw = 0.f, by_ah = 0.f, by_bw = 0.f, by_bh = 0.f;
  if constexpr (kind != Kind::iou) {
    const float raw_ew = fmaxf(a.x2, b.x2) - fminf(a.x1, b.x1), raw_eh = fmaxf(a.y2, b.y2) - fminf(a.y1, b.y1);
    const float ew = fmaxf(raw_ew, 0.f), eh = fmaxf(raw_eh, 0.f);
    if constexpr (kind == Kind::giou) {
      const float enclosing = ew * eh, inverse = 1.f / fmaxf(enclosing, eps), empty = (enclosing - union_) * inverse;
      loss += empty;
      by_union -= inverse;
      // union / enclosing^2, not 1 / enclosing - (enclosing - union) / enclosing^2: nothing cancels
      const float by_enclosing = enclosing >= eps ? union_ * inverse * inverse : inverse;
      by_ew = by_enclosing * eh;
      by_eh = by_enclosing * ew;
    } else {
      const float diagonal = ew * ew + eh * eh, inverse = 1.f / fmaxf(diagonal, eps);
      const float dx = 0.5f * ((a.x1 - b.x1) + (a.x2 - b.x2)), dy = 0.5f * ((a.y1 - b.y1) + (a.y2 - b.y2));
      const float distance = (dx * dx + dy * dy) * inverse;
      loss += distance;
      const float by_diagonal = diagonal >= eps ? -distance * inverse : 0.f;
      by_ew = 2.f * by_diagonal * ew;
      by_eh = 2.f * by_diagonal * eh;
      by_dx = dx * inverse;  // by the x of both corners of a
      by_dy = dy * inverse;
    }
    if constexpr (kind == Kind::ciou) {
      const Aspect of_a = aspect(aw, ah), of_b = aspect(bw, bh);
      const float scale = 0.4052847345693511f;  // 4 / pi^2
      const float difference = of_b.angle - of_a.angle, v = scale * difference * difference;
      const float alpha = v / fmaxf(1.f - iou + v, eps);  // a constant
      loss += alpha * v;
      const float by_angle = 2.f * scale * alpha * difference;
      by_aw = -by_angle * of_a.by_w;
      by_ah = -by_angle * of_a.by_h;
      by_bw = by_angle * of_b.by_w;
      by_bh = by_angle * of_b.by_h;
    }
    if (!(raw_ew > 0.f)) by_ew = 0.f;
    if (!(raw_eh > 0.f)) by_eh = 0.f;
  }
  const float by_overlap = -inverse_union - by_union;
  const float by_ow = raw_w > 0.f ? by_overlap * overlap_h : 0.f, by_oh = raw_h > 0.f ? by_overlap * overlap_w : 0.f;
  by_aw += by_union * ah;
  by_ah += by_union * aw;
  by_bw += by_union * bh;
  by_bh += by_union * bw;
  return {loss,
          {by_dx - by_aw - left * by_ow - (1.f - left) * by_ew, by_dy - by_ah - top * by_oh - (1.f - top) * by_eh,
           by_dx + by_aw + right * by_ow + (1.f - right) * by_ew, by_dy + by_ah + bottom * by_oh + (1.f - bottom) * by_eh},
          {-by_dx - by_bw - (1.f - left) * by_ow - left * by_ew, -by_dy - by_bh - (1.f - top) * by_oh - top * by_eh,
           -by_dx + by_bw + (1.f - right) * by_ow + right * by_ew, -by_dy + by_bh + (1.f - bottom) * by_oh + bottom * by_eh}};
}
