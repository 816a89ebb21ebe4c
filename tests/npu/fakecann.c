/* The CANN runtime (libascendcl) in host memory: enough of it for torch_npu to find cards, allocate, copy and wait.
 *
 * Every call is synchronous. What is missing here is missing on purpose: torch_npu then reports it by name, or the
 * function that build_cann.py generates for it fails loudly. Faults are injected by environment variables (README.md).
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_DEVICE = 107001, NO_CONTEXT = 107002, OUT_OF_MEMORY = 207001, CARD_IS_GONE = 507033 };

static __thread int current = -1;
static __thread char message[256];
static atomic_size_t allocated;
static atomic_uintptr_t next_handle = 0x1000;
static atomic_int overflow; /* the status flag of a first-generation card; a process has one card */

static long number(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}
static int installed(void) { return (int)number("FAKE_NPU_COUNT", 8); }
static int cards(void) { /* those that ASCEND_RT_VISIBLE_DEVICES names, in ascending order */
    const char *text = getenv("ASCEND_RT_VISIBLE_DEVICES");
    int count = 0, card, last = -1, length;
    if (!text) return installed();
    for (; sscanf(text, "%d%n", &card, &length) == 1 && card < installed(); last = card, count++) {
        if (card <= last) return 0;
        text += length + (text[length] == ',');
    }
    return count;
}
static size_t memory(void) { return (size_t)number("FAKE_NPU_MEMORY_MIB", 65536) << 20; }
const char *aclrtGetSocName(void) {
    const char *name = getenv("FAKE_NPU_SOC");
    return name && *name ? name : "Ascend910B3";
}

/* --- for kernels.cpp and fakehccl.c */
int fake_npu_is_first_generation(void) {
    const char *name = aclrtGetSocName();
    return !((strncmp(name, "Ascend910B", 10) == 0 && name[10]) || strncmp(name, "Ascend910_", 10) == 0);
}
int fake_npu_current(void) { return current; }
int fake_npu_overflow(void) { return overflow; }
void fake_npu_set_overflow(int value) { overflow = value; }
void fake_npu_say(const char *text) { snprintf(message, sizeof message, "%s", text); }

/* --- process and cards */
const char *aclGetRecentErrMsg(void) { return message; }
int aclInit(const char *config) { return OK; }
int aclFinalize(void) { return OK; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}
int aclrtGetDeviceCount(uint32_t *count) { return *count = cards(), OK; }
int drvGetDevNum(uint32_t *count) { return *count = installed(), OK; } /* of libascend_hal */
int aclrtSetDevice(int device) {
    if (device < 0 || device >= cards()) return fake_npu_say("[Error]: Invalid device ID."), INVALID_DEVICE;
    if (device == number("FAKE_NPU_MISSING", -1)) return fake_npu_say("[Error]: drv open device failed."), CARD_IS_GONE;
    return current = device, OK;
}
int aclrtGetDevice(int *device) { return *device = current, current < 0 ? NO_CONTEXT : OK; }
int aclrtResetDevice(int device) { return OK; }
int aclrtResetDeviceForce(int device) { return OK; }
int aclrtGetCurrentContext(void **context) { return *context = (void *)(uintptr_t)(0x100 + current), OK; }
int aclrtSetCurrentContext(void *context) { return current = (int)((uintptr_t)context - 0x100), OK; }
int aclrtGetPrimaryCtxState(int device, uint32_t *flags, int *active) { return *active = current >= 0, OK; }
int aclrtDeviceGetBareTgid(int *pid) { return *pid = 1, OK; }
int aclrtDeviceCanAccessPeer(int *can, int from, int to) { return *can = 1, OK; }
int aclrtDeviceEnablePeerAccess(int device, uint32_t flags) { return OK; }
int aclrtGetLogicDevIdByUserDevId(int user, int *logical) { return *logical = user, OK; }
int aclGetDeviceCapability(uint32_t device, int what, int64_t *value) { return *value = 20, OK; }
int aclrtGetDeviceInfo(uint32_t device, int what, int64_t *value) { return *value = 20, OK; }
int aclGetCannAttribute(int what, int *has) { return *has = !fake_npu_is_first_generation(), OK; }

