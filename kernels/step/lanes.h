// Vectors of floats for the templates of the _impl.h files: one struct an instruction set, all with the members of this
// one. The others lie in the rooms of their processors.
//
// All of it has internal linkage: a file compiled for one instruction set must not lend its code to another.

#pragma once

#include "ggml.h"

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// exp(x) = 2^n exp(r) with n = round(x / ln 2); the polynomial's relative error is below 1e-7 on |r| <= ln 2 / 2
// (Taylor to x^7). Arguments are clamped, NaN stays NaN.
constexpr float exp_low      = -87.0f;
constexpr float exp_high     = 88.0f;
constexpr float log2_e       = 1.44269504f;
constexpr float ln2_high     = 0.693359375f;
constexpr float ln2_low      = -2.12194440e-4f;
constexpr float exp_taylor[] = { 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f };

struct scalar_lanes {
    using vec                       = float;
    static constexpr int  width     = 1;
    static constexpr int  group     = 4;      // query heads that share a pass over K or V
    static constexpr int  tile      = 4;      // rows times two vectors: sums that fit the registers
    static constexpr int  registers = 16;     // vectors that fit them
    static constexpr bool by_lane   = false;  // whether fma_lane, by a lane of a, spares what broadcasting would take

    static vec  zero() { return 0.0f; }
    static vec  set1(float x) { return x; }
    static vec  load(const float * p) { return *p; }
    static void store(float * p, vec x) { *p = x; }
    static vec  load_i8(const int8_t * p) { return float(*p); }
    static vec  load_f16(const uint8_t * p) {
        ggml_fp16_t half;
        std::memcpy(&half, p, sizeof(half));
        return ggml_fp16_to_fp32(half);
    }
    // of words that hold two BF16 each
    static vec load_first_bf16(const uint8_t * p) { return load_bf16(p); }
    static vec load_second_bf16(const uint8_t * p) { return load_bf16(p + 2); }
    static vec load_bf16(const uint8_t * p) {
        ggml_bf16_t bits;
        std::memcpy(&bits, p, sizeof(bits));
        return ggml_bf16_to_fp32(bits);
    }
    static vec         set1_f16(const uint8_t * p) { return load_f16(p); }
    static ggml_fp16_t to_f16(float x) { return ggml_fp32_to_fp16(x); }
    static void        store_f16(uint8_t * p, vec x) {
        const ggml_fp16_t half = to_f16(x);
        std::memcpy(p, &half, sizeof(half));
    }
    static void  store_i8(int8_t * p, vec x) { *p = int8_t(nearbyintf(x)); }  // |x| <= 127
    static vec   add(vec a, vec b) { return a + b; }
    static vec   sub(vec a, vec b) { return a - b; }
    static vec   mul(vec a, vec b) { return a * b; }
    static vec   div(vec a, vec b) { return a / b; }
    static vec   fma(vec a, vec b, vec c) { return a * b + c; }
    static vec   max(vec a, vec b) { return a > b ? a : b; }
    // x where the bit of the lane is set, else y
    static vec   select(uint64_t bits, vec x, vec y) { return bits & 1 ? x : y; }
    // a butterfly of the Walsh-Hadamard transform between elements whose numbers differ by h < width
    static vec   butterfly(vec x, int) { return x; }
    static float sum(vec a) { return a; }
    static float largest(vec a) { return a; }
    static vec   exp(vec x) { return expf(x < exp_low ? exp_low : x > exp_high ? exp_high : x); }
    // the sums of four vectors
    static void  sum4(vec a, vec b, vec c, vec d, float * out) {
        out[0] = a;
        out[1] = b;
        out[2] = c;
        out[3] = d;
    }
};

}  // namespace
