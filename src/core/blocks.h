// Blocks as rows of numbers, a chunk at a time.
#pragma once

#include "dtypes.h"

namespace fusionbench::ARCH {

// The numbers of a chunk: float32 holds those of every dtype but float64.
template <class E>
struct Rows {
    E* data;  // PITCH apart: the base or first model, then the others

    E* operator[](size_t i) const { return data + i * PITCH; }
    // Of the model, a difference from the base.
    F64 difference(size_t model, size_t i, F64 base) const { return load_f64((*this)[model + 1] + i) - base; }
    F64 base(size_t i) const { return load_f64(data + i); }

    bool read(const Blocks& in, size_t start, size_t count) const {
        bool finite = true;
        for (size_t i = 0; i < in.count; ++i) finite &= decode(in.blocks[i], start, count, (*this)[i]);
        return finite;
    }
};

inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

// Arrays in scratch memory, one after the other, each from a cache line on.
class Memory {
public:
    explicit Memory(size_t bytes) : next(static_cast<uint8_t*>(scratch(bytes + ARRAYS * LINE))) {}

    template <class T>
    T* take(size_t count) {
        T* found = reinterpret_cast<T*>(next);
        next += (count * sizeof(T) + LINE - 1) / LINE * LINE;
        return found;
    }

private:
    static constexpr size_t LINE = 64;
    static constexpr size_t ARRAYS = 16;  // at most
    uint8_t* next;
};

// Calls with rows of float32, or of float64 where that is among the blocks.
template <class Function>
inline auto with_element(const Blocks& in, Function function) {
    return in.wide ? function(double{}) : function(float{});
}

}  // namespace fusionbench::ARCH
