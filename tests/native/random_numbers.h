// The same random numbers in every run.

#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace {

std::mt19937 generator(1);

inline std::vector<float> normals(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float>              x(n);
    std::generate(x.begin(), x.end(), [&] { return normal(generator); });
    return x;
}

}  // namespace
