// Winograd's minimal filtering F(m x m, R x R), Lavin and Gray, arXiv 1509.09308: tiles with m outputs per side
// need n = m + R - 1 inputs per side. y = A' [(G w G') * (B' x B)] A, where * is a matrix product over the
// channels for each of the n * n positions. build.py puts Transform<R>, with m, n, A', G, B' and transposes,
// before kernels.cpp and this file.

template <auto& matrix>
constexpr int rows = std::extent_v<std::remove_reference_t<decltype(matrix)>, 0>;
template <auto& matrix>
constexpr int columns = std::extent_v<std::remove_reference_t<decltype(matrix)>, 1>;

// Whether rows (or columns) p and p + 1 differ only in signs, as those of the points p and -p do.
template <auto& matrix>
constexpr bool mirrored_rows(int p) {
    if (p + 1 >= rows<matrix>) return false;
    for (int q = 0; q < columns<matrix>; ++q)
        if (matrix[p][q] != matrix[p + 1][q] && matrix[p][q] != -matrix[p + 1][q]) return false;
    return true;
}
template <auto& matrix>
constexpr bool mirrored_columns(int q) {
    if (q + 1 >= columns<matrix>) return false;
    for (int p = 0; p < rows<matrix>; ++p)
        if (matrix[p][q] != matrix[p][q + 1] && matrix[p][q] != -matrix[p][q + 1]) return false;
    return true;
}

// Calls body(0), ... body(N - 1), each number a compile-time constant.
template <class Body, int... i>
INLINE void repeat(Body body, std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>()), ...);
}
template <int N, class Body>
INLINE void repeat(Body body) {
    repeat(body, std::make_integer_sequence<int, N>());
}

// One row or column: to = matrix * from. Factors zero and one cost nothing, and terms shared by mirrored rows or
// columns are computed once.
template <auto& matrix>
INLINE void multiply(const Vector (&from)[columns<matrix>], Vector (&to)[rows<matrix>]) {
    constexpr int P = rows<matrix>, Q = columns<matrix>;
    if constexpr (P >= Q) {
        repeat<P>([&](auto p) {
            if constexpr (p > 0 && mirrored_rows<matrix>(p - 1)) return;  // done with the previous row
            Vector same = {}, opposite = {};
            repeat<Q>([&](auto q) {
                constexpr float factor = matrix[p][q];
                if constexpr (factor != 0.0f) {
                    if constexpr (mirrored_rows<matrix>(p) && matrix[p][q] != matrix[p + 1][q])
                        opposite += factor * from[q];
                    else
                        same += factor * from[q];
                }
            });
            if constexpr (mirrored_rows<matrix>(p)) {
                to[p + 1] = same - opposite;
                same += opposite;
            }
            to[p] = same;
        });
    } else {
        Vector sums[Q];
        repeat<Q>([&](auto q) {
            if constexpr (mirrored_columns<matrix>(q)) {
                sums[q] = from[q] + from[q + 1];
                sums[q + 1] = from[q] - from[q + 1];
            } else if constexpr (q == 0 || !mirrored_columns<matrix>(q - 1))
                sums[q] = from[q];
        });
        repeat<P>([&](auto p) {
            Vector sum = {};
            repeat<Q>([&](auto q) {
                constexpr float factor = matrix[p][q];
                if constexpr (factor != 0.0f && !(q > 0 && mirrored_columns<matrix>(q - 1))) {
                    constexpr bool opposite = mirrored_columns<matrix>(q) && matrix[p][q] != matrix[p][q + 1];
                    sum += factor * sums[q + opposite];
                }
            });
            to[p] = sum;
        });
    }
}

