// Runs CUDA kernels on the CPU, for tests: cuda_on_cpu.py compiles a kernel file with this text before it.
//
// A CUDA thread is a function call, on a stack of its own (a fiber) as soon as it has to wait for another thread.
// Blocks run one after another. Which thread goes on is the scheduler's choice, so that a kernel that lacks a barrier
// gives different results in different orders. Shared memory is full of NaN before every block. What is found wrong
// ends the launch with a message; the process lives on.
//
// Stricter than the hardware: no thread may end where others of its block have yet to reach a barrier, or where lanes
// of its warp have yet to shuffle, vote or meet with it in their mask; and after lanes have issued different numbers of
// cp.async, and so gone apart, there is a __syncwarp() or __syncthreads() before ldmatrix, which wants them together.
//
// Not seen: races that no order of threads shows; a missing __syncwarp() before a shuffle, mma or ldmatrix (they let
// the warp's writes be seen here); races between blocks, and waiting of one block for another (it never ends); indices
// out of range through a pointer, but for the end of dynamic shared memory (arrays of known length are checked). Global
// memory is the caller's to watch. A `__device__` variable is not supported: it would be taken for shared memory.
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <utility>
#if !defined(__x86_64__) || defined(CUDA_ON_CPU_UCONTEXT)
#include <ucontext.h>
#endif

// -- the words of the language --

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static __attribute__((used))  // g++ is not to conclude that what nothing writes is zero
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))  // g++ takes no alignas after `static`
#define DYNAMIC_SHARED(type, name) type* name = (type*)cuda_on_cpu::machine.dynamic

#define CUDA_ON_CPU_VECTORS(T, name)                                                             \
    struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                           \
    struct name##3 { T x, y, z; };                                                               \
    struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };                \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                   \
    inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                           \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(signed char, char)
CUDA_ON_CPU_VECTORS(unsigned char, uchar)
CUDA_ON_CPU_VECTORS(short, short)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of zero-initialised memory the kernels' shared arrays are all there is: what is the emulator's own lies elsewhere.
#define CUDA_ON_CPU_STATE static __attribute__((section("cuda_on_cpu")))
extern "C" __attribute__((visibility("hidden"))) char __bss_start[], _end[];

CUDA_ON_CPU_STATE uint3 threadIdx, blockIdx;
CUDA_ON_CPU_STATE dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// -- fibers: a barrier takes each thread some 10 ns with a switch of stacks in assembler, and 250 with ucontext --

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
typedef void* Context;  // the stack pointer; on the stack, the registers that a function must preserve

