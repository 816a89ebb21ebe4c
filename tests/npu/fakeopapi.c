/* The one operator of libopapi that torch_npu's C++ calls past the dispatcher in what we use: ProcessGroupHCCL lengthens
 * vectors to whole blocks before an all-gather. Any other one is reported by torch_npu by its name. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_SUPPORTED = 161002 };
static const int item_sizes[] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2};

struct tensor { int64_t rows, length; int item; char *data; };
struct numbers { uint64_t count; int64_t values[16]; };
struct padding { struct tensor *from, *to; };

struct tensor *aclCreateTensor(const int64_t *sizes, uint64_t dimensions, int type, const int64_t *strides,
                               int64_t offset, int format, const int64_t *storage, uint64_t storage_dimensions,
                               void *data) {
    struct tensor *t = malloc(sizeof *t);
    *t = (struct tensor){1, dimensions ? sizes[dimensions - 1] : 1, item_sizes[type], (char *)data + offset * item_sizes[type]};
    for (uint64_t i = 0; i + 1 < dimensions; i++) t->rows *= sizes[i];
    return t;
}
struct numbers *aclCreateIntArray(const int64_t *values, uint64_t count) {
    struct numbers *n = malloc(sizeof *n);
    n->count = count;
    memcpy(n->values, values, count < 16 ? 8 * count : sizeof n->values);
    return n;
}
void *aclCreateScalar(void *value, int type) { return calloc(1, 8); }
int aclDestroyTensor(void *t) { return free(t), OK; }
int aclDestroyIntArray(void *n) { return free(n), OK; }
int aclDestroyScalar(void *s) { return free(s), OK; }
int aclDestroyAclOpExecutor(void *executor) { return OK; }

/* Zeros behind every row, nothing else. */
int aclnnConstantPadNdGetWorkspaceSize(struct tensor *from, struct numbers *pads, void *value, struct tensor *to,
                                       uint64_t *workspace, void **executor) {
    if (from->rows != to->rows || pads->count != 2 || pads->values[0] != 0) return NOT_SUPPORTED;
    struct padding *padding = malloc(sizeof *padding);
    *padding = (struct padding){from, to};
    return *workspace = 0, *executor = padding, OK;
}
int aclnnConstantPadNd(void *workspace, uint64_t size, struct padding *padding, void *stream) {
    struct tensor *from = padding->from, *to = padding->to;
    memset(to->data, 0, to->rows * to->length * to->item);
    for (int64_t row = 0; row < from->rows; row++)
        memcpy(to->data + row * to->length * to->item, from->data + row * from->length * from->item, from->length * from->item);
    return free(padding), OK;
}