// to(p, r, value): value = element (p, r) of matrix * tile * matrix', for the tile of vectors from(q, s).
template <auto& matrix, class From, class To>
INLINE void transform(From from, To to) {
    constexpr int P = rows<matrix>, Q = columns<matrix>;
    Vector turned[P][Q];
#pragma GCC unroll 1
    for (int s = 0; s < Q; ++s) {
        Vector column[Q], product[P];
        repeat<Q>([&](auto q) { column[q] = from(q, s); });
        multiply<matrix>(column, product);
        repeat<P>([&](auto p) { turned[p][s] = product[p]; });
    }
#pragma GCC unroll 1
    for (int p = 0; p < P; ++p) {
        Vector product[P];
        multiply<matrix>(turned[p], product);
        repeat<P>([&](auto r) { to(p, r, product[r]); });
    }
}

// Division of outputs into down x across tiles of m x m pixels per image; the last ones are cropped to the output.
struct Grid {
    int64_t down, across;
    int64_t image(int64_t tile) const { return tile / (down * across); }
    int64_t row(int64_t tile) const { return tile / across % down; }
    int64_t column(int64_t tile) const { return tile % across; }
};

// Transforms `count` tiles, from tile `first` on, of S x S pixels of x [N, H, W, C], m pixels apart, the first pixel at
// -padding, zero outside -> v [n * n, count, C], whose n * n positions are `step` floats apart.
template <auto& matrix, int m>
INLINE void gather(const float* x, int64_t h, int64_t w, int64_t c, Grid grid, int64_t padding, int64_t first,
                   int64_t count, float* v, int64_t step, int64_t threads) {
    constexpr int P = rows<matrix>, S = columns<matrix>;
    PARALLEL
    for (int64_t t = 0; t < count; ++t) {
        const int64_t tile = first + t, top = grid.row(tile) * m - padding, left = grid.column(tile) * m - padding;
        int64_t pixel[S * S];  // its offset in x, -1 outside
        for (int a = 0; a < S; ++a)
            for (int b = 0; b < S; ++b) {
                const int64_t row = top + a, column = left + b;
                const bool inside = row >= 0 && row < h && column >= 0 && column < w;
                pixel[a * S + b] = inside ? ((grid.image(tile) * h + row) * w + column) * c : -1;
            }
        for (int64_t i = 0; i < c; i += LANES) {
            const auto from = [&](int a, int b) {
                const int64_t at = pixel[a * S + b];
                return at < 0 ? Vector{} : load(x + at + i);
            };
            transform<matrix>(from, [&](int a, int b, Vector u) { store(v + (a * P + b) * step + t * c + i, u); });
        }
    }
}

// v [n * n, count, C] -> the same tiles of y [N, H, W, C]; `bias` [C], unless null, is added.
template <auto& matrix>
INLINE void scatter(const float* v, int64_t step, const float* bias, int64_t first, int64_t count, Grid grid, float* y,
                    int64_t h, int64_t w, int64_t c, int64_t threads) {
    constexpr int M = rows<matrix>, S = columns<matrix>;
    PARALLEL
    for (int64_t t = 0; t < count; ++t) {
        const int64_t tile = first + t, top = grid.row(tile) * M, left = grid.column(tile) * M;
        for (int64_t i = 0; i < c; i += LANES) {
            const Vector added = bias ? load(bias + i) : Vector{};
            const auto from = [&](int a, int b) { return load(v + (a * S + b) * step + t * c + i); };
            transform<matrix>(from, [&](int a, int b, Vector u) {
                if (top + a < h && left + b < w)
                    store(y + ((grid.image(tile) * h + top + a) * w + left + b) * c + i, u + added);
            });
        }
    }
}

// Matrix products in blocks of ROWS rows and WIDTH columns, which stay in registers.
#ifdef __AVX512F__
constexpr int64_t ROWS = 8, WIDTH = 2 * LANES;
#else
constexpr int64_t ROWS = 4, WIDTH = LANES;
#endif

