/* HCCL in POSIX shared memory: the collectives that ProcessGroupHCCL needs on one machine, one card per rank.
 *
 * A rank that waits longer than HCCL_EXEC_TIMEOUT seconds for the others gets the timeout that the real library gives.
 * FAKE_NPU_HCCL_HANG=RANK:N makes rank RANK hang in its N-th all-reduce.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

extern int fake_npu_current(void);
extern void fake_npu_say(const char *text);

enum { OK = 0, BAD_PARAMETER = 1, NO_MEMORY = 3, NOT_SUPPORTED = 5, TIMEOUT = 9 };
enum { SUM, PRODUCT, MAXIMUM, MINIMUM };
enum { MAX_RANKS = 64, SLOT = 16 << 20 };

struct shared { /* zero-filled by the kernel; rank 0 sets it up and then says so */
    volatile int ready, arrived, generation;
    int card[MAX_RANKS];
    pthread_mutex_t mutex;
    pthread_cond_t all_here;
};
struct communicator {
    struct shared *shared;
    char *slots;
    int rank, size;
};
static const int item_sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2}; /* by HcclDataType */

static int wait_for_all(struct communicator *c) {
    const char *limit = getenv("HCCL_EXEC_TIMEOUT");
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += limit && atol(limit) > 0 ? atol(limit) : 1836;
    struct shared *s = c->shared;
    int failed = 0;
    pthread_mutex_lock(&s->mutex);
    int generation = s->generation;
    if (++s->arrived == c->size) {
        s->arrived = 0;
        s->generation++;
        pthread_cond_broadcast(&s->all_here);
    }
    while (s->generation == generation && !failed) failed = pthread_cond_timedwait(&s->all_here, &s->mutex, &until);
    pthread_mutex_unlock(&s->mutex);
    if (failed) fake_npu_say("EI0002: The wait execution of the Notify register times out.");
    return failed ? TIMEOUT : OK;
}
#define TOGETHER(c) do { if (wait_for_all(c)) return TIMEOUT; } while (0)

