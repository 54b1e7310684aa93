// GBNF grammars that cannot take the process down: what upstream's parser or its stacks would grow without end on is
// refused with a sentence before a sampler is made of it.

#include "llama-grammar.h"

#include "llama-vocab.h"
#include "stack.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr size_t max_text      = 1 << 20;  // bytes
constexpr size_t max_elements  = 4 << 20;  // of all rules, repetitions written out
constexpr size_t max_rules     = 1 << 18;
constexpr size_t max_nesting   = 10000;
constexpr size_t max_times     = 2000;  // of upstream, which takes more for any number
constexpr size_t max_token     = 4096;  // bytes: upstream recurses once for each character of a token
constexpr size_t rule_stack    = 512;   // bytes of stack for each rule that follows another, and each parenthesis
constexpr size_t nesting_stack = 2048;

[[noreturn]] void refuse(const std::string & sentence) {
    throw std::runtime_error("the grammar " + sentence);
}

// What upstream's parser will make of a text, as it reads it: how deep it recurses and how much it writes out. It takes
// "a"{5,3} for 2^64 repetitions, and multiplies a long text before it as it stands.
struct extent {
    size_t nesting  = 0;
    size_t rules    = 0;
    size_t elements = 0;

    explicit extent(const char * text) : pos(text) {
        size_t depth = 0;
        size_t item  = 0;  // elements of what a repetition would repeat
        while (*pos) {
            const char c = *pos;
            if (std::strchr(" \t\r\n", c)) {
                pos++;
            } else if (c == '"') {
                item = quoted('"');
            } else if (c == '[') {
                item = quoted(']');
            } else if (c == '<') {
                item = token();
            } else if (c == '#') {
                pos += std::strcspn(pos, "\r\n");
            } else if (c == '(') {
                nesting = std::max(nesting, ++depth);
                rules++;
                pos++;
            } else if (c == ')') {
                depth -= depth > 0;
                item = 1;
                pos++;
            } else if (c == '{' || c == '*' || c == '+' || c == '?') {
                item = repeated(item);
            } else {
                rules += c == ':';
                item = 1;
                elements++;
                pos++;
            }
            if (nesting > max_nesting) {
                refuse("nests more than " + std::to_string(max_nesting) + " parentheses");
            }
            if (elements > max_elements || rules > max_rules) {
                refuse("is too large once its repetitions are written out");
            }
        }
    }

  private:
    const char * pos;

    size_t quoted(char end) {
        const char * start = pos++;
        while (*pos && *pos != end) {
            pos += *pos == '\\' && pos[1] ? 2 : 1;
        }
        pos += *pos != 0;
        elements += size_t(pos - start);
        return size_t(pos - start);
    }

    size_t token() {
        const size_t length = std::strcspn(pos, ">");
        if (length > max_token) {
            refuse("names a token of " + std::to_string(length) + " bytes");
        }
        if (pos[1] == '[' && std::strspn(pos + 2, "0123456789") > 9) {
            refuse("names a token by too large a number");
        }
        pos += length;
        elements++;
        return 1;
    }

    size_t number() {
        size_t value = 0;
        for (; *pos >= '0' && *pos <= '9'; ++pos) {
            value = std::min(value * 10 + size_t(*pos - '0'), max_times + 1);
        }
        return value;
    }

    void space() { pos += std::strspn(pos, " \t\r\n"); }

    size_t repeated(size_t item) {
        if (*pos++ != '{') {
            rules++;
            elements += item + 3;
            return item + 1;
        }
        space();
        const size_t least = number();
        size_t       most  = least;
        space();
        if (*pos == ',') {
            pos++;
            space();
            most = *pos >= '0' && *pos <= '9' ? number() : max_times + 1;
        }
        space();
        pos += *pos == '}';
        if (most < least) {
            refuse("repeats something at least " + std::to_string(least) + " and at most " + std::to_string(most) +
                   " times");
        }
        if (most > max_times) {
            most = least + 1;
        }
        const size_t times = std::max<size_t>(most, 1);
        rules += most - least;
        elements += (item + 3) * times;
        return item * times;
    }
};

// The rules of a grammar as a graph: from each rule to those that it can begin with.
struct beginnings {
    struct edge {
        uint32_t to;
        bool     grows;  // something of the rule is left behind it
    };
    std::vector<std::vector<edge>> edges;

    explicit beginnings(const llama_grammar_rules & rules) : edges(rules.size()) {
        const std::vector<bool> empty = may_be_empty(rules);
        for (size_t i = 0; i < rules.size(); ++i) {
            bool first = true;
            for (size_t k = 0; k < rules[i].size(); ++k) {
                const llama_grammar_element & element = rules[i][k];
                if (is_end(element)) {
                    first = true;
                } else if (first && element.type == LLAMA_GRETYPE_RULE_REF) {
                    edges[i].push_back({ element.value, !is_end(rules[i][k + 1]) });
                    first = empty[element.value];
                } else {
                    first = false;
                }
            }
        }
    }

    // A rule that can begin with itself and leave something behind each time, so that its stack grows without end; or
    // the number of rules.
    size_t growing() const {
        const std::vector<uint32_t> group = groups();
        for (size_t i = 0; i < edges.size(); ++i) {
            for (const edge & e : edges[i]) {
                if (e.grows && group[i] == group[e.to]) {
                    return i;
                }
            }
        }
        return edges.size();
    }