// out [rows, columns] = (+= if `add`) sum over `depth` of a(row, d) b(d, column), rows a multiple of ROWS and
// columns of LANES. Strides of a: `a_row` per row, `a_step` per d. b is [depth, columns] or, if `packed`,
// [columns / WIDTH, depth, WIDTH], whose last panel may be narrower.
void product(const float* a, int64_t a_row, int64_t a_step, const float* b, bool packed, float* out, int64_t rows,
             int64_t columns, int64_t depth, bool add) {
    const auto panel = [&](int64_t column, auto width) {
        constexpr int V = width / LANES;
        const float* from = packed ? b + column * depth : b + column;
        const int64_t b_step = packed ? int64_t(width) : columns;
        for (int64_t row = 0; row < rows; row += ROWS) {
            float* to = out + row * columns + column;
            Vector sums[ROWS][V];
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < V; ++j) sums[i][j] = add ? load(to + i * columns + j * LANES) : Vector{};
            const float* left = a + row * a_row;
            for (int64_t d = 0; d < depth; ++d) {
                Vector right[V];
                for (int j = 0; j < V; ++j) right[j] = load(from + d * b_step + j * LANES);
                for (int i = 0; i < ROWS; ++i)
                    for (int j = 0; j < V; ++j) sums[i][j] += left[i * a_row + d * a_step] * right[j];
            }
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < V; ++j) store(to + i * columns + j * LANES, sums[i][j]);
        }
    };
    int64_t column = 0;
    for (; column + WIDTH <= columns; column += WIDTH) panel(column, std::integral_constant<int64_t, WIDTH>());
    if (column < columns) panel(column, std::integral_constant<int64_t, LANES>());
}

constexpr int64_t apart(int64_t tiles, int64_t c) { return tiles * c + LANES; }  // LANES avoids cache conflicts

// Calls body(grid, first, count) for chunks of up to `chunk` tiles of m x m outputs of y [N, OH, OW, ...].
template <int m, class Body>
INLINE void in_chunks(int64_t n, int64_t oh, int64_t ow, int64_t chunk, Body body) {
    const Grid grid{(oh + m - 1) / m, (ow + m - 1) / m};
    const int64_t tiles = n * grid.down * grid.across;
    for (int64_t first = 0; first < tiles; first += chunk)
        body(grid, first, tiles - first < chunk ? tiles - first : chunk);
}

// y [N, OH, OW, K] from x [N, H, W, C] and packed transformed filters u. v and m hold the transforms of `chunk` tiles
// at a time; chunk is a multiple of ROWS.
template <int R>
void convolve(const float* x, const float* u, const float* bias, float* y, float* v, float* m, int64_t n, int64_t h,
              int64_t w, int64_t c, int64_t oh, int64_t ow, int64_t k, int64_t padding, int64_t chunk,
              int64_t threads) {
    using T = Transform<R>;
    in_chunks<T::M>(n, oh, ow, chunk, [&](Grid grid, int64_t first, int64_t count) {
        const int64_t whole = (count + ROWS - 1) / ROWS * ROWS;  // rows beyond count are never read back
        gather<T::B, T::M>(x, h, w, c, grid, padding, first, count, v, apart(chunk, c), threads);
        PARALLEL
        for (int64_t p = 0; p < T::N * T::N; ++p)
            product(v + p * apart(chunk, c), c, 1, u + p * c * k, true, m + p * apart(chunk, k), whole, k, c, false);
        scatter<T::A>(m, apart(chunk, k), bias, first, count, grid, y, oh, ow, k, threads);
    });
}

