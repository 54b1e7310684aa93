// fused_ops.h over any lanes of lanes.h. Included by one file an instruction set.

#pragma once

#include "attention_shard_impl.h"
#include "attention_tile_impl.h"
#include "floats_impl.h"
#include "fused_ops.h"
#include "lanes.h"
#include "low_rank_impl.h"

#include <cmath>

namespace {

template <typename L>
struct fused_ops_on {
    static void add(float * x, const float * y, int64_t n) {
        for (int64_t i = 0; i < n; i += L::width) {
            L::store(x + i, L::add(L::load(x + i), L::load(y + i)));
        }
    }

    static void rms_norm(const float * x, const float * weight, int64_t n, float eps, float * y) {
        // two chains: additions wait for each other
        auto even = L::zero();
        auto odd  = L::zero();
        for (int64_t i = 0; i < n; i += 2 * L::width) {
            const auto a = L::load(x + i);
            even         = L::fma(a, a, even);
            if (i + L::width < n) {
                const auto b = L::load(x + i + L::width);
                odd          = L::fma(b, b, odd);
            }
        }
        const auto scale = L::set1(1.0f / sqrtf(L::sum(L::add(even, odd)) / float(n) + eps));
        for (int64_t i = 0; i < n; i += L::width) {
            const auto normed = L::mul(L::load(x + i), scale);
            L::store(y + i, weight ? L::mul(normed, L::load(weight + i)) : normed);
        }
    }

    static void silu_mul(const float * gate, const float * up, int64_t n, float * y) {
        for (int64_t i = 0; i < n; i += L::width) {
            const auto g = L::load(gate + i);
            const auto s = L::div(g, L::add(L::set1(1.0f), L::exp(L::sub(L::zero(), g))));
            L::store(y + i, L::mul(s, L::load(up + i)));
        }
    }

    static void hadamard(float * x, int64_t n, int64_t size) {
        const auto norm = L::set1(1.0f / sqrtf(float(size)));
        for (float * end = x + n; x < end; x += size) {
            for (int64_t i = 0; i < size; i += L::width) {
                auto v = L::mul(L::load(x + i), norm);
                for (int h = 1; h < L::width; h *= 2) {
                    v = L::butterfly(v, h);
                }
                L::store(x + i, v);
            }
            for (int64_t h = L::width; h < size; h *= 2) {
                for (int64_t i = 0; i < size; i += 2 * h) {
                    for (int64_t j = i; j < i + h; j += L::width) {
                        const auto a = L::load(x + j);
                        const auto b = L::load(x + j + h);
                        L::store(x + j, L::add(a, b));
                        L::store(x + j + h, L::sub(a, b));
                    }
                }
            }
        }
    }

    static void store(const float * x, int64_t n, ggml_type type, uint8_t * out) {
        if (type == GGML_TYPE_F32) {
            std::memcpy(out, x, n * sizeof(float));
        } else if (type == GGML_TYPE_F16) {
            for (int64_t i = 0; i < n; i += L::width) {
                L::store_f16(out + 2 * i, L::load(x + i));
            }
        } else if (type != GGML_TYPE_Q8_0) {
            ggml_get_type_traits(type)->from_float_ref(x, out, n);
        } else {
            for (; n > 0; n -= 32, x += 32, out += 34) {
                auto high = L::zero();
                for (int i = 0; i < 32; i += L::width) {
                    const auto a = L::load(x + i);
                    high         = L::max(high, L::max(a, L::sub(L::zero(), a)));
                }
                const float       largest = L::largest(high);
                const auto        factor  = L::set1(largest > 0.0f ? 127.0f / largest : 0.0f);
                const ggml_fp16_t scale   = L::to_f16(largest / 127.0f);
                std::memcpy(out, &scale, sizeof(scale));
                for (int i = 0; i < 32; i += L::width) {
                    L::store_i8(reinterpret_cast<int8_t *>(out + 2 + i), L::mul(L::load(x + i), factor));
                }
            }
        }
    }

    static void combine(const float * out, const float * largest, const float * sum, int n_shards, int64_t stride,
                        int64_t n_head, int64_t n_embd_head, float * y) {
        for (int64_t h = 0; h < n_head; ++h) {
            float high = largest[h];
            for (int s = 1; s < n_shards; ++s) {
                high = high > largest[s * n_head + h] ? high : largest[s * n_head + h];
            }
            float weights[mobilellm::max_shards];
            float total = 0.0f;
            for (int s = 0; s < n_shards; ++s) {
                weights[s] = expf(largest[s * n_head + h] - high);
                total += weights[s] * sum[s * n_head + h];
            }
            for (int s = 0; s < n_shards; ++s) {
                weights[s] /= total;
            }
            for (int64_t e = h * n_embd_head; e < (h + 1) * n_embd_head; e += L::width) {
                auto x = L::zero();
                for (int s = 0; s < n_shards; ++s) {
                    x = L::fma(L::set1(weights[s]), L::load(out + s * stride + e), x);
                }
                L::store(y + e, x);
            }
        }
    }

    static constexpr mobilellm::fused_ops table = {
        add,          rms_norm,     silu_mul,           hadamard, store, attend_on<L>, combine, attend_tile_on<L>,
        reduce_on<L>, expand_on<L>, multiply_floats<L>,
    };
};

}  // namespace
