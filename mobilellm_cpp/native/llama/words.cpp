#include "words.h"

#include "unicode.h"

#include <algorithm>
#include <cstdint>

namespace {

struct run {
    uint32_t first, last, step;
};

#include "letter_case.inc"

template <size_t N>
bool contains(const run (&runs)[N], uint32_t c) {
    const run * after = std::upper_bound(runs, runs + N, c, [](uint32_t x, const run & r) { return x < r.first; });
    return after != runs && c <= after[-1].last && (c - after[-1].first) % after[-1].step == 0;
}

// One segment of a text; each function returns where the match of a part of the expression that begins at `at`
// ends, and `at` itself where it does not match.
struct segment {
    const uint32_t * text;
    size_t           size;

    unicode_cpt_flags flags(size_t at) const {
        return at < size ? unicode_cpt_flags_from_cpt(text[at]) : unicode_cpt_flags{};
    }

    bool is(size_t at, const char * characters) const {
        for (; at < size && *characters; ++characters) {
            if (text[at] == uint32_t(*characters)) {
                return true;
            }
        }
        return false;
    }

    bool space(size_t at) const { return at < size && flags(at).is_whitespace; }

    bool number(size_t at) const { return at < size && flags(at).is_number; }

    // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]
    bool upper(size_t at) const { return letter_or_mark(at) && !contains(::lower, text[at]); }

    // [\p{Ll}\p{Lm}\p{Lo}\p{M}]
    bool lower(size_t at) const { return letter_or_mark(at) && !contains(::upper, text[at]); }

    bool letter_or_mark(size_t at) const { return at < size && (flags(at).is_letter || flags(at).is_accent_mark); }

    // [^\s\p{L}\p{N}]
    bool other(size_t at) const {
        return at < size && !flags(at).is_whitespace && !flags(at).is_letter && !flags(at).is_number;
    }

    // (?i:'s|'t|'re|'ve|'m|'ll|'d)?
    size_t contraction(size_t at) const {
        const auto letter = [&](size_t i) {
            return at + i >= size ? 0 : text[at + i] == 0x17f ? 's' : text[at + i] | 0x20;
        };
        if (!is(at, "'")) {
            return at;
        }
        const uint32_t a = letter(1), b = letter(2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') {
            return at + 2;
        }
        return (a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l') ? at + 3 : at;
    }

    // upper* lower+: upper gives back what lower needs
    size_t small_word(size_t at) const {
        size_t end = at;
        while (upper(end)) {
            ++end;
        }
        size_t last = end;
        while (!lower(last)) {
            if (last == at) {
                return at;
            }
            --last;
        }
        while (lower(last)) {
            ++last;
        }
        return contraction(last);
    }

    // upper+ lower*
    size_t capital_word(size_t at) const {
        size_t end = at;
        while (upper(end)) {
            ++end;
        }
        if (end == at) {
            return at;
        }
        while (lower(end)) {
            ++end;
        }
        return contraction(end);
    }

    size_t word(size_t at) const {
        const bool prefix = at < size && !is(at, "\r\n") && !flags(at).is_letter && !flags(at).is_number;
        for (const auto match : { &segment::small_word, &segment::capital_word }) {
            if (prefix && (this->*match)(at + 1) > at + 1) {
                return (this->*match)(at + 1);
            }
            if ((this->*match)(at) > at) {
                return (this->*match)(at);
            }
        }
        return at;
    }

    size_t next(size_t at) const {
        const size_t after_word = word(at);
        if (after_word > at) {
            return after_word;
        }
        size_t end = at;
        while (end < at + 3 && number(end)) {
            ++end;
        }
        if (end > at) {
            return end;
        }
        end = at + (is(at, " ") ? 1 : 0);
        if (other(end)) {
            while (other(end)) {
                ++end;
            }
            while (is(end, "\r\n/")) {
                ++end;
            }
            return end;
        }
        size_t after_line = at;
        for (end = at; space(end); ++end) {
            if (is(end, "\r\n")) {
                after_line = end + 1;
            }
        }
        if (after_line > at) {
            return after_line;
        }
        if (end > at + 1 && end < size) {
            return end - 1;  // the last space belongs to the next word
        }
        return std::max(end, at + 1);
    }
};

}  // namespace

std::vector<size_t> mobilellm_split_words(const std::string & text, const std::vector<size_t> & lengths) {
    const std::vector<uint32_t> codepoints = unicode_cpts_from_utf8(text);

    std::vector<size_t> words;
    size_t              start = 0;
    for (const size_t length : lengths) {
        const segment part{ codepoints.data() + start, length };
        for (size_t at = 0; at < length;) {
            const size_t end = part.next(at);
            words.push_back(end - at);
            at = end;
        }
        start += length;
    }
    return words;
}