// Gradient du [n * n, K, C] of the transformed filters from x [N, H, W, C] and the gradient dy [N, OH, OW, K].
template <int R>
void correlate(const float* x, const float* dy, float* du, float* v, float* m, int64_t n, int64_t h, int64_t w,
               int64_t c, int64_t oh, int64_t ow, int64_t k, int64_t padding, int64_t chunk, int64_t threads) {
    using T = Transform<R>;
    in_chunks<T::M>(n, oh, ow, chunk, [&](Grid grid, int64_t first, int64_t count) {
        gather<T::B, T::M>(x, h, w, c, grid, padding, first, count, v, apart(chunk, c), threads);
        gather<T::At, T::M>(dy, oh, ow, k, grid, 0, first, count, m, apart(chunk, k), threads);
        PARALLEL
        for (int64_t p = 0; p < T::N * T::N; ++p)
            product(m + p * apart(chunk, k), 1, k, v + p * apart(chunk, c), false, du + p * k * c, k, c, count,
                    first > 0);
    });
}

// Filters w [K, R, R, C] -> packed u [n * n, C, K]; if `turned`, rotated by 180 degrees, [n * n, K, C], for backward.
template <int R>
void filters(const float* w, float* u, int64_t k, int64_t c, int64_t turned, int64_t threads) {
    constexpr int P = Transform<R>::N, last = R * R - 1;
    const int64_t depth = turned ? k : c, columns = turned ? c : k, each = R * R * c;
    PARALLEL
    for (int64_t d = 0; d < depth; ++d)
        for (int64_t i = 0; i < columns; i += LANES) {
            const auto from = [&](int a, int b) {
                if (turned) return load(w + d * each + (last - a * R - b) * c + i);
                Vector v;
                for (int lane = 0; lane < LANES; ++lane) v[lane] = w[(i + lane) * each + (a * R + b) * c + d];
                return v;
            };
            const int64_t panel = i / WIDTH * WIDTH, width = columns - panel < WIDTH ? columns - panel : WIDTH;
            float* out = u + panel * depth + d * width + (i - panel);
            transform<Transform<R>::G>(from, [&](int a, int b, Vector v) { store(out + (a * P + b) * k * c, v); });
        }
}

// du [n * n, K, C] -> dw [K, R, R, C].
template <int R>
void filters_backward(const float* du, float* dw, int64_t k, int64_t c, int64_t threads) {
    constexpr int P = Transform<R>::N;
    PARALLEL
    for (int64_t filter = 0; filter < k; ++filter)
        for (int64_t i = 0; i < c; i += LANES) {
            const auto from = [&](int a, int b) { return load(du + ((a * P + b) * k + filter) * c + i); };
            transform<Transform<R>::Gt>(from, [&](int a, int b, Vector v) {
                store(dw + ((filter * R + a) * R + b) * c + i, v);
            });
        }
}

#define WINOGRAD(R)                                                                                                    \
    void winograd_convolve_##R(const float* x, const float* u, const float* bias, float* y, float* v, float* m,        \
                               int64_t n, int64_t h, int64_t w, int64_t c, int64_t oh, int64_t ow, int64_t k,          \
                               int64_t padding, int64_t chunk, int64_t threads) {                                      \
        convolve<R>(x, u, bias, y, v, m, n, h, w, c, oh, ow, k, padding, chunk, threads);                              \
    }                                                                                                                  \
    void winograd_correlate_##R(const float* x, const float* dy, float* du, float* v, float* m, int64_t n, int64_t h,  \
                                int64_t w, int64_t c, int64_t oh, int64_t ow, int64_t k, int64_t padding,              \
                                int64_t chunk, int64_t threads) {                                                      \
        correlate<R>(x, dy, du, v, m, n, h, w, c, oh, ow, k, padding, chunk, threads);                                 \
    }                                                                                                                  \
    void winograd_filters_##R(const float* w, float* u, int64_t k, int64_t c, int64_t turned, int64_t threads) {       \
        filters<R>(w, u, k, c, turned, threads);                                                                       \
    }                                                                                                                  \
    void winograd_filters_backward_##R(const float* du, float* dw, int64_t k, int64_t c, int64_t threads) {            \
        filters_backward<R>(du, dw, k, c, threads);                                                                    \
    }

extern "C" {
WINOGRAD(3)
WINOGRAD(5)
}