extern "C" __attribute__((visibility("hidden"))) void cuda_on_cpu_switch(Context* from, Context to);
asm(R"(
    .text
    .globl cuda_on_cpu_switch
    .hidden cuda_on_cpu_switch
    .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

inline void switch_context(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }

inline void make_context(Context& context, char* stack, size_t size, void (*run)()) {
    void** top = (void**)(stack + size);
    *--top = nullptr;     // where a caller's return address would be: it makes the alignment right
    *--top = (void*)run;  // where `ret` goes
    context = top - 6;    // six registers, of any value
}
#else
typedef ucontext_t Context;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void make_context(Context& context, char* stack, size_t size, void (*run)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    makecontext(&context, run, 0);
}
#endif

constexpr unsigned LANES = 32, MAX_WARPS = 32, MAX_THREADS = LANES * MAX_WARPS, MAX_PARAMETERS = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr size_t STACK = 64 << 10;  // no frame is larger than a quarter of it: the compiler is told to refuse that
constexpr size_t MAX_COPIES = 256, COPIES = 8 << 10;
constexpr size_t MAX_SHARED = 227 << 10;  // the most a block can have on sm_90
constexpr size_t GUARD = 64 << 10;        // a page, however large pages are

struct Copy {  // a cp.async under way
    char* to;
    const char* from;
    unsigned group;
};

struct Fiber {
    Context context;
    Copy* copies;            // of the thread that runs on it, in the order of their issue
    unsigned copying, group; // their number; that of the groups committed
    unsigned issued;         // how many since the thread was last together with its warp
    Fiber* next;             // in the list of those that no thread runs on
};

struct Warp;
typedef void (*Work)(Warp& warp, unsigned lanes);

struct Warp {                                             // sets of lanes have a bit for each
    unsigned lanes, alive;                                // those there are, and those that have not ended
    unsigned ready, at_barrier, meeting;                  // able to run; waiting for the block; waiting for the warp
    unsigned mask[LANES];                                 // of each lane that waits for its warp: with which lanes,
    int line[LANES];                                      // where,
    Work work[LANES];                                     // what for,
    void* operand[LANES];                                 // and what it brings along
};

typedef uint64_t Slot;  // holds an argument

struct Machine {
    void (*kernel)(const Slot*);
    const Slot* arguments;
    char* dynamic;  // shared memory; it ends where memory ends that may be touched
    size_t dynamic_size;
    unsigned order, random;          // of threads: 0 ascending, 1 descending, otherwise random
    unsigned current, live, arrived; // the thread that runs; how many have not ended, and are at the barrier
    int barrier_line;
    unsigned ready_warps;  // the set of those with lanes able to run
    Warp warp[MAX_WARPS];
    uint3 index[MAX_THREADS];   // threadIdx of each
    Fiber* fiber[MAX_THREADS];  // none before a thread's start and after its end
    Fiber fibers[MAX_THREADS];
    unsigned made;  // of the fibers
    Fiber* free;
    char* memory;  // the fibers' copies and stacks
    Context host;  // who launched the kernel
    bool failed;
    char message[1000];
};
CUDA_ON_CPU_STATE Machine machine;

// Ends the launch. The message is "line:text", line 0 where it is not known.
[[noreturn]] __attribute__((format(printf, 3, 4))) inline void fail(unsigned thread, int line, const char* text, ...) {
    Machine& m = machine;
    __builtin_va_list values;
    __builtin_va_start(values, text);
    size_t size = sizeof m.message, n = snprintf(m.message, size, "%d:", line);
    n += vsnprintf(m.message + n, size - n, text, values);
    const uint3 b = blockIdx, t = m.index[thread];
    snprintf(m.message + n, size - n, "; block (%u, %u, %u), thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
    m.failed = true;
    Context abandoned;
    switch_context(abandoned, m.host);
    __builtin_unreachable();
}

// -- a trace of what a kernel asks of memory: g++ -fsanitize=thread calls __tsan_read4 and the like at each access that
// other threads might see, and nothing else of that sanitizer is here --

struct Trace {
    uint64_t* first;    // of the sectors asked for: an address in each, with the highest bit set where it is written
    uint64_t count, room, products;  // products: of the tensor cores, a warp's each
};
extern "C" __attribute__((visibility("default"))) Trace cuda_on_cpu_trace;
__attribute__((section("cuda_on_cpu"))) Trace cuda_on_cpu_trace;

#ifdef __SANITIZE_THREAD__
#define CUDA_ON_CPU_UNTRACED __attribute__((no_sanitize("thread")))  // also where most time goes by
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[];

constexpr size_t SECTOR = 32;    // bytes, the least that caches and memory move
constexpr size_t NOTES = 1 << 16;  // as many as fit the processor's cache: a block makes some thousands
constexpr unsigned RECENT = 32;  // accesses of a thread

struct Note { uint64_t key; uint32_t block, times; };
struct Past { uint64_t end[RECENT]; unsigned next; };  // of its latest accesses, with the bit of those that write
CUDA_ON_CPU_STATE Note* notes;  // of the current block: by instruction and thread, or by request of a warp and sector
CUDA_ON_CPU_STATE Past past[MAX_THREADS];
CUDA_ON_CPU_STATE uint32_t noted, noted_blocks = 1;

// How often this has been noted in the block before. Different things have different keys, but for a chance of 2^-64.
CUDA_ON_CPU_UNTRACED inline uint32_t note(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    const uint64_t parts[] = {a, b, c, d};
    uint64_t key = 0;
    for (uint64_t part : parts) key = (key ^ part) * 0x9E3779B97F4A7C15u, key ^= key >> 29;
    for (size_t i = key % NOTES;; i = (i + 1) % NOTES) {
        Note& n = notes[i];
        if (n.block != noted_blocks) {
            if (++noted == NOTES) fail(machine.current, 0, "a block asks for too much memory to be traced");
            n = {key, noted_blocks, 0};
        }
        if (n.key == key) return n.times++;
    }
}

// A warp's instruction asks once for each sector that its lanes touch. What is the emulator's, or in shared memory, does
// not count; nor does the next item of a pack of 16 bytes, which are one load or store on a GPU.
CUDA_ON_CPU_UNTRACED inline void trace(const void* address, size_t size, uint64_t write, void* place) {
    const Machine& m = machine;
    const char* p = (const char*)address;
    Trace& t = cuda_on_cpu_trace;
    if (!t.first || !notes || (p >= __ehdr_start && p < _end) || (p >= m.dynamic && p < m.dynamic + m.dynamic_size) ||
        (p >= m.memory && p < m.memory + MAX_THREADS * (COPIES + STACK)))
        return;
    const uint64_t at = (uint64_t)p, flag = write << 63;
    const uint32_t turn = note((uint64_t)place, m.current, 0, ~0ull);
    Past& own = past[m.current];
    bool more = false;
    for (unsigned i = 0; i < RECENT && at % 16; i++) more |= own.end[i] == (at | flag);
    own.end[own.next++ % RECENT] = (at + size) | flag;
    if (more) return;
    for (uint64_t sector = at / SECTOR; sector <= (at + size - 1) / SECTOR; sector++)
        if (!note((uint64_t)place, m.current / LANES, turn, sector)) {
            if (t.count < t.room) t.first[t.count] = (sector > at / SECTOR ? sector * SECTOR : at) | flag;
            t.count++;
        }
}

#define CUDA_ON_CPU_TRACED(name, ...)                                                             \
    extern "C" __attribute__((visibility("hidden"), used, noinline)) CUDA_ON_CPU_UNTRACED inline  \
    void __tsan_##name(void* address __VA_ARGS__)
#define CUDA_ON_CPU_TRACED_OF(size)                                                               \
    CUDA_ON_CPU_TRACED(read##size) { trace(address, size, 0, __builtin_return_address(0)); }      \
    CUDA_ON_CPU_TRACED(write##size) { trace(address, size, 1, __builtin_return_address(0)); }     \
    CUDA_ON_CPU_TRACED(unaligned_read##size) { trace(address, size, 0, __builtin_return_address(0)); }   \
    CUDA_ON_CPU_TRACED(unaligned_write##size) { trace(address, size, 1, __builtin_return_address(0)); }
CUDA_ON_CPU_TRACED_OF(1) CUDA_ON_CPU_TRACED_OF(2) CUDA_ON_CPU_TRACED_OF(4) CUDA_ON_CPU_TRACED_OF(8)
CUDA_ON_CPU_TRACED_OF(16)
CUDA_ON_CPU_TRACED(read_range, , size_t size) { trace(address, size, 0, __builtin_return_address(0)); }
CUDA_ON_CPU_TRACED(write_range, , size_t size) { trace(address, size, 1, __builtin_return_address(0)); }
CUDA_ON_CPU_TRACED(func_entry) {}
CUDA_ON_CPU_TRACED(vptr_update, , void*) {}
extern "C" __attribute__((visibility("hidden"), used)) inline void __tsan_func_exit() {}
extern "C" __attribute__((visibility("hidden"), used)) inline void __tsan_init() {}

CUDA_ON_CPU_UNTRACED inline void begin_traced_block() {
    noted = 0, noted_blocks++;
    for (Past& own : past) own = {};
}
#else
#define CUDA_ON_CPU_UNTRACED
inline void begin_traced_block() {}
#endif

// -- the scheduler --

CUDA_ON_CPU_UNTRACED inline Warp& current_warp() { return machine.warp[machine.current / LANES]; }
CUDA_ON_CPU_UNTRACED inline unsigned current_lane() { return machine.current % LANES; }

CUDA_ON_CPU_UNTRACED inline void wake(unsigned warp, unsigned lanes) {
    machine.warp[warp].ready |= lanes;
    if (lanes) machine.ready_warps |= 1u << warp;
}

[[noreturn]] inline void deadlock() {
    Machine& m = machine;
    for (unsigned w = 0; w < MAX_WARPS; w++) {
        const Warp& warp = m.warp[w];
        if (!warp.meeting) continue;
        unsigned lane = __builtin_ctz(warp.meeting), missing = warp.mask[lane] & warp.lanes & ~warp.meeting;
        fail(w * LANES + lane, warp.line[lane],
             "deadlock: lane %u waits for the lanes 0x%08x of its warp, and %u threads of the block are in "
             "__syncthreads() (line %d)", lane, missing, m.arrived, m.barrier_line);
    }
    __builtin_unreachable();  // with nobody in a meeting, all are at the barrier, and that opens
}

// The element of a set that comes first when one begins at `from` and goes round.
CUDA_ON_CPU_UNTRACED inline unsigned pick(unsigned set, unsigned from) {
    unsigned turned = from ? set >> from | set << (LANES - from) : set;
    return (__builtin_ctz(turned) + from) % LANES;
}

// Which thread is to go on.
CUDA_ON_CPU_UNTRACED inline unsigned choose() {
    Machine& m = machine;
    if (!m.ready_warps) deadlock();
    unsigned w, lane;
    if (m.order == 0) {
        w = __builtin_ctz(m.ready_warps);
        lane = __builtin_ctz(m.warp[w].ready);
    } else if (m.order == 1) {
        w = 31 - __builtin_clz(m.ready_warps);
        lane = 31 - __builtin_clz(m.warp[w].ready);
    } else {
        m.random = m.random * 1664525u + 1013904223u;
        w = m.current / LANES;  // mostly the same warp, or none would ever be ahead of another
        if (!m.warp[w].ready || m.random >> 29 == 0) w = pick(m.ready_warps, m.random >> 24 & 31);
        lane = pick(m.warp[w].ready, m.random >> 19 & 31);
    }
    m.warp[w].ready &= ~(1u << lane);
    if (!m.warp[w].ready) m.ready_warps &= ~(1u << w);
    return w * LANES + lane;
}

inline void run_threads();

inline Fiber* free_fiber() {
    Machine& m = machine;
    if (Fiber* fiber = m.free) {
        m.free = fiber->next;
        return fiber;
    }
    unsigned i = m.made++;
    char* memory = m.memory + i * (COPIES + STACK);
    Fiber& fiber = m.fibers[i];
    fiber.copies = (Copy*)memory;
    size_t shift = i % 61 * 320;  // or the same variable of all threads would fall on the same lines of the cache
    make_context(fiber.context, memory + COPIES, STACK - shift, run_threads);
    return &fiber;
}

// Makes `thread` the current one, on its own fiber or, where it has none yet, on `fiber` or a free one.
CUDA_ON_CPU_UNTRACED inline Fiber& enter(unsigned thread, Fiber* fiber = nullptr) {
    Machine& m = machine;
    m.current = thread;
    threadIdx = m.index[thread];
    if (!m.fiber[thread]) {
        m.fiber[thread] = fiber ? fiber : free_fiber();
        m.fiber[thread]->copying = m.fiber[thread]->group = m.fiber[thread]->issued = 0;
    }
    return *m.fiber[thread];
}

// Lets another thread run, until this one is chosen again.
__attribute__((noinline)) CUDA_ON_CPU_UNTRACED inline void pause() {
    Machine& m = machine;
    unsigned self = m.current, next = choose();
    if (next != self) switch_context(m.fiber[self]->context, enter(next).context);
}

inline void release_barrier() {
    Machine& m = machine;
    m.arrived = 0;
    for (unsigned w = 0; w < MAX_WARPS; w++) {
        wake(w, m.warp[w].at_barrier);
        m.warp[w].at_barrier = 0;
    }
}

// All of these lanes have come.
CUDA_ON_CPU_UNTRACED inline void finish_meeting(Warp& warp, unsigned lanes) {
    unsigned w = &warp - machine.warp, first = __builtin_ctz(lanes);
    for (unsigned i = first; i < LANES; i++) {
        if (!(lanes >> i & 1)) continue;
        if (warp.mask[i] != warp.mask[first])
            fail(w * LANES + i, warp.line[i], "lane %u has mask 0x%08x, lane %u of its warp 0x%08x (line %d)", i,
                 warp.mask[i], first, warp.mask[first], warp.line[first]);
        if (warp.line[i] != warp.line[first] || warp.work[i] != warp.work[first])
            fail(w * LANES + i, warp.line[i], "lane %u of the warp meets lane %u at another place (line %d)", i, first,
                 warp.line[first]);
    }
    warp.work[first](warp, lanes);
    warp.meeting &= ~lanes;
    wake(w, lanes);
}

// Waits for the other lanes of the mask. The last to come does the work of all.
CUDA_ON_CPU_UNTRACED inline void meet(unsigned mask, int line, Work work, void* operand) {
    Warp& warp = current_warp();
    unsigned lane = current_lane(), needed = mask & warp.lanes, ended = needed & ~warp.alive;
    if (!(mask >> lane & 1)) fail(machine.current, line, "lane %u is not in its own mask 0x%08x", lane, mask);
    if (ended) fail(machine.current, line, "lane %u needs lane %u, which has ended", lane, __builtin_ctz(ended));
    warp.mask[lane] = mask;
    warp.line[lane] = line;
    warp.work[lane] = work;
    warp.operand[lane] = operand;
    warp.meeting |= 1u << lane;
    if ((warp.meeting & needed) == needed) finish_meeting(warp, needed);
    pause();
}

// The current thread has come to its end, where none may wait for it.
inline void end_thread() {
    Machine& m = machine;
    Warp& warp = current_warp();
    unsigned self = current_lane();
    if (m.arrived)
        fail(m.current, m.barrier_line, "divergent barrier: %u threads are in this __syncthreads(), one has ended",
             m.arrived);
    for (unsigned left = warp.meeting; left; left &= left - 1) {
        unsigned lane = __builtin_ctz(left);
        if (warp.mask[lane] >> self & 1)
            fail(m.current, warp.line[lane], "lane %u waits for lane %u, which has ended", lane, self);
    }
    warp.alive &= ~(1u << self);
    m.live--;
}

// What a fiber does: the current thread, and then whichever is next. A thread that waits keeps its fiber; a kernel
// without barriers is a loop of function calls on a single one.
inline void run_threads() {
    Machine& m = machine;
    for (;;) {
        m.kernel(m.arguments);
        Fiber& fiber = *m.fiber[m.current];
        m.fiber[m.current] = nullptr;
        end_thread();
        unsigned next = m.live ? choose() : MAX_THREADS;
        if (m.live && !m.fiber[next]) {
            enter(next, &fiber);
            continue;
        }
        fiber.next = m.free;
        m.free = &fiber;
        switch_context(fiber.context, m.live ? enter(next).context : m.host);
    }
}

inline void run_block() {
    Machine& m = machine;
    unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    m.live = threads;
    m.arrived = m.ready_warps = 0;
    for (unsigned w = 0; w * LANES < threads; w++) {
        Warp& warp = m.warp[w];
        unsigned lanes = threads - w * LANES < LANES ? (1u << threads % LANES) - 1 : ALL_LANES;
        warp.lanes = warp.alive = lanes;
        warp.ready = warp.at_barrier = warp.meeting = 0;
        wake(w, lanes);
    }
    memset(__bss_start, 0xff, _end - __bss_start);  // NaN
    memset(m.dynamic, 0xff, m.dynamic_size);
    begin_traced_block();
    switch_context(m.host, enter(choose()).context);
}

// -- faults of the processor, and what g++'s checks find --

inline void on_fault(int signal, siginfo_t* info, void*) {
    Machine& m = machine;
    const char* address = (const char*)info->si_addr;
    const char* what = signal == SIGFPE ? "a division by zero" : "an access to memory that is nobody's";
    if (m.dynamic && address >= m.dynamic + m.dynamic_size && address < m.dynamic + m.dynamic_size + GUARD)
        what = "an access behind the end of dynamic shared memory";
    else if (signal != SIGFPE && (uintptr_t)address < 4096)
        what = "an access through a null pointer";
    fail(m.current, 0, "%s", what);
}

// In a launch, a fault is the kernel's.
struct Faults {
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE};
    struct sigaction before[3];
    Faults() {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_NODEFER;  // the handler does not return
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &action, &before[i]);
    }
    ~Faults() {
        for (int i = 0; i < 3; i++) sigaction(SIGNALS[i], &before[i], nullptr);
    }
};

// What -fsanitize=bounds,alignment hands over (GCC's libubsan, of which nothing else is needed).
struct Place { const char* file; unsigned line, column; };
struct Type { uint16_t kind, info; char name[1]; };
struct Bounds { Place place; const Type *array, *index; };
struct Alignment { Place place; const Type* type; unsigned char log_alignment, kind; };

inline int line_of(const Place& place) { return strcmp(place.file, "kernels.cu") ? 0 : place.line; }

extern "C" __attribute__((visibility("hidden"), used)) inline
void __ubsan_handle_out_of_bounds(Bounds* found, uintptr_t index) {
    fail(machine.current, line_of(found->place), "index %lld of an array %s", (long long)index, found->array->name);
}

extern "C" __attribute__((visibility("hidden"), used)) inline
void __ubsan_handle_type_mismatch_v1(Alignment* found, uintptr_t address) {
    fail(machine.current, line_of(found->place), "a %s at an address that is %u modulo %u", found->type->name,
         unsigned(address % (1u << found->log_alignment)), 1u << found->log_alignment);
}

// -- launching --

struct Launch {  // as cuda_on_cpu.py packs it
    long long grid[3], block[3], shared, order;
    Slot arguments[];
};

struct ArrayInterface {  // what a NumPy array's __array_struct__ holds
    int two, dimensions;
    char kind;
    int itemsize, flags;
    intptr_t *shape, *strides;
    void* data;
};
extern "C" void* PyCapsule_GetPointer(void* capsule, const char* name);

// A message if the launch is none that CUDA would take.
inline const char* refused(const Launch& launch, unsigned max_threads) {
    const long long most[] = {0x7fffffff, 65535, 65535, 1024, 1024, 64};
    for (int i = 0; i < 6; i++) {
        long long size = i < 3 ? launch.grid[i] : launch.block[i - 3];
        const char* what = i < 3 ? "grid" : "block";
        if (size >= 1 && size <= most[i]) continue;
        snprintf(machine.message, sizeof machine.message, "0:bad %s: %lld along %c, expected 1 to %lld", what, size,
                 "xyz"[i % 3], most[i]);
        return machine.message;
    }
    long long threads = launch.block[0] * launch.block[1] * launch.block[2];
    if (threads > max_threads) {
        snprintf(machine.message, sizeof machine.message, "0:bad block: %lld threads, at most %u can be", threads,
                 max_threads);
        return machine.message;
    }
    if (launch.shared >= 0 && launch.shared <= (long long)MAX_SHARED) return nullptr;
    snprintf(machine.message, sizeof machine.message, "0:bad shared_mem: %lld bytes, at most %zu can be", launch.shared,
             MAX_SHARED);
    return machine.message;
}

inline char* reserve(size_t size) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, flags, -1, 0);
    return memory == MAP_FAILED ? nullptr : (char*)memory;
}

CUDA_ON_CPU_STATE char* dynamic_end;

// Runs the kernel. pointers: whether each argument is one. The message of what went wrong, if anything did.
inline const char* run(const Launch& launch, void (*kernel)(const Slot*), unsigned max_threads, unsigned count,
                       const bool* pointers) {
    Machine& m = machine;
    if (const char* message = refused(launch, max_threads)) return message;
    if (!m.memory) {
        m.memory = reserve(MAX_THREADS * (COPIES + STACK));
        char* dynamic = reserve(MAX_SHARED + 2 * GUARD);
        if (!m.memory || !dynamic) return "0:no memory for the threads' stacks";
        dynamic_end = dynamic + (MAX_SHARED + GUARD) / GUARD * GUARD;
        mprotect(dynamic_end, GUARD, PROT_NONE);
#ifdef __SANITIZE_THREAD__
        notes = (Note*)reserve(NOTES * sizeof(Note));
#endif
    }
    if (m.failed) {  // what the threads of that launch left behind
        m.failed = false;
        m.made = 0;
        m.free = nullptr;
        memset(m.fiber, 0, sizeof m.fiber);
    }
    Slot arguments[MAX_PARAMETERS];
    for (unsigned i = 0; i < count; i++) {
        arguments[i] = launch.arguments[i];
        if (pointers[i] && arguments[i])
            arguments[i] = (Slot)((ArrayInterface*)PyCapsule_GetPointer((void*)arguments[i], nullptr))->data;
    }
    m.kernel = kernel;
    m.arguments = arguments;
    m.order = launch.order;
    m.random = m.order * 2654435761u;
    m.dynamic_size = (launch.shared + 15) / 16 * 16;
    m.dynamic = dynamic_end - m.dynamic_size;
    gridDim = dim3(launch.grid[0], launch.grid[1], launch.grid[2]);
    const dim3 block(launch.block[0], launch.block[1], launch.block[2]);
    if (block.x != blockDim.x || block.y != blockDim.y || block.z != blockDim.z) {
        blockDim = block;
        unsigned thread = 0;
        for (unsigned z = 0; z < block.z; z++)
            for (unsigned y = 0; y < block.y; y++)
                for (unsigned x = 0; x < block.x; x++) m.index[thread++] = {x, y, z};
    }
    Faults faults;
    const unsigned long long blocks = 1ull * gridDim.x * gridDim.y * gridDim.z;
    const unsigned long long first = m.order > 1 ? m.random % blocks : 0;  // the order of blocks is no promise either
    for (unsigned long long i = 0; i < blocks && !m.failed; i++) {
        unsigned long long b = m.order & 1 ? blocks - 1 - i : i;
        b = b + first < blocks ? b + first : b + first - blocks;
        blockIdx = {unsigned(b % gridDim.x), unsigned(b / gridDim.x % gridDim.y), unsigned(b / gridDim.x / gridDim.y)};
        run_block();
    }
    return m.failed ? m.message : nullptr;
}

// Of a parameter: '.' a value, '*' a pointer, '&' a pointer to const; then what it is, or points to, in two letters.
template <class T> constexpr char kind() {
    return std::is_same_v<T, bool>        ? 'b'
           : std::is_floating_point_v<T>  ? 'f'
           : std::is_integral_v<T>        ? (std::is_signed_v<T> ? 'i' : 'u')
           : std::is_void_v<T>            ? 'v'
                                          : 'c';  // a class
}
template <class T> struct Parameter { static constexpr char text[] = {'.', kind<T>(), '0' + sizeof(T)}; };
template <class T> struct Parameter<T*> {
    static constexpr size_t size = sizeof(std::conditional_t<std::is_void_v<T>, char, T>);
    static constexpr char text[] = {std::is_const_v<T> ? '&' : '*', kind<std::remove_cv_t<T>>(), char('0' + size)};
};

template <auto function> struct Kernel;
template <class... P, void (*function)(P...)> struct Kernel<function> {
    static constexpr unsigned count = sizeof...(P);
    static_assert(count <= MAX_PARAMETERS && ((sizeof(P) <= sizeof(Slot)) && ...), "parameters of 8 bytes, at most 64");
    static constexpr bool pointers[] = {std::is_pointer_v<P>..., false};

    struct Signature { char text[3 * count + 1]; };
    static constexpr Signature signature = [] {
        Signature all = {};
        unsigned n = 0;
        ((all.text[n++] = Parameter<P>::text[0], all.text[n++] = Parameter<P>::text[1],
          all.text[n++] = Parameter<P>::text[2]), ...);
        return all;
    }();

    template <size_t... I> CUDA_ON_CPU_UNTRACED static void call(const Slot* slots, std::index_sequence<I...>) {
        function(*(const std::remove_cv_t<P>*)&slots[I]...);
    }
    static void body(const Slot* slots) { call(slots, std::index_sequence_for<P...>()); }
};

constexpr unsigned launch_bounds(unsigned max_threads, unsigned = 0, unsigned = 0) { return max_threads; }

// -- what the warp does together --

inline void nothing(Warp&, unsigned) {}

template <class T> struct Shuffle {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 4 or 8 bytes");
    T value, result;
    unsigned source;
    int line;

    CUDA_ON_CPU_UNTRACED static void work(Warp& warp, unsigned lanes) {
        for (unsigned left = lanes; left; left &= left - 1) {
            unsigned lane = __builtin_ctz(left);
            Shuffle& s = *(Shuffle*)warp.operand[lane];
            if (!(lanes >> s.source & 1))
                fail((&warp - machine.warp) * LANES + lane, s.line,
                     "shuffle: lane %u reads lane %u, which is %s", lane, s.source,
                     warp.lanes >> s.source & 1 ? "not in the mask" : "beyond the block");
            s.result = ((Shuffle*)warp.operand[s.source])->value;
        }
    }
};

// From a lane of the own part of the warp, `width` lanes wide; a source beyond it is the lane itself.
template <class T> T shuffle(unsigned mask, T value, int source, bool within, int line) {
    Shuffle<T> s = {value, value, within ? unsigned(source) : current_lane(), line};
    meet(mask, line, Shuffle<T>::work, &s);
    return s.result;
}

struct Vote {
    bool predicate;
    unsigned result;

    static void work(Warp& warp, unsigned lanes) {
        unsigned ballot = 0;
        for (unsigned left = lanes; left; left &= left - 1) {
            unsigned lane = __builtin_ctz(left);
            ballot |= unsigned(((Vote*)warp.operand[lane])->predicate) << lane;
        }
        for (unsigned left = lanes; left; left &= left - 1) {
            Vote& vote = *(Vote*)warp.operand[__builtin_ctz(left)];
            vote.result = ballot;
        }
    }
};

inline unsigned vote(unsigned mask, bool predicate, int line) {
    Vote v = {predicate, 0};
    meet(mask, line, Vote::work, &v);
    return v.result;
}

inline void need_whole_warp(const char* what, int line) {
    unsigned lanes = current_warp().lanes;
    if (lanes != ALL_LANES) fail(machine.current, line, "%s in a warp of %d lanes", what, __builtin_popcount(lanes));
}

// The tensor core's m16n8k16 product. A lane's numbers: a, rows g and g + 8, columns 2t, 2t + 1 and 8 further; b,
// rows 2t, 2t + 1 and 8 further, column g; d, rows g and g + 8, columns 2t and 2t + 1; g = lane / 4, t = lane % 4.
struct Mma {
    float* d;
    const unsigned *a, *b;

    // Without checks: nearly all the time of a kernel with tensor cores goes by here.
    __attribute__((no_sanitize("bounds", "alignment", "thread"))) static void work(Warp& warp, unsigned) {
        cuda_on_cpu_trace.products++;
        unsigned bits_a[16 * 16], bits_b[16 * 8];
        float a[16 * 16], b[16 * 8], d[16 * 8];
        for (unsigned lane = 0; lane < LANES; lane++) {
            const Mma& mma = *(Mma*)warp.operand[lane];
            unsigned g = lane / 4, t = lane % 4 * 2;
            for (unsigned i = 0; i < 4; i++) {
                unsigned at = (g + i % 2 * 8) * 16 + t + i / 2 * 8;
                bits_a[at] = mma.a[i] << 16;  // a float's upper half is a bfloat16
                bits_a[at + 1] = mma.a[i] & 0xffff0000u;
            }
            for (unsigned i = 0; i < 2; i++) {
                unsigned at = (t + i * 8) * 8 + g;
                bits_b[at] = mma.b[i] << 16;
                bits_b[at + 8] = mma.b[i] & 0xffff0000u;
            }
            for (unsigned i = 0; i < 4; i++) d[(g + i / 2 * 8) * 8 + t + i % 2] = mma.d[i];
        }
        memcpy(a, bits_a, sizeof a);
        memcpy(b, bits_b, sizeof b);
        for (unsigned row = 0; row < 16; row++)
            for (unsigned k = 0; k < 16; k++)
                for (unsigned i = 0; i < 8; i++) d[row * 8 + i] += a[row * 16 + k] * b[k * 8 + i];
        for (unsigned lane = 0; lane < LANES; lane++) {
            const Mma& mma = *(Mma*)warp.operand[lane];
            for (unsigned i = 0; i < 4; i++) mma.d[i] = d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
        }
    }
};

inline bool in_shared(const void* address, size_t size) {
    const char *p = (const char*)address, *dynamic = machine.dynamic;
    return (p >= __bss_start && p + size <= _end) || (p >= dynamic && p + size <= dynamic + machine.dynamic_size);
}

inline void check_row(const char* what, const void* shared, int line) {
    if (!in_shared(shared, 16)) fail(machine.current, line, "%s: the address is not that of shared memory", what);
    if ((uintptr_t)shared % 16)
        fail(machine.current, line, "%s: the address is %u modulo 16", what, unsigned((uintptr_t)shared % 16));
}

// Four 8x8 matrices of 16-bit elements; the lanes 8i to 8i + 7 bring the addresses of the rows of matrix i.
template <bool transposed> struct LoadMatrix {
    unsigned* r;
    const void* row;

    static void work(Warp& warp, unsigned) {
        unsigned first = (&warp - machine.warp) * LANES;
        for (unsigned lane = 0; lane < LANES; lane++) {
            unsigned issued = machine.fiber[first + lane]->issued, other = machine.fiber[first]->issued;
            if (issued != other)
                fail(first + lane, warp.line[lane], "ldmatrix without a __syncwarp() after lane %u has issued %u cp.async "
                     "and lane 0 %u", lane, issued, other);
        }
        for (unsigned lane = 0; lane < LANES; lane++)
            for (unsigned i = 0; i < 4; i++) {
                uint16_t pair[2];
                for (unsigned half = 0; half < 2; half++) {
                    unsigned row = lane / 4, column = lane % 4 * 2 + half;
                    if (transposed) std::swap(row, column);
                    const uint16_t* elements = (const uint16_t*)((LoadMatrix*)warp.operand[8 * i + row])->row;
                    pair[half] = elements[column];
                }
                ((LoadMatrix*)warp.operand[lane])->r[i] = pair[0] | unsigned(pair[1]) << 16;
            }
    }
};

template <bool transposed> void load_matrix(unsigned (&r)[4], const void* row, int line) {
    need_whole_warp("ldmatrix", line);
    check_row("ldmatrix", row, line);
    LoadMatrix<transposed> load = {r, row};
    meet(ALL_LANES, line, LoadMatrix<transposed>::work, &load);
}

// Carries out the copies of all groups but the `pending` latest ones.
inline void wait_for_copies(unsigned pending) {
    Fiber& fiber = *machine.fiber[machine.current];
    unsigned done = 0;
    while (done < fiber.copying && fiber.copies[done].group + pending < fiber.group) {
        memcpy(fiber.copies[done].to, fiber.copies[done].from, 16);
        done++;
    }
    fiber.copying -= done;
    memmove(fiber.copies, fiber.copies + done, fiber.copying * sizeof(Copy));
}

}  // namespace cuda_on_cpu

// Appended to the kernel file once for each kernel; bounds: the arguments of __launch_bounds__, in parentheses.
#define CUDA_ON_CPU_EXPORT(name, bounds)                                                                              \
    extern "C" __attribute__((visibility("default"))) const char* signature_##name() {                                \
        return cuda_on_cpu::Kernel<name>::signature.text;                                                             \
    }                                                                                                                 \
    extern "C" __attribute__((visibility("default"))) const char* launch_##name(const cuda_on_cpu::Launch* launch) {  \
        using Kernel = cuda_on_cpu::Kernel<name>;                                                                     \
        return cuda_on_cpu::run(*launch, Kernel::body, cuda_on_cpu::launch_bounds bounds, Kernel::count,              \
                                Kernel::pointers);                                                                    \
    }

