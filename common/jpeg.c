// A rectangle of a baseline JPEG file as RGB pixels, bit for bit those of libjpeg-turbo with its default settings.
// What lies outside the rectangle only passes through the Huffman decoder, and what lies behind it not even that.
// The format is that of ITU-T T.81, and so are the names: an MCU is the unit of a scan, here 1, 2 or 4 blocks of
// luminance and one of each chrominance; a block is 8 x 8 values. The file may hold anything: what is not plain, or
// not right, is left to another decoder.

#include <stdint.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bit reader needs a little-endian processor"
#endif

enum { LOOK = 10 };      // bits of a code that one look into the table resolves
enum { END = 128 };      // what the end of a block skips: more than all coefficients
enum { MOST = 4096 };    // a power of two that no coefficient reaches, nor needs to: 1024 is the least of black
enum { PADDING = 2048 }; // zeros behind a segment: more than the six blocks of an MCU can take from it

typedef struct {
    uint8_t skip, size, bits, unused; // coefficients up to the one meant; bits of its value; bits of code and value
} symbol;

typedef struct {
    symbol by_look[1 << LOOK]; // `bits` is 0 where the code is longer, or none
    uint32_t limit[17];        // the first 16 bits of a code of n bits are below it
    int index[17];             // of the value of a code of n bits, less that code
    uint8_t values[256];
    int defined, for_dc; // for_dc: all values are possible sizes
} huffman;

typedef struct {
    int id, wide, high, left, top, right, bottom; // blocks in an MCU; blocks that the rectangle needs
    const uint8_t *quantiser;
    const huffman *dc, *ac;
    int prediction, stride;
    uint8_t *plane; // the values of those blocks
} component;

typedef struct {
    const uint8_t *at, *end; // what is still to be read of the file
    int width, height, interval;
    component components[3];
    uint8_t quantisers[4][64];
    int quantiser_defined[4];
    huffman tables[2][4]; // for DC and AC coefficients
} image;

static const uint8_t ZIGZAG[64] = {
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48,
    41, 34, 27, 20, 13, 6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23,
    30, 37, 44, 51, 58, 59, 52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63};

static inline int smaller(int a, int b) { return a < b ? a : b; }
static inline int larger(int a, int b) { return a > b ? a : b; }

// ---- Huffman codes

static symbol meaning(int value, int length) {
    const int size = value & 15, run = value >> 4;
    return (symbol){size || run == 15 ? run + 1 : END, size, length + size, 0};
}

// Fill `table` from how many codes have each length, and their values. Return 0 where no such code is possible.
static int build(huffman *table, const uint8_t *counts, const uint8_t *values, int all) {
    memset(table, 0, sizeof *table);
    memcpy(table->values, values, all);
    table->defined = table->for_dc = 1;
    for (int i = 0; i < all; i++) table->for_dc &= values[i] < 16;
    uint32_t code = 0;
    int next = 0;
    for (int length = 1; length <= 16; length++, code <<= 1) {
        table->index[length] = next - (int)code;
        for (int n = 0; n < counts[length - 1]; n++, code++, next++) {
            if (code >> length) return 0;
            if (length > LOOK) continue;
            for (uint32_t look = code << (LOOK - length); look < (code + 1) << (LOOK - length); look++)
                table->by_look[look] = meaning(values[next], length);
        }
        table->limit[length] = code << (16 - length);
    }
    return 1;
}

static symbol long_code(const huffman *table, uint32_t code) {
    for (int length = LOOK + 1; length <= 16; length++)
        if (code < table->limit[length]) {
            const int index = table->index[length] + (int)(code >> (16 - length));
            return meaning(table->values[index & 255], length);
        }
    return (symbol){END, 0, 0, 0}; // there is no such code
}

typedef struct {
    const uint8_t *at, *end;
    uint64_t window; // the next bits, the highest first
    int count;       // how many of them
} bit_reader;

static inline long bits_left(const bit_reader *bits) { return (bits->end - bits->at) * 8 + bits->count; }

