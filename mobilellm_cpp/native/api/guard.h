// Work under guard: an abort or an error inside llama.cpp ends as a value and a reason, not as the process's end.

#pragma once

#include "api.h"

#include <exception>
#include <string>

// Sets what mobilellm_guard_reason gives on this thread.
void mobilellm_set_reason(const std::string & text);

// What work returns; failed, with a reason, when it throws.
template <typename Result, typename Work>
Result under_guard(Result failed, Work work) {
    mobilellm_guard_begin(true);
    Result result = failed;
    try {
        result = work();
    } catch (const std::exception & error) {
        mobilellm_set_reason(error.what());
    }
    mobilellm_guard_end();
    return result;
}
