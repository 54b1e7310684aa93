#include "grammar_limits.h"

#include <cstdint>
#include <stdexcept>

namespace {

constexpr int64_t most_work = 1 << 21;  // of one token

thread_local int64_t left    = 0;
thread_local bool    counted = false;

}  // namespace

void mobilellm_limit_grammars(bool on) {
    left    = most_work;
    counted = on;
}

void mobilellm_grammar_work(size_t n) {
    left -= int64_t(n) + 1;
    if (counted && left < 0) {
        throw std::runtime_error("the grammar is ambiguous, and can go on in too many ways");
    }
}
