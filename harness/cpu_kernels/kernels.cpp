// Activations and 2x2 max pooling over images [N, H, W, C], for CPUs; harness/cpu_kernels/build.py compiles and calls
// this file. Plain loops over vectors of 16 channels, which the compiler maps to the processor's vector instructions.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
constexpr int64_t LANES = 16, CHUNK = 4096;

#define INLINE static inline __attribute__((always_inline))
#ifdef _OPENMP
#define PARALLEL _Pragma("omp parallel for num_threads(int(threads)) if(threads > 1)")
#else
#define PARALLEL
#endif

struct BFloat16 {
    uint16_t bits;
};

// Loads `count` values, at most LANES; the other lanes are zero.
INLINE Vector load(const float* from, int64_t count = LANES) {
    Vector v = {};
    memcpy(&v, from, count == LANES ? sizeof v : count * sizeof *from);
    return v;
}

INLINE Vector load(const BFloat16* from, int64_t count = LANES) {
    Halves h = {};
    memcpy(&h, from, count == LANES ? sizeof h : count * sizeof *from);
    return (Vector)(__builtin_convertvector(h, Bits) << 16);
}

INLINE Vector load(const uint8_t* from, int64_t count = LANES) {
    Bytes b = {};
    memcpy(&b, from, count == LANES ? sizeof b : count);
    // Widened step by step: a direct conversion makes GCC 12 convert lane by lane.
    return __builtin_convertvector((Integers)__builtin_convertvector(__builtin_convertvector(b, Halves), Bits), Vector);
}

INLINE void store(float* to, Vector v, int64_t count = LANES) {
    memcpy(to, &v, count == LANES ? sizeof v : count * sizeof *to);
}

INLINE void store(BFloat16* to, Vector v, int64_t count = LANES) {  // rounds to nearest even
    Bits u = (Bits)v;
    u = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    u = v == v ? u : (Bits){} + 0x7fc0;
    Halves h = __builtin_convertvector(u, Halves);
    memcpy(to, &h, count == LANES ? sizeof h : count * sizeof *to);
}

INLINE void store(uint8_t* to, Vector v, int64_t count = LANES) {
    Bytes b = __builtin_convertvector(__builtin_convertvector(v, Integers), Bytes);
    memcpy(to, &b, count == LANES ? sizeof b : count);
}

// Calls body(start, count) for blocks of LANES of `size` values; count is a compile-time constant except in a shorter
// last block.
template <class Body>
INLINE void blocks(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<int64_t, LANES>());
    if (i < size) body(i, size - i);
}

// e^x for x in [-87, 20] with a relative error of 2e-7: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf).
INLINE Vector exponential(Vector x) {
    x = x < -87.0f ? (Vector){} - 87.0f : x;
    const Vector shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: its last bits are the rounded integer
    const Vector k = shifted - 12582912.0f;
    const Vector r = x - k * 0.693359375f + k * 2.12194440e-4f;
    Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (Vector)((__builtin_convertvector(k, Integers) + 127) << 23);
}

// Activations: value and derivative at x. BY_VALUE: `derivative` also accepts the activation's value instead of x.
struct Same {
    static constexpr bool BY_VALUE = true;
    INLINE Vector value(Vector x) { return x; }
    INLINE Vector derivative(Vector) { return (Vector){} + 1.0f; }
};

struct ReLU {  // NaN stays NaN
    static constexpr bool BY_VALUE = true;
    INLINE Vector value(Vector x) { return x < 0.0f ? (Vector){} : x; }
    INLINE Vector derivative(Vector x) { return x <= 0.0f ? (Vector){} : (Vector){} + 1.0f; }
};

// x * tanh(softplus(x)) by one exponential: tanh(log(1 + e)) = n / (n + 2), n = e * (e + 2). From 20 on it is x.
struct Mish {
    static constexpr bool BY_VALUE = false;
    INLINE Vector value(Vector x) {
        const Vector e = exponential(x > 20.0f ? (Vector){} + 20.0f : x), n = e * (e + 2.0f);
        return x * (n / (n + 2.0f));
    }
    INLINE Vector derivative(Vector x) {
        x = x > 20.0f ? (Vector){} + 20.0f : x;
        const Vector e = exponential(x), n = e * (e + 2.0f), d = n + 2.0f;
        return (n * d + 4.0f * x * e * (e + 1.0f)) / (d * d);
    }
};

template <class Kind, class T>
void activate(const T* x, T* y, int64_t size, int64_t threads) {
    PARALLEL
    for (int64_t at = 0; at < size; at += CHUNK)
        blocks(size - at < CHUNK ? size - at : CHUNK,
               [&](int64_t i, auto count) { store(y + at + i, Kind::value(load(x + at + i, count)), count); });
}

