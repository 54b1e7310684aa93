// Arrays in one allocation, each on cache lines of its own.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace mobilellm {

class arena {
  public:
    template <typename T>
    void add(T *& array, int64_t n) {
        arrays_.push_back({ &array, size_ });
        size_ += (n * sizeof(T) + cache_line - 1) / cache_line * cache_line;
    }

    // Sets the pointers. Pages are not touched before they are used.
    void allocate() {
        memory_.reset(static_cast<uint8_t *>(::operator new(size_, std::align_val_t(cache_line))));
        for (const auto & [array, offset] : arrays_) {
            const void * begin = memory_.get() + offset;
            std::memcpy(array, &begin, sizeof(begin));
        }
    }

  private:
    static constexpr size_t cache_line = 64;

    struct free {
        void operator()(uint8_t * p) const { ::operator delete(p, std::align_val_t(cache_line)); }
    };

    std::vector<std::pair<void *, size_t>> arrays_;  // a pointer to fill in, and its offset
    std::unique_ptr<uint8_t, free>         memory_;
    size_t                                 size_ = 0;
};

}  // namespace mobilellm
