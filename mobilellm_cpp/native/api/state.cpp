// Saved states that cannot take the process down: upstream trusts lengths and positions in them, and a cell below
// position zero is never found again.

#include "guard.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace {

constexpr uint32_t  max_name     = 256;  // bytes of the architecture's name, which a whole state begins with
constexpr llama_pos max_position = 1 << 28;

[[noreturn]] void refuse(const std::string & sentence) {
    throw std::runtime_error("the saved state " + sentence);
}

// What a KV cache writes, as far as it can be told from the bytes alone.
struct reader {
    const uint8_t * at;
    size_t          left;

    void skip(uint64_t count, uint64_t size) {
        if (size != 0 && count > left / size) {
            refuse("is truncated");
        }
        at += count * size;
        left -= count * size;
    }

    template <typename T>
    T take() {
        T value;
        if (left < sizeof value) {
            refuse("is truncated");
        }
        std::memcpy(&value, at, sizeof value);
        skip(1, sizeof value);
        return value;
    }

    void cache() {
        const auto n_streams = take<uint32_t>();
        for (uint32_t stream = 0; stream < n_streams; ++stream) {
            const auto n_cells = take<uint32_t>();
            for (uint32_t i = 0; i < n_cells; ++i) {
                const auto position = take<llama_pos>();
                if (position < 0 || position >= max_position) {
                    refuse("holds a token at position " + std::to_string(position));
                }
                skip(take<uint32_t>(), sizeof(llama_seq_id));
            }
            if (n_cells > 0) {
                const bool transposed = take<uint32_t>() != 0;
                const auto n_layers   = take<uint32_t>();
                rows(n_layers, n_cells, false);
                rows(n_layers, n_cells, transposed);
            }
        }
    }

  private:
    void rows(uint32_t n_layers, uint32_t n_cells, bool transposed) {
        for (uint32_t il = 0; il < n_layers; ++il) {
            take<int32_t>();  // type
            const uint64_t size  = transposed ? take<uint32_t>() : take<uint64_t>();
            const uint64_t width = transposed ? take<uint32_t>() : 1;
            if (size != 0 && width > left / size) {
                refuse("is truncated");
            }
            skip(n_cells, size * width);
        }
    }
};

// The caches of a context whose states reader knows: one, or one for each kind of layer; 0 for others.
int known_caches(llama_context * ctx) {
    const llama_hparams & h = llama_get_model(ctx)->hparams;
    if (h.n_pos_per_embd() > 1 || h.ple_n_heads > 0 || h.is_mla()) {
        return 0;
    }
    llama_memory_t memory = llama_get_memory(ctx);
    return dynamic_cast<llama_kv_cache_iswa *>(memory) ? 2 : dynamic_cast<llama_kv_cache *>(memory) ? 1 : 0;
}

void check(llama_context * ctx, const uint8_t * data, size_t size, llama_seq_id sequence) {
    reader     in{ data, size };
    const auto length = in.take<uint32_t>();  // or, of a sequence, a number that upstream knows it by
    if (sequence < 0 && length > max_name) {
        refuse("is not valid: it begins with a name of " + std::to_string(length) + " bytes");
    }
    if (sequence >= 0 && uint32_t(sequence) >= llama_n_seq_max(ctx)) {
        refuse("is for sequence " + std::to_string(sequence) + ", but the context holds " +
               std::to_string(llama_n_seq_max(ctx)));
    }
    in.skip(1, sequence < 0 ? length : sizeof(llama_seq_id));
    const int n_caches = known_caches(ctx);
    for (int i = 0; i < n_caches; ++i) {
        in.cache();
    }
    if (n_caches > 0 && in.left > 0) {
        refuse("has " + std::to_string(in.left) + " bytes behind its end");
    }
}

}  // namespace

bool mobilellm_state_set(llama_context * ctx, const uint8_t * data, size_t size, llama_seq_id sequence) {
    const bool     whole  = sequence < 0;
    bool           begun  = false;
    const bool     done   = under_guard(false, [&] {
        check(ctx, data, size, sequence);
        begun = true;
        const size_t read =
            whole ? llama_state_set_data(ctx, data, size) : llama_state_seq_set_data(ctx, data, size, sequence);
        if (read == 0) {
            std::string why = mobilellm_guard_reason();
            why.erase(std::min(why.find('\n'), why.size()));
            refuse("does not fit this context (" + why + ")");
        }
        if (read != size) {
            refuse("ends after " + std::to_string(read) + " of its " + std::to_string(size) + " bytes");
        }
        return true;
    });
    llama_memory_t memory = llama_get_memory(ctx);
    if (begun && !done && memory) {
        if (whole || known_caches(ctx) == 0) {
            llama_memory_clear(memory, true);
        } else {
            llama_memory_seq_rm(memory, sequence, -1, -1);
        }
    }
    return done;
}
