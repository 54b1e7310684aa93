// Packed weights as a buffer type of ggml's CPU backend, beside upstream's own repacking and before it: the loader
// asks it first, for each weight. It takes matrices that kernels.h can pack, for MUL_MAT by f32, and the token
// embedding also for GET_ROWS, so that a tied embedding is held once. All else is upstream's.

#pragma once

#include "ggml-backend.h"

// nullptr where this processor has no kernels but the scalar ones, or where they are turned off.
ggml_backend_buffer_type_t mobilellm_packed_buffer_type();

// What $MOBILELLM_KERNELS asks for, read once a process: unset, empty or 1 all, pack the packed weights without the
// node of fused.h, 0 nothing. Throws std::runtime_error on anything else, while the first model loads.
enum class mobilellm_kernels { none, pack, all };

mobilellm_kernels mobilellm_kernels_wanted();
