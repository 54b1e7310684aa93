// The lanes of step/lanes.h in NEON, which every 64-bit ARM processor has.

#pragma once

#include "step/lanes.h"

#include <arm_neon.h>

namespace {

struct neon_lanes {
    using vec                       = float32x4_t;
    static constexpr int  width     = 4;
    static constexpr int  group     = 4;
    static constexpr int  tile      = 8;
    static constexpr int  registers = 32;
    static constexpr bool by_lane   = true;

    static vec zero() { return vdupq_n_f32(0.0f); }
    static vec set1(float x) { return vdupq_n_f32(x); }
    static vec load(const float * p) { return vld1q_f32(p); }
    static vec load_whole(const float * p) {
        vec x = load(p);
        __asm__("" : "+w"(x));  // or GCC loads each lane that is used by itself
        return x;
    }
    static void store(float * p, vec x) { vst1q_f32(p, x); }
    static vec  load_i8(const int8_t * p) {
        uint32_t four;
        std::memcpy(&four, p, sizeof(four));
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four)))));
    }
    static vec load_f16(const uint8_t * p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
    static vec load_first_bf16(const uint8_t * p) {
        return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(vld1q_u8(p)), 16));
    }
    static vec load_second_bf16(const uint8_t * p) {
        return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(vld1q_u8(p)), vdupq_n_u32(0xFFFF0000)));
    }
    static vec set1_f16(const uint8_t * p) {
        __fp16 half;
        std::memcpy(&half, p, sizeof(half));
        return vdupq_n_f32(half);
    }
    static ggml_fp16_t to_f16(float x) {
        const __fp16 half = __fp16(x);
        ggml_fp16_t bits;
        std::memcpy(&bits, &half, sizeof(bits));
        return bits;
    }
    static void store_f16(uint8_t * p, vec x) { vst1_u8(p, vreinterpret_u8_f16(vcvt_f16_f32(x))); }
    static void store_i8(int8_t * p, vec x) {
        const int16x4_t words = vmovn_s32(vcvtnq_s32_f32(x));
        const int8x8_t  bytes = vmovn_s16(vcombine_s16(words, words));
        const int32_t   four  = vget_lane_s32(vreinterpret_s32_s8(bytes), 0);
        std::memcpy(p, &four, sizeof(four));
    }
    static vec add(vec a, vec b) { return vaddq_f32(a, b); }
    static vec sub(vec a, vec b) { return vsubq_f32(a, b); }
    static vec mul(vec a, vec b) { return vmulq_f32(a, b); }
    static vec div(vec a, vec b) { return vdivq_f32(a, b); }
    static vec fma(vec a, vec b, vec c) { return vfmaq_f32(c, a, b); }
    static vec fma_lane(vec a, int lane, vec b, vec c) { return vfmaq_n_f32(c, b, a[lane]); }
    static vec max(vec a, vec b) { return vmaxq_f32(a, b); }
    static vec select(uint64_t bits, vec x, vec y) {
        const uint32x4_t bit = { 1, 2, 4, 8 };
        return vbslq_f32(vtstq_u32(vdupq_n_u32(uint32_t(bits)), bit), x, y);
    }
    static vec butterfly(vec x, int h) {
        const uint32x4_t odd     = { 0, 0x80000000, 0, 0x80000000 };
        const uint32x4_t upper   = { 0, 0, 0x80000000, 0x80000000 };
        const vec        swapped = h == 1 ? vrev64q_f32(x) : vextq_f32(x, x, 2);
        return add(swapped, vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), h == 1 ? odd : upper)));
    }
    static float sum(vec a) { return vaddvq_f32(a); }
    static float largest(vec a) { return vmaxvq_f32(a); }
    static vec   exp(vec x) {
        x           = vminq_f32(set1(exp_high), vmaxq_f32(set1(exp_low), x));
        const vec n = vrndnq_f32(mul(x, set1(log2_e)));
        const vec r = fma(n, set1(-ln2_low), fma(n, set1(-ln2_high), x));
        vec       y = set1(exp_taylor[0]);
        for (int i = 1; i < 8; ++i) {
            y = fma(y, r, set1(exp_taylor[i]));
        }
        const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
        return mul(y, vreinterpretq_f32_s32(power));
    }
    static void sum4(vec a, vec b, vec c, vec d, float * out) {
        vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
    }
};

}  // namespace
