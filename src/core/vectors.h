// Vectors as wide as the processor's registers, and what is done to them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fusionbench::ARCH {

#if defined(__AVX512F__)
constexpr size_t W = 8;
#elif defined(__AVX2__)
constexpr size_t W = 4;
#else
constexpr size_t W = 2;
#endif

constexpr size_t LANES = 16;             // a promise: how sums over elements are split
constexpr size_t CHUNK = 256;            // elements that are worked on at a time, in the first cache
constexpr size_t PITCH = CHUNK + LANES;  // between rows of them: a power of two would put all in the same place of it

template <class T, size_t N>
struct VectorOf {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, size_t N = W>
using Vector = typename VectorOf<T, N>::type;

using F64 = Vector<double>;
using I64 = Vector<int64_t>;
using U64 = Vector<uint64_t>;
using F32 = Vector<float>;
using I32 = Vector<int32_t>;
using U32 = Vector<uint32_t>;

template <class V>
inline V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}

template <class V>
inline void store(void* to, V v) {
    memcpy(to, &v, sizeof v);
}

// GCC takes these conversions apart, where they are not by the processor's name for them.
inline F64 widen(F32 v) {
#if defined(__AVX512F__)
    return (F64)_mm512_cvtps_pd((__m256)v);
#elif defined(__AVX2__)
    return (F64)_mm256_cvtps_pd((__m128)v);
#else
    return __builtin_convertvector(v, F64);
#endif
}

inline F32 narrow(F64 v) {
#if defined(__AVX512F__)
    return (F32)_mm512_cvtpd_ps((__m512d)v);
#elif defined(__AVX2__)
    return (F32)_mm256_cvtpd_ps((__m256d)v);
#else
    return __builtin_convertvector(v, F32);
#endif
}

template <size_t N>
inline Vector<uint32_t, N> widen(Vector<uint16_t, N> v) {
#ifdef __AVX512F__
    if constexpr (N == 16) return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)v);
#endif
#ifdef __AVX2__
    if constexpr (N == 8) return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)v);
#endif
    return __builtin_convertvector(v, Vector<uint32_t, N>);
}

inline F64 load_f64(const double* from) { return load<F64>(from); }
inline F64 load_f64(const float* from) {
#if defined(__SSE2__) && !defined(__AVX2__)
    return (F64)_mm_cvtps_pd((__m128)_mm_set_sd(load<double>(from)));
#else
    return widen(load<F32>(from));
#endif
}

inline Vector<float, 2 * W> join(F32 a, F32 b) {
#if defined(__AVX512F__)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
#else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3);
#endif
}

