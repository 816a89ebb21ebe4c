// Both gradients of a depthwise convolution of float images in channels_last memory, in one pass over them, eight
// channels at a time.

#include <stdlib.h>
#include <string.h>

enum { WIDTH = 8, LARGEST = 7 };
typedef float lanes __attribute__((vector_size(4 * WIDTH)));

typedef struct {
    const float *images;   // [batch, height, width, channels]
    const float *gradient; // [batch, out_height, out_width, channels]
    const float *weight;   // [kernel * kernel, channels]
    float *of_images;      // the gradient of images
    float *of_weight;      // and that of weight of each image, [batch, kernel * kernel, channels]
    long height, width, channels, out_height, out_width, padding;
} convolution;

static inline lanes load(const float *from, int channels) {
    lanes result = {};
    memcpy(&result, from, channels * sizeof(float));
    return result;
}

static inline void store(float *to, lanes given, int channels) { memcpy(to, &given, channels * sizeof(float)); }

// Do row `y` of image `n` for `channels` channels from `first` on. `memory` is for two rows with padding.
static inline __attribute__((always_inline)) void do_row(const convolution *c, long n, long y, long first,
                                                         lanes *memory, const int channels, const int kernel,
                                                         const int stride) {
    const long row = (n * c->height + y) * c->width * c->channels + first, padded = c->width + 2 * c->padding;
    lanes *const pixels = memory, *const of_pixels = memory + padded;
    memset(memory, 0, 2 * padded * sizeof(lanes));
    // Eight channels of a pixel are far from those of the next in memory: what comes next is not fetched unasked.
    for (long x = 0; x < c->width; x++) {
        pixels[c->padding + x] = load(c->images + row + x * c->channels, channels);
        __builtin_prefetch(c->images + row + (x + c->width) * c->channels);
        __builtin_prefetch(c->of_images + row + x * c->channels, 1);
    }
    for (int i = 0; i < kernel; i++) { // the row of the kernel that is on this one, for another row of the result
        const long from_top = y + c->padding - i, out_y = from_top / stride;
        if (from_top < 0 || from_top % stride || out_y >= c->out_height) continue;
        const float *gradients = c->gradient + (n * c->out_height + out_y) * c->out_width * c->channels + first;
        const float *weights = c->weight + i * kernel * c->channels + first;
        float *of_weights = c->of_weight + (n * kernel + i) * kernel * c->channels + first;
        lanes weight[LARGEST], of_weight[LARGEST], begun[LARGEST]; // begun: of the pixels that the kernel is on
        for (int j = 0; j < kernel; j++) {
            weight[j] = load(weights + j * c->channels, channels);
            of_weight[j] = load(of_weights + j * c->channels, channels);
            begun[j] = (lanes){};
        }
        const lanes *pixel = pixels;
        lanes *of_pixel = of_pixels;
        for (long x = 0; x < c->out_width; x++, pixel += stride, of_pixel += stride) {
            const lanes gradient = load(gradients + x * c->channels, channels);
            if (i == 0) __builtin_prefetch(gradients + (x + c->out_width) * c->channels);
            for (int j = 0; j < kernel; j++) {
                of_weight[j] += gradient * pixel[j];
                begun[j] += gradient * weight[j];
            }
            for (int j = 0; j < stride; j++) of_pixel[j] += begun[j];
            for (int j = 0; j < kernel; j++) begun[j] = j + stride < kernel ? begun[j + stride] : (lanes){};
        }
        for (int j = 0; j < kernel - stride; j++) of_pixel[j] += begun[j];
        for (int j = 0; j < kernel; j++) store(of_weights + j * c->channels, of_weight[j], channels);
    }
    float *result = c->of_images + row;
    for (long x = 0; x < c->width; x++) store(result + x * c->channels, of_pixels[c->padding + x], channels);
}

// The same for all channels; compilers make it fast where they know the last three arguments of `do_row`.
static void do_channels(const convolution *c, long n, long y, lanes *memory, const int kernel, const int stride) {
#define FORM(known_kernel, known_stride)                                                                               \
    if (kernel == known_kernel && stride == known_stride) {                                                            \
        long first = 0;                                                                                                \
        for (; first + WIDTH <= c->channels; first += WIDTH)                                                           \
            do_row(c, n, y, first, memory, WIDTH, known_kernel, known_stride);                                         \
        if (first < c->channels) do_row(c, n, y, first, memory, c->channels - first, known_kernel, known_stride);      \
    }
    FORM(3, 1)
    FORM(3, 2)
    FORM(5, 1)
    FORM(5, 2)
    FORM(7, 1)
    FORM(7, 2)
}

// Fill `of_images` and `of_weight`, which is zeros when it comes. Returns 0, or 1 where there is no memory.
int backward(const float *images, const float *gradient, const float *weight, float *of_images, float *of_weight,
             long batch, long height, long width, long channels, long out_height, long out_width, long padding,
             long kernel, long stride, long threads) {
    const convolution c = {.images = images, .gradient = gradient, .weight = weight, .of_images = of_images,
                           .of_weight = of_weight, .height = height, .width = width, .channels = channels,
                           .out_height = out_height, .out_width = out_width, .padding = padding};
    int failed = 0;
#pragma omp parallel for num_threads(threads) reduction(| : failed)
    for (long n = 0; n < batch; n++) {
        lanes *memory = aligned_alloc(sizeof(lanes), 2 * (width + 2 * padding) * sizeof(lanes));
        for (long y = 0; memory && y < height; y++) do_channels(&c, n, y, memory, kernel, stride);
        failed |= !memory;
        free(memory);
    }
    return failed;
}