// -- CUDA's functions: barriers, shuffles, votes. The default argument `line` is that of the call. --

inline void __syncthreads(int line = __builtin_LINE()) {
    cuda_on_cpu::Machine& m = cuda_on_cpu::machine;
    if (m.live < blockDim.x * blockDim.y * blockDim.z)
        cuda_on_cpu::fail(m.current, line, "divergent barrier: some threads of the block have ended");
    if (m.arrived && m.barrier_line != line)
        cuda_on_cpu::fail(m.current, line, "divergent barrier: %u threads are in the __syncthreads() of line %d",
                          m.arrived, m.barrier_line);
    m.barrier_line = line;
    m.fiber[m.current]->issued = 0;
    cuda_on_cpu::current_warp().at_barrier |= 1u << cuda_on_cpu::current_lane();
    if (++m.arrived == m.live) cuda_on_cpu::release_barrier();
    cuda_on_cpu::pause();
}

inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
    cuda_on_cpu::machine.fiber[cuda_on_cpu::machine.current]->issued = 0;
    cuda_on_cpu::meet(mask, line, cuda_on_cpu::nothing, nullptr);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

[[noreturn]] inline void __trap(int line = __builtin_LINE()) {
    cuda_on_cpu::fail(cuda_on_cpu::machine.current, line, "__trap()");
}