// The high 16 bits of each.
inline Vector<uint16_t, 4 * W> high_halves(Vector<uint32_t, 2 * W> a, Vector<uint32_t, 2 * W> b) {
    using Halves = Vector<uint16_t, 4 * W>;
#if defined(__AVX512F__)
    return __builtin_shufflevector((Halves)a, (Halves)b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 33,
                                   35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63);
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packus_epi32((__m256i)(a >> 16), (__m256i)(b >> 16));
    return (Halves)_mm256_permute4x64_epi64(packed, 0xD8);
#else
    return __builtin_shufflevector((Halves)a, (Halves)b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// GCC compares and blends where these are written out: it does not know that no sign of zero matters.
inline F64 larger(F64 a, F64 b) {
#if defined(__AVX512F__)
    return (F64)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
    return (F64)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
    return a > b ? a : b;
#endif
}

inline F64 smaller(F64 a, F64 b) { return a < b ? a : b; }

inline F64 all(double x) { return x - F64{}; }
inline F64 absolute(F64 v) { return (F64)((I64)v & INT64_MAX); }

// The product, of which AVX2 has none: that of the low halves, and those of a low and a high half above it.
inline U64 times(U64 a, uint64_t b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i x = (__m256i)a, y = _mm256_set1_epi64x(b), swapped = _mm256_set1_epi64x(b << 32 | b >> 32);
    const __m256i crossed = _mm256_mullo_epi32(x, swapped), upper = _mm256_set1_epi64x(0xFFFFFFFF00000000);
    const __m256i high = _mm256_add_epi64(_mm256_slli_epi64(crossed, 32), _mm256_and_si256(crossed, upper));
    return (U64)_mm256_add_epi64(_mm256_mul_epu32(x, y), high);
#else
    return a * b;
#endif
}

// The high half of it.
inline U64 high_of_times(U64 a, uint64_t b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i x = (__m256i)a, y = _mm256_set1_epi64x(b), swapped = _mm256_set1_epi64x(b << 32 | b >> 32);
    const __m256i crossed = _mm256_mullo_epi32(x, swapped);
    const __m256i high = _mm256_add_epi32(_mm256_slli_epi64(crossed, 32), crossed);
    return (U64)_mm256_add_epi32(_mm256_mul_epu32(x, y), high) >> 32;
#else
    return a * b >> 32;
#endif
}

// Whether the highest bit of any element is set.
template <class V>
inline bool any_high_bit(V v) {
    constexpr size_t BITS = 8 * sizeof(v[0]);
    uint64_t parts[(sizeof(V) + 7) / 8] = {}, any = 0;
    memcpy(parts, &v, sizeof v);
    for (const uint64_t part : parts) any |= part;
    return any & (BITS == 64 ? 1ull << 63 : BITS == 32 ? 0x8000000080000000 : 0x8000800080008000);
}

// The highest bit is set of what is infinite or no number, where the exponent has these bits.
template <class V, class Bits>
inline V infinite(V bits, Bits exponent) {
    return (bits & exponent) + Bits(exponent & -exponent);
}

// What is true of each element: a register of bits, or elements of which all or no bits are set.
#ifdef __AVX512F__
using Mask = __mmask8;
inline Mask where(I64 v) { return _mm512_movepi64_mask((__m512i)v); }
inline Mask less(F64 a, F64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LT_OQ); }
inline Mask at_most(F64 a, F64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ); }
inline Mask differ(F64 a, F64 b) { return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NEQ_UQ); }
inline F64 select(Mask mask, F64 a, F64 b) { return (F64)_mm512_mask_blend_pd(mask, (__m512d)b, (__m512d)a); }
inline F64 only(Mask mask, F64 v) { return (F64)_mm512_maskz_mov_pd(mask, (__m512d)v); }
inline F64 add_where(Mask mask, F64 a, F64 b) {
    return (F64)_mm512_mask_add_pd((__m512d)a, mask, (__m512d)a, (__m512d)b);
}
inline Vector<int32_t, 2 * W> join(Mask a, Mask b) {
    return (Vector<int32_t, 2 * W>)_mm512_movm_epi32(_mm512_kunpackb(b, a));
}
#else
using Mask = I64;
inline Mask where(I64 v) { return v; }
inline Mask less(F64 a, F64 b) { return a < b; }
inline Mask at_most(F64 a, F64 b) { return a <= b; }
inline Mask differ(F64 a, F64 b) { return a != b; }
inline F64 select(Mask mask, F64 a, F64 b) { return mask ? a : b; }
inline F64 only(Mask mask, F64 v) { return (F64)(mask & (I64)v); }
inline F64 add_where(Mask mask, F64 a, F64 b) { return a + only(mask, b); }
inline Vector<int32_t, 2 * W> join(Mask a, Mask b) {
    using Halves = Vector<int32_t, 2 * W>;
#ifdef __AVX2__
    return __builtin_shufflevector((Halves)a, (Halves)b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    return __builtin_shufflevector((Halves)a, (Halves)b, 0, 2, 4, 6);
#endif
}
#endif

// One bit for each element of a comparison.
inline unsigned bits_of(Vector<int32_t, 2 * W> mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#elif defined(__SSE2__)
    return _mm_movemask_ps((__m128)mask);
#else
    unsigned bits = 0;
    for (size_t i = 0; i < 2 * W; ++i) bits |= (mask[i] & 1u) << i;
    return bits;
#endif
}

}  // namespace fusionbench::ARCH
