#include "added_tokens.h"

#include "gguf.h"
#include "llama-vocab.h"

#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace {

constexpr std::string_view escaped_space = "\xe2\x96\x81";  // U+2581

// Flags of an added token in a file.
enum : uint32_t { LSTRIP = 1, RSTRIP = 2, LATER = 4, NORMALIZED = 8, PIECE = 16 };

// Unicode's White_Space.
constexpr std::string_view spaces[] = {
    " ",      "\n",     "\t",     "\r",     "\v",     "\f",     "\u0085", "\u00a0", "\u1680",
    "\u2000", "\u2001", "\u2002", "\u2003", "\u2004", "\u2005", "\u2006", "\u2007", "\u2008",
    "\u2009", "\u200a", "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
};

// The length of the space that text ends or begins with, 0 for none.
template <typename Match>
size_t space(Match match) {
    for (const std::string_view one : spaces) {
        if (match(one)) {
            return one.size();
        }
    }
    return 0;
}

size_t before_spaces(std::string_view text, size_t end) {
    while (const size_t n = space([&](std::string_view one) {
               return end >= one.size() && text.substr(end - one.size(), one.size()) == one;
           })) {
        end -= n;
    }
    return end;
}

size_t after_spaces(std::string_view text, size_t start) {
    while (const size_t n = space([&](std::string_view one) { return text.substr(start, one.size()) == one; })) {
        start += n;
    }
    return start;
}

std::string with_spaces_escaped(const std::string & text) {
    std::string escaped;
    for (const char c : text) {
        c == ' ' ? escaped.append(escaped_space) : escaped.append(1, c);
    }
    return escaped;
}

[[noreturn]] void refuse(const char * key, const std::string & what) {
    throw std::runtime_error(std::string(key) + " " + what);
}

std::vector<uint32_t> numbers(const gguf_context * file, const char * key) {
    const int64_t id = gguf_find_key(file, key);
    if (id < 0) {
        return {};
    }
    if (gguf_get_kv_type(file, id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file, id) != GGUF_TYPE_UINT32) {
        refuse(key, "is not an array of 32-bit unsigned integers");
    }
    const auto * data = static_cast<const uint32_t *>(gguf_get_arr_data(file, id));
    return { data, data + gguf_get_arr_n(file, id) };
}

}  // namespace

void mobilellm_added_tokens::load(const gguf_context * file, const llama_vocab & vocab,
                                  const std::vector<llama_token> & special) {
    static const char * const prefix_key = "mobilellm.tokenizer.space_prefix";
    static const char * const tokens_key = "mobilellm.tokenizer.added_tokens";
    static const char * const flags_key  = "mobilellm.tokenizer.added_token_flags";

    const int64_t id = gguf_find_key(file, prefix_key);
    if (id < 0) {
        return;
    }
    if (gguf_get_kv_type(file, id) != GGUF_TYPE_STRING) {
        refuse(prefix_key, "is not a string");
    }
    const std::string prefix = gguf_get_val_str(file, id);
    if (prefix != "none" && prefix != "every" && prefix != "every-once" && prefix != "first" &&
        prefix != "first-once") {
        refuse(prefix_key, "is '" + prefix + "', which this version does not know");
    }
    const bool characters = vocab.get_type() == LLAMA_VOCAB_TYPE_SPM;
    active                = true;
    none                  = prefix == "none";
    every                 = prefix.substr(0, 5) == "every";
    once                  = prefix.size() > 5 && prefix.substr(prefix.size() - 5) == "-once";
    if (!none && !characters) {
        refuse(prefix_key, "is '" + prefix + "' beside a vocabulary of bytes");
    }

    const std::vector<uint32_t> ids   = numbers(file, tokens_key);
    const std::vector<uint32_t> flags = numbers(file, flags_key);
    if (ids.size() != flags.size()) {
        refuse(flags_key, "is not as long as " + std::string(tokens_key));
    }
    const std::unordered_set<llama_token>     known(special.begin(), special.end());
    std::unordered_map<llama_token, uint32_t> flags_of;
    for (size_t i = 0; i < ids.size(); ++i) {
        if (known.count(llama_token(ids[i])) == 0) {
            refuse(tokens_key, "names token " + std::to_string(ids[i]) + ", which is not an added token");
        }
        const bool in_normalized = flags[i] & (NORMALIZED | PIECE);
        if (flags[i] > 31 || (in_normalized && (!characters || once || !(every || none)))) {
            refuse(flags_key, "gives token " + std::to_string(ids[i]) + " flags that this version does not know");
        }
        flags_of[ids[i]] = flags[i];
        normalizes       = normalizes || in_normalized;
    }
    for (const llama_token token_id : special) {
        const auto &   data   = vocab.get_token_data(token_id);
        const auto     found  = flags_of.find(token_id);
        const uint32_t own    = found == flags_of.end() ? 0 : found->second;
        const bool     hidden = data.attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN);
        const auto     text   = own & NORMALIZED ? spaced(data.text, true)
                                : own & PIECE    ? with_spaces_escaped(data.text)
                                                 : data.text;
        auto &         group  = own & (LATER | NORMALIZED | PIECE) ? later : tokens;
        if (!text.empty()) {
            group.push_back({ text, token_id, hidden, (own & LSTRIP) != 0, (own & RSTRIP) != 0 });
        }
    }
    for (auto * group : { &tokens, &later }) {
        std::sort(group->begin(), group->end(), [](const token & a, const token & b) { return a.text < b.text; });
    }
}

