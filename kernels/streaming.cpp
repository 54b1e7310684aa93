#include "streaming.h"

#include "dispatch.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace mobilellm {

namespace {

constexpr size_t SLICE       = 256 * 1024;  // bytes multiplied between two looks at the clock
constexpr size_t MIN_BYTES   = 16 << 20;    // of weights; fewer stay in a cache, or give too few slices
constexpr size_t MIN_SLICES  = 5;           // of each way that is compared
constexpr double MAX_SECONDS = 0.005;       // where loading takes long; more than 100 MB are read in it
constexpr double CLEARLY     = 1.05;        // times as fast as the default: less than that may be chance

using steady = std::chrono::steady_clock;

double seconds_since(steady::time_point start) {
    return std::chrono::duration<double>(steady::now() - start).count();
}

// The rate that three of four reach: some ways are fast at times and slow at others, whatever made the difference.
double reliable(std::vector<double> rates) {
    const auto quarter = rates.begin() + rates.size() / 4;
    std::nth_element(rates.begin(), quarter, rates.end());
    return *quarter;
}

// Walks once through the weights, slice by slice, so that none was read before; every way takes its turn, so that
// whatever else the machine does hits all of them alike.
class race {
  public:
    explicit race(const std::vector<matrix> & weights) : weights_(weights) {
        int64_t n_cols = 0;
        for (const matrix & m : weights) {
            n_cols = std::max(n_cols, m.n_cols);
            left_ += packed_size(m.type, m.n_cols, m.n_rows);
        }
        input_.resize(std::max<size_t>(activation_size(n_cols), n_cols * sizeof(float)) / sizeof(activations) +
                      1);  // zeros cost as much as anything else
    }

    // Bytes a second of each way over a part of what is left; empty where that or the time did not suffice.
    std::vector<double> run(const std::vector<streaming> & ways, double part, double seconds) {
        std::vector<std::vector<double>> rates(ways.size());
        const size_t                     end   = left_ - size_t(part * left_);
        const auto                       start = steady::now();
        for (size_t i = 0; left_ > end && seconds_since(start) < seconds; ++i) {
            // turned on by one each time, or a way might meet the same matrix of each block
            const size_t way = (i + i / ways.size()) % ways.size();
            rates[way].push_back(next_slice(ways[way]));
        }
        std::vector<double> found;
        for (const std::vector<double> & some : rates) {
            if (some.size() < MIN_SLICES) {
                return {};
            }
            found.push_back(reliable(some));
        }
        return found;
    }

  private:
    double next_slice(const streaming & way) {
        matrix        m     = weights_[at_];
        const size_t  bytes = group_size(m.type, m.n_cols);
        const int64_t g0    = group_;
        const int64_t g1    = std::min(g0 + std::max<int64_t>(SLICE / bytes, 1), m.n_groups());

        m.stream = way;
        output_.resize((g1 - g0) * GROUP);
        left_ -= (g1 - g0) * bytes;
        group_ = g1;
        if (g1 == m.n_groups()) {
            ++at_;
            group_ = 0;
        }
        const uint8_t * next = at_ < weights_.size() ? weights_[at_].data + group_ * bytes : nullptr;

        const auto start = steady::now();
        multiply(m, g0, g1, input_.data(), 1, output_.data(), 0, next);
        return double((g1 - g0) * bytes) / seconds_since(start);
    }

    const std::vector<matrix> & weights_;
    size_t                      left_  = 0;  // bytes
    size_t                      at_    = 0;  // the next slice: matrix,
    int64_t                     group_ = 0;  // and group
    std::vector<activations>    input_;
    std::vector<float>          output_;
};

struct choice {
    streaming way;
    double    rate     = 0;  // bytes a second, 0: not measured
    double    standard = 0;  // that of the default
};

choice measure(const std::vector<matrix> & weights, double seconds) {
    const streaming              standard;
    const std::vector<streaming> hints   = { standard,
                                             { standard.hint == streaming::none ? streaming::t1 : streaming::none, 1 },
                                             { streaming::t2, 1 },
                                             { streaming::nta, 1 },
                                             { streaming::t0, 1 },
                                             { streaming::t0, 4 } };
    const auto                   fastest = [](const std::vector<double> & rates) {
        return std::max_element(rates.begin(), rates.end()) - rates.begin();
    };
    race                      all(weights);
    const std::vector<double> first = all.run(hints, 0.5, seconds / 2);
    if (first.empty()) {
        return {};
    }
    const streaming        winner = hints[fastest(first)];
    std::vector<streaming> last   = { standard };
    for (const int64_t ahead : { 1, 2, 4 }) {
        if (winner.hint == streaming::none) {
            last = { standard, winner };
        } else if (winner.hint != standard.hint || ahead != standard.ahead) {
            last.push_back({ winner.hint, ahead });
        }
    }
    const std::vector<double> rates = all.run(last, 1.0, seconds / 2);
    if (rates.empty()) {
        return {};
    }
    const auto i = fastest(rates);
    return rates[i] > CLEARLY * rates[0] ? choice{ last[i], rates[i], rates[0] }
                                         : choice{ standard, rates[0], rates[0] };
}

std::mutex                                  mutex;
std::map<std::pair<ggml_type, int>, choice> kept;  // by type and the size's power of two
bool                                        is_forced = false;
streaming                                   forced;

std::string name(const streaming & way) {
    const char * const hints[] = { "none", "nta", "t2", "t1", "t0" };
    return hints[way.hint] +
           (way.hint == streaming::none ? "" : ", " + std::to_string(64 * way.ahead) + " columns ahead");
}

}  // namespace

streaming choose_streaming(const std::vector<matrix> & weights, double seconds) {
    size_t bytes = 0;
    for (const matrix & m : weights) {
        bytes += packed_size(m.type, m.n_cols, m.n_rows);
    }
    int power = 0;
    while (bytes >> (power + 1)) {
        ++power;
    }
    const auto key = std::make_pair(weights[0].type, power);
    {
        const std::lock_guard<std::mutex> lock(mutex);
        const auto                        known = kept.find(key);
        if (is_forced) {
            return forced;
        }
        if (known != kept.end()) {
            return known->second.way;
        }
    }
    if (bytes < MIN_BYTES) {
        return {};
    }
    const choice found = measure(weights, std::min(seconds, MAX_SECONDS));
    if (found.rate > 0) {
        const std::lock_guard<std::mutex> lock(mutex);
        kept[key] = found;
    }
    return found.way;
}

std::string streaming_text() {
    const std::lock_guard<std::mutex> lock(mutex);
    std::string                       text = is_forced ? "forced: " + name(forced) : "";
    for (const auto & [key, found] : kept) {
        char line[128];
        std::snprintf(line, sizeof(line), "%s%s from %d MiB: %s, at %.1f GB/s (by default %.1f)",
                      text.empty() ? "" : "; ", ggml_type_name(key.first), 1 << (key.second - 20),
                      name(found.way).c_str(), found.rate / 1e9, found.standard / 1e9);
        text += line;
    }
    return text;
}

void force_streaming(const streaming & way) {
    const std::lock_guard<std::mutex> lock(mutex);
    is_forced = true;
    forced    = way;
    kept.clear();
}

void measure_streaming() {
    const std::lock_guard<std::mutex> lock(mutex);
    is_forced = false;
    kept.clear();
}

}  // namespace mobilellm
