// Convolution of images of few channels, where Winograd is not faster, fused with ReLU and 2x2 max pooling: the usual
// first layers of a network. The large output of the convolution never reaches memory. Compiled after kernels.cpp.

constexpr int64_t PANEL = 2 * LANES;  // filters per block
constexpr int64_t SPAN = 2;           // pooled pixels per block: 4 * SPAN * PANEL sums stay in registers

// Calls body(first, done, pixel) for each span of SPAN pooled pixels in a row. `first`: index of its first one;
// `done`: how many of its pixels the previous span covered (the last span may overlap it); pixel(p): offset in x of
// pixel p of the span's 2 rows of 2 * SPAN pixels.
template <class Body>
INLINE void spans(int64_t row, int64_t rows, int64_t columns, int64_t h, int64_t w, int64_t c, Body body) {
    for (int64_t column = 0; column < columns; column += SPAN) {
        const int64_t begin = column + SPAN <= columns ? column : columns - SPAN;
        const int64_t corner = ((row / rows * h + row % rows * 2) * w + begin * 2) * c;
        body(row * columns + begin, column - begin,
             [=](int64_t p) { return corner + (p / (2 * SPAN) * w + p % (2 * SPAN)) * c; });
    }
}

// x [N, H, W, C], padded; filters u [K / PANEL, R, R * C, PANEL] -> y [N, (H - R + 1) / 2, (W - R + 1) / 2, K] and, in
// `position`, which of the four pixels is the maximum (the first of equals). Rows need at least SPAN pooled pixels.
extern "C" void direct_pool(const float* x, const float* u, const float* bias, float* y, uint8_t* position, int64_t n,
                            int64_t h, int64_t w, int64_t c, int64_t k, int64_t r, int64_t threads) {
    const int64_t rows = (h - r + 1) / 2, columns = (w - r + 1) / 2;
    PARALLEL
    for (int64_t row = 0; row < n * rows; ++row)
        for (int64_t panel = 0; panel < k; panel += PANEL)
            spans(row, rows, columns, h, w, c, [&](int64_t to, int64_t, auto pixel) {
                Vector sums[4 * SPAN][2];
                for (auto& sum : sums)
                    for (int j = 0; j < 2; ++j) sum[j] = bias ? load(bias + panel + j * LANES) : Vector{};
                const float* filter = u + panel * r * r * c;
                for (int64_t a = 0; a < r; ++a)
                    for (int64_t t = a * w * c; t < a * w * c + r * c; ++t, filter += PANEL) {
                        const Vector f[2] = {load(filter), load(filter + LANES)};
                        for (int p = 0; p < 4 * SPAN; ++p)
                            for (int j = 0; j < 2; ++j) sums[p][j] += x[pixel(p) + t] * f[j];
                    }
                for (int q = 0; q < SPAN; ++q)
                    for (int j = 0; j < 2; ++j) {
                        Vector largest = ReLU::value(sums[2 * q][j]), where = {};
                        for (int i = 1; i < 4; ++i) {
                            const Vector value = ReLU::value(sums[i / 2 * 2 * SPAN + 2 * q + i % 2][j]);
                            const auto better = (value > largest) | (value != value);
                            largest = better ? value : largest;
                            where = better ? (Vector){} + float(i) : where;
                        }
                        store(y + (to + q) * k + panel + j * LANES, largest);
                        store(position + (to + q) * k + panel + j * LANES, where);
                    }
            });
}

// x, y, the gradient dy of y -> du [threads, K / PANEL, R * R * C + 1, PANEL]: gradients of the filters and, last, the
// bias, summed by each thread over its share of the images. The caller must zero du before.
extern "C" void direct_pool_backward(const float* x, const float* y, const float* dy, const uint8_t* position, float* du,
                                     int64_t n, int64_t h, int64_t w, int64_t c, int64_t k, int64_t r, int64_t threads) {
    const int64_t rows = (h - r + 1) / 2, columns = (w - r + 1) / 2, taps = r * r * c + 1;
    PARALLEL
    for (int64_t part = 0; part < threads; ++part)
        for (int64_t row = n * part / threads * rows; row < n * (part + 1) / threads * rows; ++row)
            for (int64_t panel = 0; panel < k; panel += PANEL)
                spans(row, rows, columns, h, w, c, [&](int64_t from, int64_t done, auto pixel) {
                    Vector g[4 * SPAN][2] = {};
                    float* out = du + (part * k + panel) * taps;
                    float* last = out + (taps - 1) * PANEL;
                    for (int64_t q = done; q < SPAN; ++q)
                        for (int j = 0; j < 2; ++j) {
                            const int64_t at = (from + q) * k + panel + j * LANES;
                            const Vector d = load(dy + at) * ReLU::derivative(load(y + at)), where = load(position + at);
                            for (int i = 0; i < 4; ++i)
                                g[i / 2 * 2 * SPAN + 2 * q + i % 2][j] = where == float(i) ? d : Vector{};
                            store(last + j * LANES, load(last + j * LANES) + d);
                        }
                    for (int64_t a = 0; a < r; ++a)
                        for (int64_t t = a * w * c; t < a * w * c + r * c; ++t, out += PANEL) {
                            Vector sums[2] = {load(out), load(out + LANES)};
                            for (int p = 0; p < 4 * SPAN; ++p)
                                for (int j = 0; j < 2; ++j) sums[j] += x[pixel(p) + t] * g[p][j];
                            for (int j = 0; j < 2; ++j) store(out + j * LANES, sums[j]);
                        }
                });
}
