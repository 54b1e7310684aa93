// All that ggml's CPU backend, once patched, calls of ours.

#pragma once

#include "fused.h"
#include "packed_buffer.h"
#include "thread_pool.h"
