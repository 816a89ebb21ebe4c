// Training BatchNorm of images in channels_last memory, and the ReLU behind it, in as few passes over memory as it
// takes: three when forward, five when back, where torch's two layers take fourteen. A row is a pixel.
// The images are bfloat16, or with -DFLOAT32 float.

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 32 }; // rows whose mean and squares are taken at once, while they are in the cache
enum { ROWS = 4 }; // that are added up in registers
enum { SUMMED = 256 }; // rows that float sums up; double sums up those sums
enum { LINE = 16 }; // floats of a cache line
enum { MEAN, INVERSE, SCALE, SHIFT, SAVED }; // what `forward` leaves: 1 / deviation, and y = x * scale + shift

#ifdef FLOAT32
typedef float number;
static inline float wide(number given) { return given; }
static inline number narrow(float given) { return given; }
#else
typedef uint16_t number;
static inline float wide(number given) {
    const uint32_t bits = (uint32_t)given << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

static inline number narrow(float given) { // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &given, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (number)rounded;
}
#endif

// The next three add up some rows; the sums are loaded and stored once for all of them.

static inline void add_values(const number *restrict x, const int rows, long channels, float *restrict sums) {
    for (long c = 0; c < channels; c++) {
        float sum = 0;
        for (int row = 0; row < rows; row++) sum += wide(x[row * channels + c]);
        sums[c] += sum;
    }
}

static inline void add_squares(const number *restrict x, const int rows, long channels, const float *restrict mean,
                               float *restrict sums) {
    for (long c = 0; c < channels; c++) {
        float sum = 0;
        for (int row = 0; row < rows; row++) {
            const float distance = wide(x[row * channels + c]) - mean[c];
            sum += distance * distance;
        }
        sums[c] += sum;
    }
}

static inline void add_gradients(const number *restrict x, const number *restrict gradients, const int rows,
                                 long channels, const float *restrict saved, float low, float *restrict sums,
                                 float *restrict products) {
    const float *restrict mean = saved + MEAN * channels;
    const float *restrict scale = saved + SCALE * channels, *restrict shift = saved + SHIFT * channels;
    for (long c = 0; c < channels; c++) {
        float sum = 0, product = 0;
        for (int row = 0; row < rows; row++) {
            const float value = wide(x[row * channels + c]), given = wide(gradients[row * channels + c]);
            const float gradient = value * scale[c] + shift[c] > low ? given : 0;
            sum += gradient;
            product += gradient * (value - mean[c]);
        }
        sums[c] += sum;
        products[c] += product;
    }
}

// Add the means of `count` rows, and their squared distances from them, to those of the `before` rows (Chan et al.,
// 1979).
static void add_block(const number *restrict x, long count, long before, long channels, float *restrict mean,
                      float *restrict squares, float *restrict block_mean, float *restrict block_squares) {
    memset(block_mean, 0, channels * sizeof(float));
    memset(block_squares, 0, channels * sizeof(float));
    long row = 0;
    for (; row + ROWS <= count; row += ROWS) add_values(x + row * channels, ROWS, channels, block_mean);
    for (; row < count; row++) add_values(x + row * channels, 1, channels, block_mean);
    for (long c = 0; c < channels; c++) block_mean[c] /= count;
    for (row = 0; row + ROWS <= count; row += ROWS)
        add_squares(x + row * channels, ROWS, channels, block_mean, block_squares);
    for (; row < count; row++) add_squares(x + row * channels, 1, channels, block_mean, block_squares);
    const float share = (float)count / (before + count), weight = (float)before * share;
    for (long c = 0; c < channels; c++) {
        const float distance = block_mean[c] - mean[c];
        mean[c] += distance * share;
        squares[c] += block_squares[c] + distance * distance * weight;
    }
}

// y = relu?(normalised x); updates the running statistics and fills `saved`, float [SAVED * channels].
// Returns 0, or -1 where there is no memory.
int forward(const number *restrict x, number *restrict y, const float *restrict weight, const float *restrict bias,
            float *restrict running_mean, float *restrict running_variance, float *restrict saved, long rows,
            long channels, long relu, float momentum, float epsilon, long threads) {
    const long apart = 4 * channels + LINE; // what threads write to shares no cache line
    float *parts = calloc(threads * apart, sizeof(float));
    if (!parts) return -1;
    const long share = ((rows + threads - 1) / threads + BLOCK - 1) / BLOCK * BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long t = 0; t < threads; t++) {
        float *own = parts + t * apart;
        const long first = t * share, last = first + share < rows ? first + share : rows;
        for (long row = first; row < last; row += BLOCK)
            add_block(x + row * channels, last - row < BLOCK ? last - row : BLOCK, row - first, channels, own,
                      own + channels, own + 2 * channels, own + 3 * channels);
    }
    float *restrict mean = saved + MEAN * channels, *restrict inverse = saved + INVERSE * channels;
    float *restrict scale = saved + SCALE * channels, *restrict shift = saved + SHIFT * channels;
    for (long c = 0; c < channels; c++) {
        double all = 0, squares = 0, done = 0;
        for (long t = 0; t < threads && t * share < rows; t++) {
            const float *own = parts + t * apart;
            const double count = (t + 1) * share < rows ? share : rows - t * share, distance = own[c] - all;
            squares += own[channels + c] + distance * distance * done * count / (done + count);
            all += distance * count / (done + count);
            done += count;
        }
        mean[c] = all;
        inverse[c] = 1 / sqrt(squares / rows + epsilon);
        scale[c] = weight[c] * inverse[c];
        shift[c] = bias[c] - mean[c] * scale[c];
        running_mean[c] += momentum * (mean[c] - running_mean[c]);
        running_variance[c] += momentum * (squares / (rows - 1) - running_variance[c]);
    }
    free(parts);
    const float low = relu ? 0 : -INFINITY;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const number *restrict p = x + row * channels;
        number *restrict q = y + row * channels;
        for (long c = 0; c < channels; c++) {
            const float value = wide(p[c]) * scale[c] + shift[c];
            q[c] = narrow(value < low ? low : value); // NaN passes
        }
    }
    return 0;
}