// The longest token that the text goes on with.
const mobilellm_added_tokens::token * mobilellm_added_tokens::longest(const std::vector<token> & tokens,
                                                                      const std::string & text, size_t at,
                                                                      bool parse_special) {
    const token * found = nullptr;
    auto          first = tokens.begin();
    auto          last  = tokens.end();
    // those between first and last begin with the depth bytes that follow
    for (size_t depth = 0; first != last; ++depth) {
        for (; first != last && first->text.size() == depth; ++first) {
            if (parse_special || !first->control) {
                found = &*first;
            }
        }
        if (at + depth >= text.size()) {
            break;
        }
        const auto    byte = [depth](const token & t) { return uint8_t(t.text[depth]); };
        const uint8_t next = uint8_t(text[at + depth]);
        first = std::lower_bound(first, last, next, [&](const token & t, uint8_t c) { return byte(t) < c; });
        last  = std::upper_bound(first, last, next, [&](uint8_t c, const token & t) { return c < byte(t); });
    }
    return found;
}

void mobilellm_added_tokens::cut(const std::vector<token> & tokens, const std::string & text, bool parse_special,
                                 std::vector<part> & parts) {
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
        const token * found = longest(tokens, text, at, parse_special);
        if (found == nullptr) {
            ++at;
            continue;
        }
        size_t start = at;
        size_t stop  = at + found->text.size();
        at           = stop;  // spaces that it strips may begin the next token
        if (found->lstrip) {
            start = std::max(done, before_spaces(text, start));
        }
        if (found->rstrip) {
            stop = after_spaces(text, stop);
        }
        if (done < start) {
            parts.push_back({ LLAMA_TOKEN_NULL, text.substr(done, start - done) });
        }
        parts.push_back({ found->id, "" });
        done = stop;
    }
    if (done < text.size()) {
        parts.push_back({ LLAMA_TOKEN_NULL, text.substr(done) });
    }
}

// A text as the normalizer, or what stands in its place, makes it.
std::string mobilellm_added_tokens::spaced(const std::string & text, bool is_first) const {
    const bool has_one = text.compare(0, 1, " ") == 0 || text.compare(0, escaped_space.size(), escaped_space) == 0;
    const bool put     = !none && (every || is_first) && !(once && has_one);
    const auto whole   = put ? " " + text : text;
    return normalizes ? with_spaces_escaped(whole) : whole;
}

std::vector<mobilellm_added_tokens::part> mobilellm_added_tokens::split(const std::string & text,
                                                                        bool                parse_special) const {
    std::vector<part> parts;
    if (!active) {
        return parts;
    }
    std::vector<part> sections;
    cut(tokens, text, parse_special, sections);
    for (const part & section : sections) {
        if (section.text.empty()) {
            parts.push_back(section);
        } else {
            cut(later, normalizes ? spaced(section.text, true) : section.text, parse_special, parts);
        }
    }
    for (size_t i = 0; i < parts.size() && !normalizes; ++i) {
        if (!parts[i].text.empty()) {
            parts[i].text = spaced(parts[i].text, i == 0);
        }
    }
    return parts;
}