static inline symbol read_symbol(bit_reader *bits, const huffman *table, int *value) {
    uint64_t next;
    memcpy(&next, bits->at, sizeof next);
    bits->window |= __builtin_bswap64(next) >> bits->count;
    bits->at += (63 - bits->count) >> 3;
    bits->count |= 56; // and 31 are the most that a code and its value have
    symbol found = table->by_look[bits->window >> (64 - LOOK)];
    if (!found.bits) found = long_code(table, bits->window >> 48);
    const uint64_t behind = bits->window << (found.bits - found.size);
    const int negative = ~(int)((int64_t)behind >> 63); // all bits, for a value that begins with 0
    *value = (int)(behind >> 1 >> (63 - found.size)) - (negative & ((1 << found.size) - 1));
    bits->window <<= found.bits;
    bits->count -= found.bits;
    return found;
}

// Read a block, and unless `block` is NULL its coefficients, times the quantiser, into it. Return 0 where it is wrong:
// a code that is none, too many coefficients, or some beyond what eight bits of colour can give.
static inline int read_block(bit_reader *bits, component *from, int32_t *block) {
    int value, k = 0;
    symbol found = read_symbol(bits, from->dc, &value);
    from->prediction += value;
    if (!found.bits || from->prediction < -MOST || from->prediction > MOST) return 0;
    if (block) block[0] = from->prediction * from->quantiser[0];
    uint32_t all = block ? block[0] + MOST : 0;
    while (k < 63) {
        found = read_symbol(bits, from->ac, &value);
        k += found.skip;
        if (k > 63) return k >= END && found.bits && all < 2 * MOST;
        if (!block) continue;
        block[ZIGZAG[k]] = value * from->quantiser[k]; // of value 0 where 16 zeros are skipped
        all |= block[ZIGZAG[k]] + MOST;
    }
    return all < 2 * MOST;
}

// ---- From coefficients to values: the "accurate integer" transform of Loeffler, Ligtenberg and Moschytz, 1989

typedef int32_t lanes __attribute__((vector_size(32)));

#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

