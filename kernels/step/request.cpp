// What a request says: the sources of the node.

#include "fused_step.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace mobilellm {

fused_request::fused_request(ggml_tensor * dst, const fused_model & model) :
    embd(static_cast<const float *>(dst->src[0]->data)),
    positions(static_cast<const int32_t *>(dst->src[1]->data)),
    outputs(static_cast<const int32_t *>(dst->src[2]->data)),
    sequences(static_cast<const int32_t *>(dst->src[3]->data)),
    out(static_cast<float *>(dst->data)) {
    const int32_t * next = sequences + model.n_tokens;
    for (size_t c = 0; c < model.caches.size(); ++c) {
        const fused_cache & cache = model.caches[c];
        const auto *        cells = static_cast<const int64_t *>(dst->src[4 + 2 * c]->data);
        caches[c] = { cache.n_kv, cache.size, model.n_tokens / model.n_streams, cells, dst->src[5 + 2 * c], next };
        next += cache.n_kv * model.n_streams;
    }
}

bool request_cache::sees(int64_t token, int64_t cell) const {
    const char * row = static_cast<const char *>(mask->data) + token * mask->nb[1];
    return mask->type == GGML_TYPE_F16 ? reinterpret_cast<const ggml_fp16_t *>(row)[cell] == 0
                                       : reinterpret_cast<const float *>(row)[cell] == 0.0f;
}

head_cache request_cache::stream(const head_cache & all, int64_t token) const {
    head_cache result = all;
    result.data += token / n_each * all.stream;
    return result;
}

void request_cache::sort(int64_t token, int32_t * cells, int64_t n, uint64_t * seen) const {
    const int32_t * const at      = positions(token);
    const auto            earlier = [&](int32_t a, int32_t b) { return at[a] < at[b]; };
    if (std::is_sorted(cells, cells + n, earlier)) {
        return;
    }
    if (!seen) {
        std::sort(cells, cells + n, earlier);
        return;
    }
    std::vector<std::pair<int32_t, uint64_t>> pairs;
    for (int64_t i = 0; i < n; ++i) {
        pairs.emplace_back(cells[i], seen[i]);
    }
    std::sort(pairs.begin(), pairs.end(), [&](const auto & a, const auto & b) { return earlier(a.first, b.first); });
    for (int64_t i = 0; i < n; ++i) {
        cells[i] = pairs[i].first;
        seen[i]  = pairs[i].second;
    }
}

}  // namespace mobilellm
