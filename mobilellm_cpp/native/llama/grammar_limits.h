// Called by upstream/patches/ where llama.cpp would grow without end on what a stranger wrote.

#pragma once

#include <cstddef>

// Counts what the stacks of a grammar grow by. Throws std::runtime_error when one call under guard makes too many of
// them: an ambiguous grammar doubles them with every token.
void mobilellm_grammar_work(size_t n);

// Whether the calling thread's work is counted, from zero.
void mobilellm_limit_grammars(bool on);
