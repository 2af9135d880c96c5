// What comes after the output layers of a detector: from class logits and box sides to final detections.
//
// For files of `compress export --heads-only` and `--for ncnn`; C++11, this header alone. deploy/core/heads.py is the
// same in Python. The numbers of `heads::Model` stand in the file's card: see docs/runtimes.md.
//
// On processors that multiply and add in one step compile with -ffp-contract=off, or an overlap that is equal to the
// threshold but for the last bit may be decided otherwise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

namespace heads {

struct Model {
    int height = 0, width = 0;  // canvas in pixels: the card's input_size
    int classes = 0;            // length of class_names
    std::vector<int> strides;   // form.heads.strides, finest level first
    int bins = 1;               // form.heads.bins
    float offset = 0;           // form.heads.offset
    bool fitted = false;        // form.heads.fitted
    bool centerness = false;    // form.heads.centerness
    float score_threshold = 0.05f;
    double nms_threshold = 0.6;
    std::size_t max_detections = 100, candidates = 1000;
};

struct Detection {
    float box[4];  // x1, y1, x2, y2 in pixels of the canvas
    float score;
    int label;  // index into class_names and category_ids
};

namespace details {

inline float sigmoid(float logit) { return 1.0f / (1.0f + std::exp(-logit)); }

// logits: `bins` values, `step` floats apart. Their softmax's mean of 0, 1, 2, ...; of one bin the value itself.
inline float distance(const float* logits, int bins, std::size_t step) {
    if (bins == 1) return logits[0];
    float most = logits[0], sum = 0, weighted = 0;
    for (int i = 1; i < bins; ++i) most = std::max(most, logits[i * step]);
    for (int i = 0; i < bins; ++i) {
        const float weight = std::exp(logits[i * step] - most);
        sum += weight;
        weighted += weight * static_cast<float>(i);
    }
    return weighted / sum;
}

inline float iou(const float* a, const float* b) {
    const float area_a = (a[2] - a[0]) * (a[3] - a[1]), area_b = (b[2] - b[0]) * (b[3] - b[1]);
    const float wide = std::max(std::min(a[2], b[2]) - std::max(a[0], b[0]), 0.0f);
    const float both = wide * (std::min(a[3], b[3]) - std::max(a[1], b[1]));
    return both / (area_a + area_b - both);
}

}  // namespace details

// outputs: what the network gave for one image, each [channels, h, w] without gaps, in the order of the names cls_8,
// box_8, (ctr_8,) cls_16, ... Returns the detections, best first.
inline std::vector<Detection> decode(const std::vector<const float*>& outputs, const Model& model) {
    struct Candidate {
        Detection found;
        std::size_t pair;  // (place, class), counted over all levels: of equal scores the lower goes first
    };
    std::vector<Candidate> best;
    const std::size_t each = model.centerness ? 3 : 2;
    std::size_t before = 0;  // places of finer levels
    for (std::size_t level = 0; level < model.strides.size(); ++level) {
        const int stride = model.strides[level];
        const int h = (model.height + stride - 1) / stride, w = (model.width + stride - 1) / stride;
        const std::size_t places = static_cast<std::size_t>(h) * w;
        const int step[2] = {model.fitted ? model.width / w : stride, model.fitted ? model.height / h : stride};
        const float* logits = outputs[each * level];
        const float* sides = outputs[each * level + 1];
        for (std::size_t place = 0; place < places; ++place) {
            for (int label = 0; label < model.classes; ++label) {
                float score = details::sigmoid(logits[label * places + place]);
                if (model.centerness) score = std::sqrt(score * details::sigmoid(outputs[each * level + 2][place]));
                if (!(score > model.score_threshold)) continue;
                Candidate one = {};
                one.found.score = score;
                one.found.label = label;
                one.pair = (before + place) * model.classes + label;
                const float centre[2] = {place % w + model.offset, place / w + model.offset};
                for (int side = 0; side < 4; ++side) {
                    const float away = details::distance(sides + side * model.bins * places + place, model.bins, places);
                    const float at = centre[side % 2] * step[side % 2] + (side < 2 ? -away : away) * stride;
                    const float end = static_cast<float>(side % 2 ? model.height : model.width);
                    one.found.box[side] = std::min(std::max(at, 0.0f), end);
                }
                best.push_back(one);
            }
        }
        before += places;
    }
    std::sort(best.begin(), best.end(), [](const Candidate& a, const Candidate& b) {
        return a.found.score > b.found.score || (a.found.score == b.found.score && a.pair < b.pair);
    });
    if (best.size() > model.candidates) best.resize(model.candidates);

    std::vector<Detection> kept;
    for (const Candidate& next : best) {
        if (kept.size() == model.max_detections) break;
        const float* box = next.found.box;
        if (!(box[2] > box[0] && box[3] > box[1])) continue;
        const bool free = std::none_of(kept.begin(), kept.end(), [&](const Detection& other) {
            return other.label == next.found.label && details::iou(other.box, box) > model.nms_threshold;
        });
        if (free) kept.push_back(next.found);
    }
    return kept;
}

}  // namespace heads