// The gradients of x, weight and bias, from that of y. Returns 0, or -1 where there is no memory.
int backward(const number *restrict x, const number *restrict y_gradient, number *restrict x_gradient,
             const float *restrict saved, float *restrict weight_gradient, float *restrict bias_gradient, long rows,
             long channels, long relu, long threads) {
    const float *restrict mean = saved + MEAN * channels, *restrict inverse = saved + INVERSE * channels;
    const float *restrict scale = saved + SCALE * channels, *restrict shift = saved + SHIFT * channels;
    const float low = relu ? 0 : -INFINITY;
    const long share = (rows + threads - 1) / threads;
    const long apart = 2 * channels + LINE;
    double *sums = calloc(threads * apart, sizeof(double)); // of each thread, and then of products
    float *parts = malloc(threads * apart * sizeof(float));
    if (!sums || !parts) {
        free(sums);
        free(parts);
        return -1;
    }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long t = 0; t < threads; t++) {
        double *restrict own_sums = sums + t * apart;
        float *restrict block_sum = parts + t * apart, *restrict block_product = block_sum + channels;
        const long last = (t + 1) * share < rows ? (t + 1) * share : rows;
        for (long first = t * share; first < last; first += SUMMED) {
            memset(block_sum, 0, 2 * channels * sizeof(float));
            const long end = first + SUMMED < last ? first + SUMMED : last;
            long at = first * channels;
            for (; at + ROWS * channels <= end * channels; at += ROWS * channels)
                add_gradients(x + at, y_gradient + at, ROWS, channels, saved, low, block_sum, block_product);
            for (; at < end * channels; at += channels)
                add_gradients(x + at, y_gradient + at, 1, channels, saved, low, block_sum, block_product);
            for (long c = 0; c < 2 * channels; c++) own_sums[c] += block_sum[c];
        }
    }
    float *restrict of_x = parts, *restrict constant = of_x + channels;
    for (long c = 0; c < channels; c++) {
        double sum = 0, product = 0;
        for (long t = 0; t < threads; t++) {
            sum += sums[t * apart + c];
            product += sums[t * apart + channels + c];
        }
        bias_gradient[c] = sum;
        weight_gradient[c] = product * inverse[c];
        of_x[c] = -scale[c] * inverse[c] * weight_gradient[c] / rows;
        constant[c] = -scale[c] * sum / rows - of_x[c] * mean[c];
    }
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const number *restrict p = x + row * channels, *restrict g = y_gradient + row * channels;
        number *restrict q = x_gradient + row * channels;
        for (long c = 0; c < channels; c++) {
            const float value = wide(p[c]), given = wide(g[c]);
            const float gradient = value * scale[c] + shift[c] > low ? given : 0;
            q[c] = narrow(gradient * scale[c] + value * of_x[c] + constant[c]);
        }
    }
    free(sums);
    free(parts);
    return 0;
}
