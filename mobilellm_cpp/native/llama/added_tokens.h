// A text taken apart at added tokens as the tokenizers library does it, in files that ask for it by keys of ours
// (docs/gguf.md). llama.cpp looks for the longest token first, wherever it stands, knows lstrip and rstrip for a few
// models by their name, and puts a space before the text after each token, or before none.

#pragma once

#include "llama.h"

#include <string>
#include <vector>

struct gguf_context;
struct llama_vocab;

class mobilellm_added_tokens {
  public:
    struct part {
        llama_token token;
        std::string text;  // empty where the part is the token
    };

    // special: the ids of all tokens that are looked for. Throws std::runtime_error for keys that make no sense.
    void load(const gguf_context * file, const llama_vocab & vocab, const std::vector<llama_token> & special);

    // The parts of a text, spaces before them included; none where the file has no keys of ours. A fragment for each
    // is put into the list, and refers to the parts.
    template <typename List>
    std::vector<part> split(const std::string & text, bool parse_special, List & fragments) const {
        std::vector<part> parts = split(text, parse_special);
        for (auto it = parts.rbegin(); it != parts.rend(); ++it) {
            if (it->text.empty()) {
                fragments.emplace_front(it->token);
            } else {
                fragments.emplace_front(it->text, 0, it->text.size());
            }
        }
        return parts;
    }

  private:
    struct token {
        std::string text;
        llama_token id;
        bool        control;
        bool        lstrip;
        bool        rstrip;
    };

    static const token * longest(const std::vector<token> & tokens, const std::string & text, size_t at,
                                 bool parse_special);
    static void          cut(const std::vector<token> & tokens, const std::string & text, bool parse_special,
                             std::vector<part> & parts);
    std::vector<part>    split(const std::string & text, bool parse_special) const;
    std::string          spaced(const std::string & text, bool is_first) const;

    bool active     = false;
    bool every      = false;  // a space is put before each text, not the first alone
    bool none       = false;  // or before none
    bool once       = false;  // but not where there is one
    bool normalizes = false;  // spaces are put and written as U+2581 before the later tokens are looked for

    std::vector<token> tokens;  // sorted by their text
    std::vector<token> later;   // those that are looked for in what lies between the others
};