template <class Kind, class T>
void activate_backward(const T* x, const T* dy, T* dx, int64_t size, int64_t threads) {
    PARALLEL
    for (int64_t at = 0; at < size; at += CHUNK)
        blocks(size - at < CHUNK ? size - at : CHUNK, [&](int64_t i, auto count) {
            store(dx + at + i, load(dy + at + i, count) * Kind::derivative(load(x + at + i, count)), count);
        });
}

// x [N, H, W, C] -> y [N, H/2, W/2, C] and, in `position`, which of the four pixels is the maximum (first of equals);
// a last odd row or column is ignored.
template <class Kind, class T>
void pool(const T* x, T* y, uint8_t* position, int64_t n, int64_t h, int64_t w, int64_t c, int64_t threads) {
    const int64_t rows = h / 2, columns = w / 2;
    PARALLEL
    for (int64_t row = 0; row < n * rows; ++row) {
        const T* from = x + (row / rows * h + row % rows * 2) * w * c;
        for (int64_t column = 0; column < columns; ++column)
            blocks(c, [&](int64_t i, auto count) {
                Vector largest = Kind::value(load(from + column * 2 * c + i, count)), where = {};
                for (int k = 1; k < 4; ++k) {
                    const Vector value = Kind::value(load(from + (k / 2 * w + column * 2 + k % 2) * c + i, count));
                    const auto better = (value > largest) | (value != value);
                    largest = better ? value : largest;
                    where = better ? (Vector){} + float(k) : where;
                }
                const int64_t to = (row * columns + column) * c + i;
                store(y + to, largest, count);
                store(position + to, where, count);
            });
    }
}

// `given`: y for kinds with BY_VALUE, else x. The caller must zero dx in a last odd row or column.
template <class Kind, class T>
void pool_backward(const T* given, const T* dy, const uint8_t* position, T* dx, int64_t n, int64_t h, int64_t w, int64_t c,
                   int64_t threads) {
    const int64_t rows = h / 2, columns = w / 2;
    PARALLEL
    for (int64_t row = 0; row < n * rows; ++row) {
        const int64_t from = (row / rows * h + row % rows * 2) * w * c;
        for (int64_t column = 0; column < columns; ++column)
            blocks(c, [&](int64_t i, auto count) {
                const int64_t at = (row * columns + column) * c + i;
                const Vector where = load(position + at, count);
                const auto pixel = [&](int k) { return from + (k / 2 * w + column * 2 + k % 2) * c + i; };
                Vector largest = load(given + (Kind::BY_VALUE ? at : pixel(0)), count);
                for (int k = 1; k < 4 && !Kind::BY_VALUE; ++k)
                    largest = where == float(k) ? load(given + pixel(k), count) : largest;
                const Vector gradient = load(dy + at, count) * Kind::derivative(largest);
                for (int k = 0; k < 4; ++k) store(dx + pixel(k), where == float(k) ? gradient : (Vector){}, count);
            });
    }
}

#define ACTIVATION(kind, name, T)                                                                                      \
    void kind##_##name(const T* x, T* y, int64_t size, int64_t threads) { activate<kind>(x, y, size, threads); }       \
    void kind##_backward_##name(const T* x, const T* dy, T* dx, int64_t size, int64_t threads) {                       \
        activate_backward<kind>(x, dy, dx, size, threads);                                                             \
    }

#define POOLING(kind, name, T)                                                                                         \
    void kind##_pool_##name(const T* x, T* y, uint8_t* position, int64_t n, int64_t h, int64_t w, int64_t c,           \
                            int64_t threads) {                                                                         \
        pool<kind>(x, y, position, n, h, w, c, threads);                                                               \
    }                                                                                                                  \
    void kind##_pool_backward_##name(const T* given, const T* dy, const uint8_t* position, T* dx, int64_t n, int64_t h,    \
                                     int64_t w, int64_t c, int64_t threads) {                                          \
        pool_backward<kind>(given, dy, position, dx, n, h, w, c, threads);                                                 \
    }

extern "C" {
ACTIVATION(Mish, float, float)
ACTIVATION(Mish, bfloat16, BFloat16)
POOLING(Same, float, float)
POOLING(Same, bfloat16, BFloat16)
POOLING(ReLU, float, float)
POOLING(ReLU, bfloat16, BFloat16)
POOLING(Mish, float, float)
POOLING(Mish, bfloat16, BFloat16)
}
