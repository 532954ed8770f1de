// From bytes to numbers, exactly, and back, rounded once, to nearest even.
#pragma once

#include "passes.h"
#include "vectors.h"

namespace fusionbench::ARCH {

constexpr size_t PAIR = 2 * W;  // a register of what is half as wide as float64
using PairU32 = Vector<uint32_t, PAIR>;
using PairI32 = Vector<int32_t, PAIR>;
using PairF32 = Vector<float, PAIR>;

// To nearest even, numbers of so many bits, which are normal from `smallest` on: what is added and taken away again is
// so large that only these bits have room beside it. What is infinite stays so only where it is said to be `wild`.
template <int BITS, bool WILD>
inline F64 rounded(F64 v, double smallest) {
    F64 size = larger((F64)((I64)v & 0x7FF0000000000000), all(smallest));
    if (WILD) size = smaller(size, all(0x1p200));
    const F64 far = size * (1.5 * (uint64_t{1} << (53 - BITS)));
    return (F64)((I64)((v + far) - far) | ((I64)v & INT64_MIN));
}

template <int BITS, bool WILD>
inline PairF32 rounded_pair(const double* from, double smallest) {
    return join(narrow(rounded<BITS, WILD>(load<F64>(from), smallest)),
                narrow(rounded<BITS, WILD>(load<F64>(from + W), smallest)));
}

template <size_t N>
inline Vector<int32_t, N> is_nan(Vector<uint32_t, N> bits) {
    return (Vector<int32_t, N>)(bits & 0x7FFFFFFF) > 0x7F800000;
}

struct FormF64 {
    using Bits = uint64_t;
    static constexpr Bits EXPONENT = 0x7FF0000000000000;
    template <size_t N>
    static Vector<double, N> numbers(Vector<Bits, N> bits) { return (Vector<double, N>)bits; }
    static constexpr size_t AT_ONCE = W;
    template <bool>
    static U64 bits(const double* from) { return load<U64>(from); }
};

struct FormF32 {
    using Bits = uint32_t;
    static constexpr Bits EXPONENT = 0x7F800000;
    template <size_t N>
    static Vector<float, N> numbers(Vector<Bits, N> bits) { return (Vector<float, N>)bits; }
    static constexpr size_t AT_ONCE = PAIR;
    template <bool>
    static PairU32 bits(const double* from) {
        return (PairU32)join(narrow(load<F64>(from)), narrow(load<F64>(from + W)));
    }
};

struct FormBF16 {
    using Bits = uint16_t;
    static constexpr Bits EXPONENT = 0x7F80;
    template <size_t N>
    static Vector<float, N> numbers(Vector<Bits, N> bits) {
        return (Vector<float, N>)(widen<N>(bits) << 16);
    }
    static constexpr size_t AT_ONCE = 2 * PAIR;
    template <bool WILD>
    static Vector<Bits, AT_ONCE> bits(const double* from) {
        const auto found = high_halves((PairU32)rounded_pair<8, WILD>(from, 0x1p-126),
                                       (PairU32)rounded_pair<8, WILD>(from + PAIR, 0x1p-126));
        if (!WILD) return found;
        return (Vector<int16_t, AT_ONCE>)(found & 0x7FFF) > 0x7F80 ? Vector<Bits, AT_ONCE>{} + 0x7FC0 : found;
    }
};

struct FormF16 {
    using Bits = uint16_t;
    static constexpr Bits EXPONENT = 0x7C00;
    template <size_t N>
    static Vector<float, N> numbers(Vector<Bits, N> bits) {
#ifdef __AVX512F__
        if constexpr (N == 16) return (Vector<float, N>)_mm512_cvtph_ps((__m256i)bits);
#endif
#ifdef __F16C__
        if constexpr (N == 8) return (Vector<float, N>)_mm256_cvtph_ps((__m128i)bits);
#endif
        using Wide = Vector<uint32_t, N>;
        using Floats = Vector<float, N>;
        const Wide all = widen<N>(bits);
        const Floats size = (Floats)((all & 0x7FFF) << 13) * 0x1p112f;  // as if float32's bias were float16's
        const Wide infinite = (Wide)(size >= 65536.0f) & 0x7F800000;
        return (Floats)((Wide)size | infinite | (all & 0x8000) << 16);
    }
    static constexpr size_t AT_ONCE = PAIR;
    template <bool WILD>
    static Vector<Bits, PAIR> bits(const double* from) {
        const PairF32 exact = rounded_pair<11, WILD>(from, 0x1p-14);
#if defined(__AVX512F__)
        return (Vector<Bits, PAIR>)_mm512_cvtps_ph((__m512)exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
        return (Vector<Bits, PAIR>)_mm256_cvtps_ph((__m256)exact, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
        const PairU32 size = (PairU32)exact & 0x7FFFFFFF;
        const PairU32 normal = (size - (112u << 23)) >> 13;
        const PairU32 small = (PairU32)((PairF32)size + 0.5f) - 0x3F000000;  // 0.5's last bit is the smallest number
        PairU32 found = (PairI32)size < 0x38800000 ? small : normal;
        found = (PairI32)size >= 0x47800000 ? PairU32{} + 0x7C00 : found;
        found = is_nan<PAIR>(size) ? PairU32{} + 0x7E00 : found;
        return __builtin_convertvector(found | ((PairU32)exact & 0x80000000) >> 16, Vector<Bits, PAIR>);
#endif
    }
};

template <class Function>
inline auto with_form(Dtype dtype, Function function) {
    switch (dtype) {
        case Dtype::f64: return function(FormF64{});
        case Dtype::f32: return function(FormF32{});
        case Dtype::f16: return function(FormF16{});
        default: return function(FormBF16{});
    }
}

template <class Form, class E>
bool decode_as(const uint8_t* from, size_t count, E* to) {
    constexpr size_t N = sizeof(E) == 4 ? PAIR : W, SIZE = sizeof(typename Form::Bits);
    using Bits = Vector<typename Form::Bits, N>;
    Bits bad{};
    const auto lanes = [&](const uint8_t* from, E* to) {
        for (size_t i = 0; i < LANES; i += N) {
            const Bits bits = load<Bits>(from + i * SIZE);
            bad |= infinite(bits, Form::EXPONENT);
            const auto numbers = Form::template numbers<N>(bits);
            if constexpr (sizeof(E) == sizeof(numbers[0])) store(to + i, numbers);
            else store(to + i, widen(numbers));
        }
    };
    const size_t whole = count / LANES * LANES;
    for (size_t i = 0; i < whole; i += LANES) lanes(from + i * SIZE, to + i);
    if (whole < count) {
        uint8_t rest[LANES * SIZE] = {};
        memcpy(rest, from + whole * SIZE, (count - whole) * SIZE);
        lanes(rest, to + whole);
    }
    return !any_high_bit(bad);
}

// Reads numbers, and zeros up to a multiple of LANES; whether all are finite.
template <class E>
bool decode(const Block& block, size_t start, size_t count, E* to) {
    return with_form(block.dtype, [&](auto form) {
        using Form = decltype(form);
        if constexpr (sizeof(E) < sizeof(typename Form::Bits)) return false;  // float64 is not read as float32
        else return decode_as<Form>(block.data + start * sizeof(typename Form::Bits), count, to);
    });
}

template <class Form, bool WILD>
bool encode_as(const double* from, size_t count, uint8_t* to) {
    constexpr size_t N = Form::AT_ONCE, SIZE = sizeof(typename Form::Bits);
    using Bits = Vector<typename Form::Bits, N>;
    Bits bad{};
    const size_t whole = count / N * N;
    for (size_t i = 0; i < whole; i += N) {
        const Bits bits = Form::template bits<WILD>(from + i);
        bad |= infinite(bits, Form::EXPONENT);
        store(to + i * SIZE, bits);
    }
    if (whole < count) {
        double rest[N] = {};
        memcpy(rest, from + whole, (count - whole) * sizeof(double));
        const Bits bits = Form::template bits<WILD>(rest);
        bad |= infinite(bits, Form::EXPONENT);
        memcpy(to + whole * SIZE, &bits, (count - whole) * SIZE);
    }
    return !any_high_bit(bad);
}

// Writes numbers; whether all are finite as they are written.
inline bool encode(const double* from, const Output& out, size_t start, size_t count) {
    return with_form(out.dtype, [&](auto form) {
        using Form = decltype(form);
        uint8_t* to = out.data + start * sizeof(typename Form::Bits);
        return encode_as<Form, false>(from, count, to) || encode_as<Form, true>(from, count, to);
    });
}

}  // namespace fusionbench::ARCH