int HcclGetRootInfo(char *info) {
    memset(info, 0, 4108);
    snprintf(info, 200, "/fakehccl_%d_%ld", getpid(), random());
    return OK;
}
int HcclCommInitRootInfo(uint32_t size, const char *info, uint32_t rank, void **out) {
    int file = shm_open(info, O_CREAT | O_RDWR, 0600);
    size_t length = sizeof(struct shared) + (size_t)SLOT * size;
    if (size > MAX_RANKS || file < 0 || ftruncate(file, length)) return NO_MEMORY;
    struct communicator *c = malloc(sizeof *c);
    struct shared *s = mmap(0, length, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (s == MAP_FAILED) return NO_MEMORY;
    *c = (struct communicator){s, (char *)(s + 1), (int)rank, (int)size};
    if (rank == 0) {
        pthread_mutexattr_t mutex;
        pthread_condattr_t condition;
        pthread_mutexattr_init(&mutex);
        pthread_mutexattr_setpshared(&mutex, PTHREAD_PROCESS_SHARED);
        pthread_mutex_init(&s->mutex, &mutex);
        pthread_condattr_init(&condition);
        pthread_condattr_setpshared(&condition, PTHREAD_PROCESS_SHARED);
        pthread_cond_init(&s->all_here, &condition);
        __sync_synchronize();
        s->ready = 1;
    }
    while (!s->ready) usleep(1000);
    s->card[rank] = fake_npu_current();
    TOGETHER(c);
    shm_unlink(info);
    for (int i = 0; i < c->size; i++)
        if (i != c->rank && s->card[i] == s->card[rank]) {
            fprintf(stderr, "fake HCCL: ranks %d and %d both run on card %d\n", i, c->rank, s->card[i]);
            return BAD_PARAMETER;
        }
    *out = c;
    return OK;
}
int HcclCommInitRootInfoConfig(uint32_t size, const char *info, uint32_t rank, void *config, void **out) {
    return HcclCommInitRootInfo(size, info, rank, out);
}
int HcclCommDestroy(void *c) { return OK; }
int HcclGetCommAsyncError(void *c, int *error) { return *error = 0, OK; }
int HcclGetCommName(void *c, char *name) { return strcpy(name, "fake"), OK; }
int HcclSetConfig(int option, int64_t value) { return OK; }
uint32_t HcclGetCommConfigCapability(void) { return 0; }

/* --- reductions: the sum runs in the order of the ranks, so that all ranks get the same bits */
static float from_half(uint16_t bits) { _Float16 f; return memcpy(&f, &bits, 2), f; }
static uint16_t to_half(float value) { _Float16 f = value; uint16_t bits; return memcpy(&bits, &f, 2), bits; }
static float from_bfloat(uint16_t bits) { uint32_t u = (uint32_t)bits << 16; float f; return memcpy(&f, &u, 4), f; }
static uint16_t to_bfloat(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
#define COMBINE(a, b) (op == SUM ? a + b : op == PRODUCT ? a * b : op == MAXIMUM ? (a > b ? a : b) : (a < b ? a : b))
#define REDUCE(T, A, FROM, TO)                                                                    \
    for (uint64_t i = 0; i < count; i++) {                                                        \
        A a = FROM(((T *)c->slots)[i]);                                                           \
        for (int r = 1; r < c->size; r++) {                                                       \
            A b = FROM(((T *)(c->slots + (size_t)SLOT * r))[i]);                                  \
            a = COMBINE(a, b);                                                                    \
        }                                                                                         \
        ((T *)out)[i] = TO(a);                                                                    \
    }                                                                                             \
    return OK
static int reduce(struct communicator *c, void *out, uint64_t count, int type, int op) {
    switch (type) {
    case 0: REDUCE(int8_t, int8_t, , );
    case 1: REDUCE(int16_t, int16_t, , );
    case 2: REDUCE(int32_t, int32_t, , );
    case 3: REDUCE(uint16_t, float, from_half, to_half);
    case 4: REDUCE(float, float, , );
    case 5: REDUCE(int64_t, int64_t, , );
    case 7: REDUCE(uint8_t, uint8_t, , );
    case 11: REDUCE(uint16_t, float, from_bfloat, to_bfloat);
    }
    return NOT_SUPPORTED; /* float64, as on the cards */
}

static int hangs(struct communicator *c) {
    static int calls;
    int rank, call;
    const char *fault = getenv("FAKE_NPU_HCCL_HANG");
    return fault && sscanf(fault, "%d:%d", &rank, &call) == 2 && rank == c->rank && ++calls == call;
}
static uint64_t chunk(uint64_t count, uint64_t done, int type) {
    uint64_t room = SLOT / item_sizes[type];
    return count - done < room ? count - done : room;
}
int HcclAllReduce(void *in, void *out, uint64_t count, int type, int op, struct communicator *c, void *stream) {
    while (hangs(c)) sleep(3600);
    for (uint64_t done = 0, part; done < count; done += part) {
        size_t at = done * item_sizes[type];
        part = chunk(count, done, type);
        memcpy(c->slots + (size_t)SLOT * c->rank, (char *)in + at, part * item_sizes[type]);
        TOGETHER(c);
        if (reduce(c, (char *)out + at, part, type, op)) return NOT_SUPPORTED;
        TOGETHER(c);
    }
    return OK;
}
int HcclBroadcast(void *data, uint64_t count, int type, uint32_t root, struct communicator *c, void *stream) {
    for (uint64_t done = 0, part; done < count; done += part) {
        char *at = (char *)data + done * item_sizes[type];
        part = chunk(count, done, type);
        if ((uint32_t)c->rank == root) memcpy(c->slots, at, part * item_sizes[type]);
        TOGETHER(c);
        if ((uint32_t)c->rank != root) memcpy(at, c->slots, part * item_sizes[type]);
        TOGETHER(c);
    }
    return OK;
}
int HcclAllGather(void *in, void *out, uint64_t count, int type, struct communicator *c, void *stream) {
    for (uint64_t done = 0, part; done < count; done += part) {
        size_t at = done * item_sizes[type];
        part = chunk(count, done, type);
        memcpy(c->slots + (size_t)SLOT * c->rank, (char *)in + at, part * item_sizes[type]);
        TOGETHER(c);
        for (int r = 0; r < c->size; r++)
            memcpy((char *)out + count * item_sizes[type] * r + at, c->slots + (size_t)SLOT * r, part * item_sizes[type]);
        TOGETHER(c);
    }
    return OK;
}
