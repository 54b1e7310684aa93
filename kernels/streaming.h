// How weights are best brought to the caches here, found by multiplying with some of a model's own weights when they
// have just been packed, and kept for the process. No choice changes a bit of a result.

#pragma once

#include "kernels.h"

#include <string>
#include <vector>

namespace mobilellm {

// For matrices of one type, in the order of their memory. Measures for at most `seconds`, and
// never long, where no model as large has
// left a choice; keeps the default where there are too few weights to tell, or where nothing is clearly faster.
streaming choose_streaming(const std::vector<matrix> & weights, double seconds);

// What was chosen so far, and how fast it was.
std::string streaming_text();

// For models loaded from now on, instead of a measurement.
void force_streaming(const streaming & way);
void measure_streaming();  // again, and forget what was chosen

}  // namespace mobilellm