template <class T> T __shfl_sync(unsigned mask, T x, int source, int width = 32, int line = __builtin_LINE()) {
    int first = cuda_on_cpu::current_lane() & ~(width - 1);
    return cuda_on_cpu::shuffle(mask, x, first | (source & (width - 1)), true, line);
}

template <class T> T __shfl_xor_sync(unsigned mask, T x, int lanes, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current_lane(), source = lane ^ lanes;
    return cuda_on_cpu::shuffle(mask, x, source, source <= (lane | (width - 1)), line);
}

template <class T> T __shfl_up_sync(unsigned mask, T x, unsigned n, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current_lane(), source = lane - int(n);
    return cuda_on_cpu::shuffle(mask, x, source, source >= (lane & ~(width - 1)), line);
}

template <class T> T __shfl_down_sync(unsigned mask, T x, unsigned n, int width = 32, int line = __builtin_LINE()) {
    int lane = cuda_on_cpu::current_lane(), source = lane + int(n);
    return cuda_on_cpu::shuffle(mask, x, source, source <= (lane | (width - 1)), line);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::vote(mask, predicate, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::vote(mask, predicate, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
    return cuda_on_cpu::vote(mask, !predicate, line) == 0;
}

// -- tensor cores and asynchronous copies: under nvcc the kernel files define these with inline PTX --

// d += a b, of 16x16 and 16x8 bfloat16 numbers: mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], int line = __builtin_LINE()) {
    cuda_on_cpu::need_whole_warp("mma", line);
    cuda_on_cpu::Mma mma = {d, a, b};
    cuda_on_cpu::meet(cuda_on_cpu::ALL_LANES, line, cuda_on_cpu::Mma::work, &mma);
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16, without and with .trans.
inline void ldmatrix_x4(unsigned (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    cuda_on_cpu::load_matrix<false>(r, shared_row, line);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], const void* shared_row, int line = __builtin_LINE()) {
    cuda_on_cpu::load_matrix<true>(r, shared_row, line);
}

// cp.async.cg.shared.global, 16 bytes. They are NaN from here until the wait that covers the copy.
inline void cp_async16(void* shared, const void* global, int line = __builtin_LINE()) {
    using namespace cuda_on_cpu;
    check_row("cp.async", shared, line);
    if ((uintptr_t)global % 16)
        fail(machine.current, line, "cp.async: the source is %u modulo 16", unsigned((uintptr_t)global % 16));
    Fiber& fiber = *machine.fiber[machine.current];
    if (fiber.copying == MAX_COPIES) fail(machine.current, line, "cp.async: more than %zu under way", MAX_COPIES);
    memset(shared, 0xff, 16);
    fiber.issued++;
    fiber.copies[fiber.copying++] = {(char*)shared, (const char*)global, fiber.group};
}
inline void cp_async_commit() { cuda_on_cpu::machine.fiber[cuda_on_cpu::machine.current]->group++; }
template <int N> void cp_async_wait() { cuda_on_cpu::wait_for_copies(N); }

// -- atomics: a thread is never interrupted between two of its accesses --

#define CUDA_ON_CPU_ATOMIC(T, name, value)    \
    inline T atomic##name(T* address, T x) {  \
        T old = *address;                     \
        *address = value;                     \
        return old;                           \
    }
#define CUDA_ON_CPU_ATOMICS(T)                          \
    CUDA_ON_CPU_ATOMIC(T, Exch, x)                      \
    CUDA_ON_CPU_ATOMIC(T, Min, x < old ? x : old)       \
    CUDA_ON_CPU_ATOMIC(T, Max, x > old ? x : old)       \
    CUDA_ON_CPU_ATOMIC(T, And, old & x)                 \
    CUDA_ON_CPU_ATOMIC(T, Or, old | x)                  \
    CUDA_ON_CPU_ATOMIC(T, Xor, old ^ x)                 \
    inline T atomicCAS(T* address, T expected, T x) {   \
        T old = *address;                               \
        if (old == expected) *address = x;              \
        return old;                                     \
    }
CUDA_ON_CPU_ATOMICS(int)
CUDA_ON_CPU_ATOMICS(unsigned)
CUDA_ON_CPU_ATOMICS(unsigned long long)
CUDA_ON_CPU_ATOMIC(int, Add, old + x)
CUDA_ON_CPU_ATOMIC(unsigned, Add, old + x)
CUDA_ON_CPU_ATOMIC(unsigned long long, Add, old + x)
CUDA_ON_CPU_ATOMIC(float, Add, old + x)
CUDA_ON_CPU_ATOMIC(double, Add, old + x)
CUDA_ON_CPU_ATOMIC(float, Exch, x)

// -- mathematics. No <math.h>: it has some of these names, for double alone. --

#define CUDA_ON_CPU_MATHS(name)                                                          \
    inline double name(double x) { return __builtin_##name(x); }                         \
    inline float name(float x) { return __builtin_##name##f(x); }                        \
    inline float name##f(float x) { return __builtin_##name##f(x); }
CUDA_ON_CPU_MATHS(exp) CUDA_ON_CPU_MATHS(exp2) CUDA_ON_CPU_MATHS(expm1)
CUDA_ON_CPU_MATHS(log) CUDA_ON_CPU_MATHS(log2) CUDA_ON_CPU_MATHS(log10) CUDA_ON_CPU_MATHS(log1p)
CUDA_ON_CPU_MATHS(sqrt) CUDA_ON_CPU_MATHS(cbrt) CUDA_ON_CPU_MATHS(fabs)
CUDA_ON_CPU_MATHS(sin) CUDA_ON_CPU_MATHS(cos) CUDA_ON_CPU_MATHS(tan)
CUDA_ON_CPU_MATHS(sinh) CUDA_ON_CPU_MATHS(cosh) CUDA_ON_CPU_MATHS(tanh)
CUDA_ON_CPU_MATHS(erf) CUDA_ON_CPU_MATHS(erfc)
CUDA_ON_CPU_MATHS(floor) CUDA_ON_CPU_MATHS(ceil) CUDA_ON_CPU_MATHS(trunc)
CUDA_ON_CPU_MATHS(round) CUDA_ON_CPU_MATHS(rint)

#define CUDA_ON_CPU_MATHS2(name)                                                         \
    inline double name(double x, double y) { return __builtin_##name(x, y); }            \
    inline float name(float x, float y) { return __builtin_##name##f(x, y); }            \
    inline float name##f(float x, float y) { return __builtin_##name##f(x, y); }
CUDA_ON_CPU_MATHS2(pow) CUDA_ON_CPU_MATHS2(fmod) CUDA_ON_CPU_MATHS2(atan2) CUDA_ON_CPU_MATHS2(hypot)
CUDA_ON_CPU_MATHS2(copysign)
CUDA_ON_CPU_MATHS2(fmin) CUDA_ON_CPU_MATHS2(fmax)
inline double pow(double x, int n) { return __builtin_pow(x, n); }

inline double fma(double x, double y, double z) { return __builtin_fma(x, y, z); }
inline float fma(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float fmaf(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline double rsqrt(double x) { return 1 / __builtin_sqrt(x); }
inline float rsqrt(float x) { return 1 / __builtin_sqrtf(x); }
inline float rsqrtf(float x) { return 1 / __builtin_sqrtf(x); }
inline void sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x), *c = __builtin_cosf(x); }
inline void sincos(double x, double* s, double* c) { *s = __builtin_sin(x), *c = __builtin_cos(x); }
inline float ldexpf(float x, int n) { return __builtin_ldexpf(x, n); }
inline double ldexp(double x, int n) { return __builtin_ldexp(x, n); }

inline int abs(int x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return __builtin_fabsf(x); }
inline double abs(double x) { return __builtin_fabs(x); }
template <class T> bool isnan(T x) { return __builtin_isnan(x); }
template <class T> bool isinf(T x) { return __builtin_isinf(x); }
template <class T> bool isfinite(T x) { return __builtin_isfinite(x); }

// CUDA's overloads and no others: min(1, 1LL) does not compile there either. Of a number and NaN, the number.
#define CUDA_ON_CPU_MIN_MAX(R, A, B)                          \
    inline R min(A x, B y) {                                  \
        R a = x, b = y;                                       \
        return b < a ? b : a;                                 \
    }                                                         \
    inline R max(A x, B y) {                                  \
        R a = x, b = y;                                       \
        return a < b ? b : a;                                 \
    }
#define CUDA_ON_CPU_INTEGER_MIN_MAX(S, U)                                              \
    CUDA_ON_CPU_MIN_MAX(S, S, S) CUDA_ON_CPU_MIN_MAX(U, U, U)                          \
    CUDA_ON_CPU_MIN_MAX(U, S, U) CUDA_ON_CPU_MIN_MAX(U, U, S)
CUDA_ON_CPU_INTEGER_MIN_MAX(int, unsigned)
CUDA_ON_CPU_INTEGER_MIN_MAX(long, unsigned long)
CUDA_ON_CPU_INTEGER_MIN_MAX(long long, unsigned long long)
inline float min(float x, float y) { return __builtin_fminf(x, y); }
inline float max(float x, float y) { return __builtin_fmaxf(x, y); }
inline double min(double x, double y) { return __builtin_fmin(x, y); }
inline double max(double x, double y) { return __builtin_fmax(x, y); }
inline double min(float x, double y) { return __builtin_fmin(x, y); }
inline double max(float x, double y) { return __builtin_fmax(x, y); }
inline double min(double x, float y) { return __builtin_fmin(x, y); }
inline double max(double x, float y) { return __builtin_fmax(x, y); }

// The quick ones, which are less exact on a GPU.
inline float __expf(float x) { return __builtin_expf(x); }
inline float __exp10f(float x) { return __builtin_powf(10, x); }
inline float __logf(float x) { return __builtin_logf(x); }
inline float __log2f(float x) { return __builtin_log2f(x); }
inline float __sinf(float x) { return __builtin_sinf(x); }
inline float __cosf(float x) { return __builtin_cosf(x); }
inline float __powf(float x, float y) { return __builtin_powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// As rounded, and never joined to a fused multiply-add.
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return __builtin_fmaf(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return __builtin_sqrtf(x); }
inline float __frsqrt_rn(float x) { return float(1 / __builtin_sqrt(x)); }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }

// -- conversions, bits, whole numbers --

namespace cuda_on_cpu {
template <class To, class From> To bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
template <class To> To saturate(double x) {  // as the GPU converts: to the nearest number there is, and NaN to 0
    constexpr bool is_signed = To(-1) < 0;
    constexpr To most = is_signed ? To(~0ull >> (65 - 8 * sizeof(To))) : To(-1), least = is_signed ? -most - 1 : 0;
    if (x != x) return 0;
    return x <= double(least) ? least : x >= double(most) ? most : To(x);
}
}  // namespace cuda_on_cpu

inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits<double>(x); }

#define CUDA_ON_CPU_CONVERSIONS(from, to, From, To)                                               \
    inline To __##from##2##to##_rn(From x) { return cuda_on_cpu::saturate<To>(__builtin_rint(x)); }   \
    inline To __##from##2##to##_rz(From x) { return cuda_on_cpu::saturate<To>(__builtin_trunc(x)); }  \
    inline To __##from##2##to##_rd(From x) { return cuda_on_cpu::saturate<To>(__builtin_floor(x)); }  \
    inline To __##from##2##to##_ru(From x) { return cuda_on_cpu::saturate<To>(__builtin_ceil(x)); }
CUDA_ON_CPU_CONVERSIONS(float, int, float, int)
CUDA_ON_CPU_CONVERSIONS(float, uint, float, unsigned)
CUDA_ON_CPU_CONVERSIONS(float, ll, float, long long)
CUDA_ON_CPU_CONVERSIONS(float, ull, float, unsigned long long)
CUDA_ON_CPU_CONVERSIONS(double, int, double, int)
CUDA_ON_CPU_CONVERSIONS(double, uint, double, unsigned)
CUDA_ON_CPU_CONVERSIONS(double, ll, double, long long)
CUDA_ON_CPU_CONVERSIONS(double, ull, double, unsigned long long)
inline float __int2float_rn(int x) { return x; }
inline float __uint2float_rn(unsigned x) { return x; }
inline float __ll2float_rn(long long x) { return x; }
inline float __ull2float_rn(unsigned long long x) { return x; }
inline double __int2double_rn(int x) { return x; }
inline double __ll2double_rn(long long x) { return x; }
inline float __double2float_rn(double x) { return float(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int x, int y) { return (long long)x * y >> 32; }
inline unsigned __umulhi(unsigned x, unsigned y) { return (unsigned long long)x * y >> 32; }
inline long long __mul64hi(long long x, long long y) { return (__int128)x * y >> 64; }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
    return (unsigned __int128)x * y >> 64;
}

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { return *p; }
template <class T> void __stcs(T* p, T x) { *p = x; }
template <class T> void __stcg(T* p, T x) { *p = x; }