static inline void transpose(lanes x[8]) {
    lanes y[8];
    for (int i = 0; i < 4; i++) {
        y[i] = PICK(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        y[i + 4] = PICK(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = i; j < i + 2; j++) {
            x[j] = PICK(y[j], y[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            x[j + 2] = PICK(y[j], y[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 8; i += 2) {
        y[i] = PICK(x[i], x[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        y[i + 1] = PICK(x[i], x[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    memcpy(x, y, sizeof y);
}

static inline void transform(lanes x[8], int shift) { // factors are in units of 2^-13
    const lanes half = (lanes){} + (1 << (shift - 1));
    const lanes a = (x[2] + x[6]) * 4433, b = a + x[2] * 6270, c = a - x[6] * 15137;
    const lanes d = ((x[0] + x[4]) << 13) + half, e = ((x[0] - x[4]) << 13) + half;
    const lanes even[4] = {d + b, e + c, e - c, d - b};
    const lanes sum = (x[7] + x[3] + x[5] + x[1]) * 9633;
    const lanes p = (x[7] + x[1]) * -7373, q = (x[5] + x[3]) * -20995;
    const lanes r = (x[7] + x[3]) * -16069 + sum, s = (x[5] + x[1]) * -3196 + sum;
    const lanes odd[4] = {x[1] * 12299 + p + s, x[3] * 25172 + q + r, x[5] * 16819 + q + s, x[7] * 2446 + p + r};
    for (int i = 0; i < 4; i++) {
        x[i] = (even[i] + odd[i]) >> shift;
        x[7 - i] = (even[i] - odd[i]) >> shift;
    }
}

static inline void write_block(const int32_t *block, uint8_t *to, int stride) {
    lanes x[8];
    memcpy(x, block, sizeof x);
    transform(x, 11); // two bits more than the values have
    transpose(x);
    transform(x, 18);
    transpose(x);
    for (int row = 0; row < 8; row++, to += stride)
        for (int i = 0; i < 8; i++) to[i] = smaller(larger(x[row][i] + 128, 0), 255);
}

// ---- The scan

// Copy the segment that begins at `jpeg->at` to `to`, without the zeros that are stuffed in, and go to its end.
static bit_reader start_segment(image *jpeg, uint8_t *to) {
    bit_reader bits = {.at = to};
    while (jpeg->at < jpeg->end) {
        const uint8_t *stop = memchr(jpeg->at, 0xFF, jpeg->end - jpeg->at);
        const long length = (stop ? stop : jpeg->end) - jpeg->at;
        memcpy(to, jpeg->at, length);
        jpeg->at += length;
        to += length;
        if (jpeg->end - jpeg->at < 2 || jpeg->at[1] != 0) break;
        *to++ = 0xFF;
        jpeg->at += 2;
    }
    memset(to, 0, PADDING);
    bits.end = to;
    for (int i = 0; i < 3; i++) jpeg->components[i].prediction = 0;
    return bits;
}

// Read a component's blocks of the MCU whose first one is at `top` and `left`. Return 0 where one is wrong.
static int read_blocks(bit_reader *bits, component *c, int top, int left) {
    for (int y = top; y < top + c->high; y++)
        for (int x = left; x < left + c->wide; x++) {
            if (y >= c->top && y < c->bottom && x >= c->left && x < c->right) {
                int32_t block[64] = {0};
                if (!read_block(bits, c, block)) return 0;
                write_block(block, c->plane + (y - c->top) * 8 * c->stride + (x - c->left) * 8, c->stride);
            } else if (!read_block(bits, c, NULL))
                return 0;
        }
    return 1;
}

// Read the scan as far as it is needed into the components' planes. Return 0 where it is damaged.
static int read_scan(image *jpeg, uint8_t *segment) {
    component *luminance = jpeg->components;
    const int across = (jpeg->width - 1) / (8 * luminance->wide) + 1;
    const int down = (jpeg->height - 1) / (8 * luminance->high) + 1;
    int last_row = 0, last_column = 0, until_restart = jpeg->interval, restarts = 0;
    for (component *c = jpeg->components; c < jpeg->components + 3; c++) {
        last_row = larger(last_row, (c->bottom - 1) / c->high);
        last_column = larger(last_column, (c->right - 1) / c->wide);
    }
    bit_reader bits = start_segment(jpeg, segment);
    for (int row = 0; row <= last_row; row++)
        for (int column = 0; column < (row < last_row ? across : last_column + 1); column++) {
            if (jpeg->interval && until_restart-- == 0) {
                if (bits_left(&bits) >= 8 || jpeg->end - jpeg->at < 2) return 0;
                if (jpeg->at[1] != 0xD0 + (restarts++ & 7)) return 0;
                jpeg->at += 2;
                bits = start_segment(jpeg, segment);
                until_restart = jpeg->interval - 1;
            }
            for (component *c = jpeg->components; c < jpeg->components + 3; c++)
                if (!read_blocks(&bits, c, row * c->high, column * c->wide)) return 0;
            if (bits_left(&bits) < 0) return 0;
        }
    return last_row < down - 1 || last_column < across - 1 || bits_left(&bits) < 8;
}

// ---- From the planes to pixels

// Return the values of chrominance for columns `left` to `left + width` of row `y`, between those of the file: 3/4 of
// the nearest and 1/4 of the next one, in both directions. `row` and `sums` are memory for width + 4 values.
static const uint8_t *chrominance(const image *jpeg, const component *c, int y, int left, int width, uint8_t *row,
                                  uint16_t *sums) {
    const int halved = jpeg->components->wide == 2, rows_halved = jpeg->components->high == 2;
    const int near_y = rows_halved ? y >> 1 : y;
    const int far_y = rows_halved ? larger(0, smaller(near_y + (y & 1 ? 1 : -1), (jpeg->height - 1) >> 1)) : y;
    const uint8_t *near = c->plane + (near_y - c->top * 8) * c->stride - c->left * 8;
    const uint8_t *far = c->plane + (far_y - c->top * 8) * c->stride - c->left * 8;
    if (!halved) return near + left;
    const int first = left >> 1, last = (left + width - 1) >> 1, final = (jpeg->width - 1) >> 1;
    const int even = rows_halved ? 8 : 7, odd = rows_halved ? 7 : 8; // libjpeg rounds so
    const int from = larger(first - 1, 0), to = smaller(last + 1, final);
    uint16_t *sum = sums + 1 - first; // sum[x] belongs to the file's column x
    for (int x = from; x <= to; x++) sum[x] = 3 * near[x] + far[x];
    if (from == first) sum[first - 1] = sum[first];
    if (to == last) sum[last + 1] = sum[last];
    for (long x = 0; x <= last - first; x++) {
        row[2 * x] = (3 * sums[x + 1] + sums[x] + even) >> 4;
        row[2 * x + 1] = (3 * sums[x + 1] + sums[x + 2] + odd) >> 4;
    }
    return row + (left & 1);
}

static void to_rgb(const uint8_t *restrict y, const uint8_t *restrict cb, const uint8_t *restrict cr,
                   uint8_t *restrict rgb, int width) { // factors of JFIF in units of 2^-16
    for (long x = 0; x < width; x++) {
        const int blue = cb[x] - 128, red = cr[x] - 128;
        const int r = y[x] + ((91881 * red + 32768) >> 16);
        const int g = y[x] + ((-22554 * blue - 46802 * red + 32768) >> 16);
        const int b = y[x] + ((116130 * blue + 32768) >> 16);
        rgb[3 * x] = smaller(larger(r, 0), 255);
        rgb[3 * x + 1] = smaller(larger(g, 0), 255);
        rgb[3 * x + 2] = smaller(larger(b, 0), 255);
    }
}

// ---- The headers

static int read_quantisers(image *jpeg, const uint8_t *at, const uint8_t *end) {
    for (; at < end; at += 65) {
        if (end - at < 65 || *at > 3) return 0; // 16 bit or none of the four
        memcpy(jpeg->quantisers[*at], at + 1, 64);
        jpeg->quantiser_defined[*at] = 1;
    }
    return 1;
}

static int read_tables(image *jpeg, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        if (end - at < 17 || at[0] & 0xEC) return 0;
        int all = 0;
        for (int i = 1; i <= 16; i++) all += at[i];
        if (all > 256 || end - at < 17 + all || !build(&jpeg->tables[at[0] >> 4][at[0] & 3], at + 1, at + 17, all))
            return 0;
        at += 17 + all;
    }
    return 1;
}

static int read_frame(image *jpeg, const uint8_t *at, const uint8_t *end) {
    if (end - at != 15 || at[0] != 8 || at[5] != 3 || jpeg->width) return 0;
    jpeg->height = at[1] << 8 | at[2];
    jpeg->width = at[3] << 8 | at[4];
    for (int i = 0; i < 3; i++) {
        const uint8_t *given = at + 6 + 3 * i;
        component *c = jpeg->components + i;
        *c = (component){.id = given[0], .wide = given[1] >> 4, .high = given[1] & 15};
        if (given[2] > 3) return 0;
        c->quantiser = jpeg->quantisers[given[2]];
        if (!jpeg->quantiser_defined[given[2]]) return 0;
    }
    // Chrominance of two columns is not smoothed by libjpeg; positions in larger images may not fit into an int.
    const int fits = jpeg->height > 0 && jpeg->width > 4 && (int64_t)jpeg->height * jpeg->width < 1 << 28;
    const component *c = jpeg->components;
    const int plain = c[1].wide == 1 && c[1].high == 1 && c[2].wide == 1 && c[2].high == 1;
    const int halved = (c->wide == 1 && c->high == 1) || (c->wide == 2 && (c->high == 1 || c->high == 2));
    const int is_rgb = c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B';
    return plain && halved && !is_rgb && fits;
}

static int read_scan_header(image *jpeg, const uint8_t *at, const uint8_t *end) {
    if (!jpeg->width || end - at != 10 || at[0] != 3 || at[7] != 0 || at[8] != 63 || at[9] != 0) return 0;
    for (int i = 0; i < 3; i++) {
        component *c = jpeg->components + i;
        const int dc = at[2 + 2 * i] >> 4, ac = at[2 + 2 * i] & 15;
        if (at[1 + 2 * i] != c->id || dc > 3 || ac > 3) return 0;
        c->dc = &jpeg->tables[0][dc];
        c->ac = &jpeg->tables[1][ac];
        if (!c->dc->defined || !c->dc->for_dc || !c->ac->defined) return 0;
    }
    return 1;
}

// Read all that stands before the first scan's data. Return 0 for what this decoder leaves to another.
static int read_headers(image *jpeg) {
    if (jpeg->end - jpeg->at < 2 || jpeg->at[0] != 0xFF || jpeg->at[1] != 0xD8) return 0;
    jpeg->at += 2;
    while (jpeg->end - jpeg->at >= 4) {
        const uint8_t *at = jpeg->at + 4, *end = jpeg->at + 2 + (jpeg->at[2] << 8 | jpeg->at[3]);
        if (jpeg->at[0] != 0xFF || end < at || end > jpeg->end) return 0;
        const int marker = jpeg->at[1];
        jpeg->at = end;
        int fine = (marker & 0xF0) == 0xE0 || marker == 0xFE; // an application's segment, a comment
        if (marker == 0xEE && end - at >= 12 && !memcmp(at, "Adobe", 5)) fine = at[11] == 1; // YCbCr
        if (marker == 0xDB) fine = read_quantisers(jpeg, at, end);
        if (marker == 0xC4) fine = read_tables(jpeg, at, end);
        if (marker == 0xC0 || marker == 0xC1) fine = read_frame(jpeg, at, end);
        if (marker == 0xDD && (fine = end - at == 2)) jpeg->interval = at[0] << 8 | at[1];
        if (marker == 0xDA) return read_scan_header(jpeg, at, end);
        if (!fine) return 0;
    }
    return 0;
}

// Find out which blocks the rectangle needs, and give their values a place in `scratch`. Return how long it is.
static long place_planes(image *jpeg, int top, int left, int height, int width, uint8_t *scratch) {
    long needed = 0;
    for (int i = 0; i < 3; i++) {
        component *c = jpeg->components + i;
        // Chrominance between those of the file needs their neighbours.
        const int halved = i && jpeg->components->wide == 2, rows_halved = i && jpeg->components->high == 2;
        const int last_x = ((left + width - 1) >> halved) + halved;
        const int last_y = ((top + height - 1) >> rows_halved) + rows_halved;
        c->left = larger((left >> halved) - halved, 0) / 8;
        c->top = larger((top >> rows_halved) - rows_halved, 0) / 8;
        c->right = smaller(last_x, (jpeg->width - 1) >> halved) / 8 + 1;
        c->bottom = smaller(last_y, (jpeg->height - 1) >> rows_halved) / 8 + 1;
        c->stride = (c->right - c->left) * 8;
        c->plane = scratch + needed;
        needed += (long)c->stride * (c->bottom - c->top) * 8;
    }
    return needed;
}

// Write the rectangle's pixels to `rgb`, [height, width, 3]. `scratch` is memory to work in, at an even address.
// Return 0, or 1 where another decoder has to: the file is of another kind, or damaged, or `scratch` is too small.
int decode(const uint8_t *file, long size, long top, long left, long height, long width, uint8_t *rgb, uint8_t *scratch,
           long scratch_size) {
    image jpeg = {.at = file, .end = file + size};
    if (!read_headers(&jpeg) || top < 0 || left < 0 || height < 1 || width < 1) return 1;
    if (top + height > jpeg.height || left + width > jpeg.width) return 1;

    uint16_t *sums = (uint16_t *)(scratch + place_planes(&jpeg, top, left, height, width, scratch));
    uint8_t *blue = (uint8_t *)(sums + width + 4), *red = blue + width + 4, *segment = red + width + 4;
    if (segment - scratch + size + PADDING > scratch_size || !read_scan(&jpeg, segment)) return 1;

    const component *c = jpeg.components;
    for (int y = top; y < top + height; y++, rgb += 3 * width) {
        const uint8_t *cb = chrominance(&jpeg, c + 1, y, left, width, blue, sums);
        const uint8_t *cr = chrominance(&jpeg, c + 2, y, left, width, red, sums);
        to_rgb(c->plane + (y - c->top * 8) * c->stride + left - c->left * 8, cb, cr, rgb, width);
    }
    return 0;
}
