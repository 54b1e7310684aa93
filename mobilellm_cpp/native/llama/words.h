// How Llama 4's tokenizer splits a text into words before byte-level BPE (MobileLLM-Pro).
//
// Upstream's `llama4` only approximates the published expression: it takes combining marks for no letters and
// non-ASCII letters for caseless, and std::regex recurses once a character.

#pragma once

#include "added_tokens.h"

#include <string>
#include <vector>

// The expression in tokenizer.json; whoever splits by it is given mobilellm_split_words instead.
#define MOBILELLM_WORDS                                                                                        \
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"                \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"                \
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|" \
    "\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

// Whether a file's `pre` asks for these words. In `mobilellm` a word that is a token is never merged from parts, in
// `mobilellm-merges` every word is.
inline bool mobilellm_words(const std::string & pre) {
    return pre == "mobilellm" || pre == "mobilellm-merges";
}

inline bool mobilellm_words(const std::string & pre, bool & clean_spaces, bool & ignore_merges) {
    if (mobilellm_words(pre)) {
        clean_spaces  = false;
        ignore_merges = pre == "mobilellm";
    }
    return mobilellm_words(pre);
}

// The lengths of the words of text, in codepoints. lengths: those of the segments that are split each by itself.
std::vector<size_t> mobilellm_split_words(const std::string & text, const std::vector<size_t> & lengths);
