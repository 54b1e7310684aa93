// Tokenizing under guard: long words are split on a stack that they fit on.

#include "stack.h"

#include <algorithm>
#include <string_view>

namespace {

// What llama.cpp splits texts into words with, std::regex, recurses once for each character of a match (llama.cpp
// issue 27783): 26,000 letters without a space are more than 8 MiB of stack. About 700 bytes each were measured.
#ifdef __SANITIZE_ADDRESS__
constexpr size_t stack_per_character = 16384;
#else
constexpr size_t stack_per_character = 2048;
#endif
constexpr size_t short_word = 256;      // characters that fit on any stack
constexpr size_t long_word  = 1 << 20;  // more are refused
constexpr size_t short_text = 16384;    // bytes that hold few enough special tokens

// A bound on the characters that one match can take: none goes on beyond the end of a line, but for the white space
// and slashes that may follow it.
size_t longest_word(std::string_view text) {
    size_t longest = 0;
    size_t current = 0;
    bool   newline = false;
    for (const unsigned char c : text) {
        if ((c & 0xC0) == 0x80) {
            continue;  // not the first byte of a character
        }
        const bool maybe_space = c <= ' ' || c == 0xC2 || (c >= 0xE1 && c <= 0xE3);
        if (c == '\n' || c == '\r') {
            newline = true;
        } else if (newline && !maybe_space && c != '/') {
            newline = false;
            current = 0;
        }
        longest = std::max(longest, ++current);
    }
    return longest;
}

// Calls work, on a thread with stack enough for words of so many characters.
template <typename Work>
int32_t on_stack_for(size_t characters, Work work) {
    if (characters > long_word) {
        throw std::runtime_error("a line of " + std::to_string(characters) + " characters is too long");
    }
    return characters > short_word ? on_stack_of<int32_t>(characters * stack_per_character, work) : work();
}

// Upstream goes through all pieces of a text so far for each special token that it finds in it, and through the text
// for each special token of the vocabulary. Counts the first, unless parse_special leaves only those that users
// defined, and refuses what would take longer than about a second.
void check_special_tokens(const llama_vocab * vocab, std::string_view text, bool parse_special) {
    constexpr size_t  most_found  = 16384;
    constexpr int64_t most_search = int64_t(1) << 34;  // bytes

    int64_t searched = 0;
    size_t  found    = 0;
    for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
        const int attributes = llama_vocab_get_attr(vocab, id);
        const int left_out   = LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN;
        if (!(attributes & (left_out | LLAMA_TOKEN_ATTR_USER_DEFINED)) || (!parse_special && (attributes & left_out))) {
            continue;
        }
        const std::string_view token = llama_vocab_get_text(vocab, id);
        searched += int64_t(text.size());
        for (size_t at = 0; !token.empty() && (at = text.find(token, at)) != text.npos; at += token.size()) {
            if (++found > most_found) {
                throw std::runtime_error("a text holds more than " + std::to_string(most_found) + " special tokens");
            }
        }
        if (searched > most_search) {
            throw std::runtime_error("a text of " + std::to_string(text.size()) +
                                     " bytes is too long for a vocabulary of so many special tokens");
        }
    }
}

}  // namespace

int32_t mobilellm_tokenize(const llama_vocab * vocab, const char * text, int32_t length, llama_token * tokens,
                           int32_t capacity, bool add_special, bool parse_special) {
    const auto work = [&] { return llama_tokenize(vocab, text, length, tokens, capacity, add_special, parse_special); };
    const bool splits = llama_vocab_type(vocab) == LLAMA_VOCAB_TYPE_BPE;
    return under_guard(INT32_MIN, [&] {
        if (size_t(length) > short_text) {
            check_special_tokens(vocab, { text, size_t(length) }, parse_special);
        }
        return on_stack_for(splits ? longest_word({ text, size_t(length) }) : 0, work);
    });
}