  private:
    static bool is_end(const llama_grammar_element & element) {
        return element.type == LLAMA_GRETYPE_END || element.type == LLAMA_GRETYPE_ALT;
    }

    static std::vector<bool> may_be_empty(const llama_grammar_rules & rules) {
        struct alternate {
            uint32_t rule;
            size_t   left;  // rules in it of which it is not known
        };
        std::vector<alternate>           all;
        std::vector<std::vector<size_t>> users(rules.size());
        std::vector<bool>                empty(rules.size(), false);
        std::vector<uint32_t>            found;
        const auto                       mark = [&](uint32_t rule) {
            if (!empty[rule]) {
                empty[rule] = true;
                found.push_back(rule);
            }
        };
        for (uint32_t i = 0; i < rules.size(); ++i) {
            for (auto start = rules[i].begin(); start != rules[i].end();) {
                const auto end = std::find_if(start, rules[i].end(), is_end);
                const auto ref = [](const llama_grammar_element & e) { return e.type == LLAMA_GRETYPE_RULE_REF; };
                if (start == end) {
                    mark(i);
                } else if (std::all_of(start, end, ref)) {
                    for (auto it = start; it != end; ++it) {
                        users[it->value].push_back(all.size());
                    }
                    all.push_back({ i, size_t(end - start) });
                }
                start = end + (end != rules[i].end());
            }
        }
        while (!found.empty()) {
            const uint32_t rule = found.back();
            found.pop_back();
            for (const size_t user : users[rule]) {
                if (--all[user].left == 0) {
                    mark(all[user].rule);
                }
            }
        }
        return empty;
    }

    // The strongly connected component of each rule (Tarjan's algorithm, without recursion).
    std::vector<uint32_t> groups() const {
        struct frame {
            uint32_t rule;
            size_t   next;
        };
        const uint32_t        n = uint32_t(edges.size());
        std::vector<uint32_t> order(n, 0), low(n, 0), group(n, n), path;
        std::vector<frame>    calls;
        uint32_t              count = 0;
        for (uint32_t root = 0; root < n; ++root) {
            if (order[root] == 0) {
                calls.push_back({ root, 0 });
            }
            while (!calls.empty()) {
                auto & [rule, next] = calls.back();
                if (next == 0) {
                    order[rule] = low[rule] = ++count;
                    path.push_back(rule);
                }
                if (next < edges[rule].size()) {
                    const uint32_t to = edges[rule][next++].to;
                    if (order[to] == 0) {
                        calls.push_back({ to, 0 });
                    } else if (group[to] == n) {
                        low[rule] = std::min(low[rule], order[to]);
                    }
                    continue;
                }
                const uint32_t done = rule;
                if (low[done] == order[done]) {
                    uint32_t member;
                    do {
                        member = path.back();
                        path.pop_back();
                        group[member] = done;
                    } while (member != done);
                }
                calls.pop_back();
                if (!calls.empty()) {
                    low[calls.back().rule] = std::min(low[calls.back().rule], low[done]);
                }
            }
        }
        return group;
    }
};

// Upstream's parser, whose own loop over rules prints to stderr.
void check(const llama_vocab * vocab, const char * text, const std::string & root) {
    llama_grammar_parser parser(vocab);
    for (;;) {
        text += std::strspn(text, " \t\r\n");
        if (*text == '#') {
            text += std::strcspn(text, "\r\n");
        } else if (*text) {
            text = parser.parse_rule(text);
        } else {
            break;
        }
    }
    if (parser.rules.empty()) {
        refuse("is empty");
    }
    std::vector<const std::string *> names(parser.symbol_ids.size());
    for (const auto & [name, id] : parser.symbol_ids) {
        names[id] = &name;
        if (id >= parser.rules.size() || parser.rules[id].empty()) {
            refuse("does not define the rule '" + name + "'");
        }
    }
    if (parser.symbol_ids.count(root) == 0) {
        refuse("has no rule '" + root + "' to begin with");
    }
    const size_t left = beginnings(parser.rules).growing();
    if (left < parser.rules.size()) {
        refuse("is left-recursive, for its rule '" + *names[left] + "' can begin with itself");
    }
}

}  // namespace

llama_sampler * mobilellm_grammar_init(const llama_vocab * vocab, const char * text, const char * root) {
    return under_guard<llama_sampler *>(nullptr, [&] {
        if (std::strlen(text) > max_text) {
            refuse("has " + std::to_string(std::strlen(text)) + " bytes, more than " + std::to_string(max_text));
        }
        for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
            if (vocab->token_to_piece(id).size() > max_token) {
                refuse("cannot be followed in a vocabulary whose token " + std::to_string(id) + " has " +
                       std::to_string(vocab->token_to_piece(id).size()) + " bytes");
            }
        }
        const extent size(text);
        return on_stack_of<llama_sampler *>(size.rules * rule_stack + size.nesting * nesting_stack, [&] {
            check(vocab, text, root);
            return llama_sampler_init_grammar(vocab, text, root);
        });
    });
}