/* --- options: 10 is the compilation mode, on by default on the first generation */
int aclSetCompileopt(int option, const char *value) { return OK; }
size_t aclGetCompileoptSize(int option) { return 256; }
int aclGetCompileopt(int option, char *value, size_t size) {
    return snprintf(value, size, "%s", option != 10 ? "" : fake_npu_is_first_generation() ? "enable" : "disable"), OK;
}
int aclopSetCompileFlag(int flag) { return OK; }
int aclrtSetDeviceSatMode(int mode) { return OK; }
int aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
int aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }
int aclrtCtxSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtSetSysParamOpt(int option, int64_t value) { return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { return *value = 0, OK; }

/* --- memory */
int aclrtMalloc(void **out, size_t size, int policy) {
    size = size ? size : 512;
    if (allocated + size > memory()) return fake_npu_say("[Error]: out of device memory."), OUT_OF_MEMORY;
    if (posix_memalign(out, 512, size)) return OUT_OF_MEMORY;
    allocated += malloc_usable_size(*out);
    return OK;
}
int aclrtMallocAlign32(void **out, size_t size, int policy) { return aclrtMalloc(out, size, policy); }
int aclrtFree(void *block) {
    allocated -= malloc_usable_size(block);
    return free(block), OK;
}
int aclrtMallocHost(void **out, size_t size) { return posix_memalign(out, 512, size ? size : 512) ? OUT_OF_MEMORY : OK; }
int aclrtFreeHost(void *block) { return free(block), OK; }
int aclrtGetMemInfo(int kind, size_t *left, size_t *total) {
    *total = memory();
    return *left = *total - (allocated < *total ? allocated : *total), OK;
}
int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind) { return memmove(to, from, size), OK; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream) {
    return memmove(to, from, size), OK;
}
int aclrtMemset(void *to, size_t room, int value, size_t size) { return memset(to, value, size), OK; }
int aclrtMemsetAsync(void *to, size_t room, int value, size_t size, void *s) { return memset(to, value, size), OK; }

/* --- streams and events: all work is done when it is issued */
static int handle(void **out) { return *out = (void *)(next_handle += 8), OK; }
int aclrtCreateStream(void **out) { return handle(out); }
int aclrtCreateStreamWithConfig(void **out, uint32_t priority, uint32_t flag) { return handle(out); }
int aclrtCreateEventWithFlag(void **out, uint32_t flag) { return handle(out); }
int aclrtCreateEventExWithFlag(void **out, uint32_t flag) { return handle(out); }
int aclrtDestroyStream(void *stream) { return OK; }
int aclrtDestroyStreamForce(void *stream) { return OK; }
int aclrtDestroyEvent(void *event) { return OK; }
int aclrtRecordEvent(void *event, void *stream) { return OK; }
int aclrtResetEvent(void *event, void *stream) { return OK; }
int aclrtStreamWaitEvent(void *stream, void *event) { return OK; }
int aclrtSynchronizeEvent(void *event) { return OK; }
int aclrtSynchronizeStream(void *stream) { return OK; }
int aclrtSynchronizeStreamWithTimeout(void *stream, int milliseconds) { return OK; }
int aclrtSynchronizeDevice(void) { return OK; }
int aclrtSynchronizeDeviceWithTimeout(int milliseconds) { return OK; }
int aclrtStreamQuery(void *stream, int *state) { return *state = 0, OK; } /* complete */
int aclrtQueryEventStatus(void *event, int *state) { return *state = 1, OK; }
int aclrtQueryEventWaitStatus(void *event, int *state) { return *state = 1, OK; }
int aclrtEventElapsedTime(float *milliseconds, void *from, void *to) { return *milliseconds = 0.1f, OK; }
int aclrtSetStreamFailureMode(void *stream, uint64_t mode) { return OK; }
int aclrtSetStreamOverflowSwitch(void *stream, uint32_t on) { return OK; }
int aclrtSubscribeReport(uint64_t thread, void *stream) { return OK; }
int aclrtUnSubscribeReport(uint64_t thread, void *stream) { return OK; }
int aclrtProcessReport(int milliseconds) { return OK; }
int aclrtPeekAtLastError(int level) { return OK; }

/* --- first-generation operators: those that read and clear the overflow flag, a copy, and a constant */
struct buffer { void *data; size_t size; };
void *aclCreateDataBuffer(void *data, size_t size) {
    struct buffer *buffer = malloc(sizeof *buffer);
    return *buffer = (struct buffer){data, size}, buffer;
}
int aclDestroyDataBuffer(void *buffer) { return free(buffer), OK; }
void *aclGetDataBufferAddr(struct buffer *buffer) { return buffer->data; }
size_t aclGetDataBufferSizeV2(struct buffer *buffer) { return buffer->size; }
struct description { int type, dimensions; int64_t sizes[8]; };
void *aclCreateTensorDesc(int type, int dimensions, const int64_t *sizes, int format) {
    struct description *result = calloc(1, sizeof *result);
    *result = (struct description){type, dimensions > 8 ? 8 : dimensions};
    memcpy(result->sizes, sizes, result->dimensions * sizeof *sizes);
    return result;
}
static size_t width(const struct description *description) { /* of a number of this aclDataType, in bytes */
    static const unsigned char widths[28] = {4, 2, 1, 4, 1, 0, 2, 2, 4, 8, 8, 8, 1, [27] = 2};
    return widths[description->type];
}
int aclSetTensorPlaceMent(void *description, int place) { return OK; }
int aclopSetAttrString(void *attribute, const char *name, const char *value) { return OK; }
int aclopSetAttrBool(void *attribute, const char *name, unsigned char value) { return OK; }
void aclDestroyTensorDesc(void *description) { free(description); }
int aclSetTensorFormat(void *description, int format) { return OK; }
int aclSetTensorShape(void *description, int dimensions, const int64_t *sizes) { return OK; }
void *aclopCreateAttr(void) { return calloc(1, 64); }
void aclopDestroyAttr(void *attribute) { free(attribute); }
int aclopCompileAndExecute(const char *type, int inputs, struct description **in_desc, struct buffer **in, int outputs,
                           struct description **out_desc, struct buffer **out, void *attribute, int engine, int compile,
                           const char *path, void *stream) {
    if (strncmp(type, "NPUGetFloatStatus", 17) == 0) {
        memset(out[0]->data, 0, out[0]->size);
        *(float *)out[0]->data = (float)overflow;
        if (inputs) *(float *)in[0]->data = (float)overflow; /* the operator writes both */
    } else if (strncmp(type, "NPUClearFloatStatus", 19) == 0) {
        overflow = 0;
        memset(out[0]->data, 0, out[0]->size);
    } else if (strcmp(type, "Identity") == 0) {
        memcpy(out[0]->data, in[0]->data, out[0]->size < in[0]->size ? out[0]->size : in[0]->size);
    } else if (strcmp(type, "Fill") == 0) { /* its inputs are a shape and a number */
        size_t size = width(out_desc[0]);
        for (size_t at = 0; at + size <= out[0]->size; at += size) memcpy((char *)out[0]->data + at, in[1]->data, size);
    } else if (strcmp(type, "PadV3") == 0) { /* of rows, with zeros behind them, as torch_npu's allgather does it */
        int last = in_desc[0]->dimensions - 1;
        size_t from = width(in_desc[0]) * in_desc[0]->sizes[last], to = width(in_desc[0]) * out_desc[0]->sizes[last];
        memset(out[0]->data, 0, out[0]->size);
        for (size_t row = 0; (row + 1) * from <= in[0]->size && (row + 1) * to <= out[0]->size; row++)
            memcpy((char *)out[0]->data + row * to, (char *)in[0]->data + row * from, from);
    } else {
        fprintf(stderr, "fake CANN: operator %s is not emulated\n", type);
        return 100024; /* ACL_ERROR_OP_NOT_FOUND */
    }
    return OK;
}

/* --- the profiler (libmsprofiler): it records nothing, torch_npu adds what the host did */
int aclprofInit(const char *path, size_t length) { return OK; }
int aclprofFinalize(void) { return OK; }
int aclprofWarmup(const void *config) { return OK; }
int aclprofStart(const void *config) { return OK; }
int aclprofStop(const void *config) { return OK; }
int aclprofSetConfig(int type, const char *value, size_t length) { return OK; }
void *aclprofCreateConfig(uint32_t *cards, uint32_t count, int metrics, void *events, uint64_t types) { return &current; }
int aclprofDestroyConfig(const void *config) { return OK; }
int aclprofRegisterDeviceCallback(void) { return OK; }
