// Enough of CUDA to build a .cu file for the host: each thread of a block is a fiber that yields where threads meet.
//
// Barriers, shuffles and ballots abort if a thread of the block (or warp) ends without reaching them. What goes on in the background is
// done as late as it may be, and what is copied reads as NaN until then. A warp runs as far ahead of the next one as it can, blocks run
// one after the other. Under AddressSanitizer, shared memory beyond what the launch asked for is poisoned. It cannot see races (a thread
// runs until it meets others), bank conflicts, misaligned vector loads, bounds of a launch or contraction to fused multiply-adds.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <map>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

struct Index {
    int x, y;
};
static Index blockIdx, blockDim, gridDim, threadIdx;
alignas(1024) char shared_memory[232448];

static void require(bool good, const char* what) {
    if (good) return;
    fprintf(stderr, "%s\n", what);
    abort();
}

namespace host {
struct Meeting {  // of the threads of a block or of a warp
    int arrived = 0, expected = 0;
    long round = 0;
};
// What goes on in the background, done as late as it may be: when it is waited for, by groups, or at the end.
struct Background {
    std::vector<std::function<void()>> group;
    std::deque<std::vector<std::function<void()>>> groups;
    void end_of_group() { groups.push_back(std::move(group)), group.clear(); }
    void wait(size_t later) {
        for (; groups.size() > later; groups.pop_front())
            for (const auto& task : groups.front()) task();
    }
};
// A barrier in shared memory, by its address there: calls and bytes that its phase still waits for, and calls that the next one will.
struct PhaseBarrier {
    int calls, all_calls, phase = 0;
    long bytes = 0;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done = false;
    Background copies, products;
};
static std::vector<Fiber> fibers;
static std::vector<Meeting> warps;
static std::vector<unsigned> slots[2];  // what each thread shows to its warp, for even and odd rounds
static Meeting block;
static std::map<const void*, PhaseBarrier> phase_barriers;
static std::vector<std::function<void()>> block_copies;  // of the block, under way: done, the last one first, when all threads wait
static long events;                                      // threads that came to a meeting or a barrier, or went on from there
static ucontext_t scheduler;
static void (*body)(void*);
static void* arguments;

template <class Condition>
static void wait_until(const Condition& condition) {
    const int me = threadIdx.x;
    ++events;
    while (!condition()) swapcontext(&fibers[me].context, &scheduler);
    ++events;
    threadIdx.x = me;
}

static void meet(Meeting& meeting) {
    const long round = meeting.round;
    if (++meeting.arrived == meeting.expected) {
        meeting.arrived = 0;
        ++meeting.round;
    }
    wait_until([&] { return meeting.round != round; });
}

// Every lane shows `mine`; afterwards slots[result] holds all of them until the warp's next but one exchange.
static int exchange(unsigned mine) {
    Meeting& warp = warps[threadIdx.x / 32];
    const int parity = warp.round % 2;
    slots[parity][threadIdx.x] = mine;
    meet(warp);
    return parity;
}

static void start() {
    const int me = threadIdx.x;
    body(arguments);
    fibers[me].done = true;
    swapcontext(&fibers[me].context, &scheduler);
}

static void run_block(int threads) {
    fibers.assign(threads, Fiber());
    warps.assign((threads + 31) / 32, Meeting());
    for (int t = 0; t < threads; ++t) ++warps[t / 32].expected;
    block = Meeting();
    block.expected = threads;
    phase_barriers.clear();
    for (auto& slot : slots) slot.assign(threads, 0);
    for (auto& fiber : fibers) {
        fiber.stack.resize(65536);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        makecontext(&fiber.context, start, 0);
    }
    for (int live = threads; live;) {
        const long before = events;
        for (int first = 0; first < threads; first += 32)
            for (long last = -1; last != events;) {  // a warp goes on for as long as it can, so that it is far ahead of the next one
                last = events;
                for (int t = first; t < threads && t < first + 32; ++t) {
                    if (fibers[t].done) continue;
                    threadIdx.x = t;
                    swapcontext(&scheduler, &fibers[t].context);
                    live -= fibers[t].done, events += fibers[t].done;
                }
            }
        if (events != before) continue;
        require(!block_copies.empty(), "deadlock: some threads wait where others never come");
        const auto copy = block_copies.back();
        block_copies.pop_back();
        copy();
    }
    require(block_copies.empty(), "a block ended before its copies");
}

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** values, std::index_sequence<I...>) {
    kernel(*(A*)values[I]...);
}

template <class... A>
static void launch(void (*kernel)(A...), int blocks_x, int blocks_y, int threads, int shared, void** values) {
    static void (*target)(A...);
    target = kernel;
    arguments = values;
    body = [](void* all) { call(target, (void**)all, std::index_sequence_for<A...>()); };
    memset(shared_memory, 0xff, sizeof shared_memory);  // NaN: nothing may rely on zeros
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(shared_memory + shared, sizeof shared_memory - shared);
#endif
    blockDim.x = threads;
    gridDim = {blocks_x, blocks_y};
    for (blockIdx.y = 0; blockIdx.y < blocks_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < blocks_x; ++blockIdx.x) run_block(threads);
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, sizeof shared_memory);
#endif
}
}  // namespace host

static void __syncthreads() { host::meet(host::block); }
static unsigned as_bits(float x) {
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}
static float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
static int __float_as_int(float x) { return (int)as_bits(x); }
static int __popc(unsigned x) { return __builtin_popcount(x); }
static unsigned __ballot_sync(unsigned, bool vote) {
    const int parity = host::exchange(vote), first = threadIdx.x / 32 * 32;
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= host::slots[parity][first + lane] << lane;
    return votes;
}
static float __shfl_sync(unsigned, float mine, int lane) {
    const int parity = host::exchange(as_bits(mine)), first = threadIdx.x / 32 * 32;
    return __int_as_float((int)host::slots[parity][first + (lane & 31)]);
}
static unsigned __shfl_sync(unsigned, unsigned mine, int lane) {
    const int parity = host::exchange(mine), first = threadIdx.x / 32 * 32;
    return host::slots[parity][first + (lane & 31)];
}
static void __syncwarp() { host::exchange(0); }
static unsigned __reduce_max_sync(unsigned, unsigned mine) {
    const int parity = host::exchange(mine), first = threadIdx.x / 32 * 32;
    for (int lane = 0; lane < 32; ++lane)
        if (host::slots[parity][first + lane] > mine) mine = host::slots[parity][first + lane];
    return mine;
}
static float __shfl_down_sync(unsigned, float mine, int by) {
    const int lane = threadIdx.x % 32;
    return __shfl_sync(0, mine, lane + by < 32 ? lane + by : lane);
}

// --- what kernels with matrix instructions need besides --------------------------------------------------------------

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
static uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
static unsigned __float_as_uint(float x) { return as_bits(x); }
static float __uint_as_float(unsigned bits) { return __int_as_float((int)bits); }
static int min(int a, int b) { return a < b ? a : b; }
static unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
static unsigned upper_half(unsigned x) { return x >> 16; }
static unsigned permute(unsigned low, unsigned high, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)high << 32 | low;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
static unsigned short to_half(float x) {
    const _Float16 half = (_Float16)x;
    unsigned short bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static float from_half(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return (float)half;
}

// A warp's fragments of A and B, to all its lanes: all [register, lane].
static void show_fragments(const unsigned (&a)[4], unsigned b0, unsigned b1, unsigned (&all)[6][32]) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    for (int i = 0; i < 6; ++i) {
        const int parity = host::exchange(mine[i]);
        memcpy(all[i], &host::slots[parity][threadIdx.x / 32 * 32], sizeof all[i]);
    }
}

// mma.m16n8k16 by the fragments' definition in the PTX manual: C [16, 8] += A [16, 16] B [16, 8].
// Built with -DNO_TENSOR_CORES: a GPU without them.
template <bool BF16>
static bool multiply_on_tensor_cores(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef NO_TENSOR_CORES
    return false;
#endif
    unsigned all[6][32];
    const int lane = threadIdx.x % 32;
    show_fragments(a, b0, b1, all);
    const auto value = [](unsigned pair, int k) {
        const unsigned short bits = pair >> 16 * (k % 2);
        return BF16 ? __uint_as_float((unsigned)bits << 16) : from_half(bits);
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k)
            c[i] += value(all[k / 8 * 2 + row / 8][row % 8 * 4 + k % 8 / 2], k) * value(all[4 + k / 8][column * 4 + k % 8 / 2], k);
    }
    return true;
}

// mma.m16n8k256 of single bits, likewise: C [16, 8] += the ones that rows of A and columns of B have in common.
static void count_common_ones(int (&c)[4], const unsigned (&a)[4], uint2 b) {
    unsigned all[6][32];
    const int lane = threadIdx.x % 32;
    show_fragments(a, b.x, b.y, all);
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int word = 0; word < 8; ++word)  // 32 of the 256 columns
            c[i] += __popc(all[word / 4 * 2 + row / 8][row % 8 * 4 + word % 4] & all[4 + word / 4][column * 4 + word % 4]);
    }
}

// Copies and products in the background: what they read must be there when they are asked for, and still when they are waited for.
static host::Background& background(bool products) {
    host::Fiber& fiber = host::fibers[threadIdx.x];
    return products ? fiber.products : fiber.copies;
}

static void copy_16_bytes(void* to, const void* from) {
    background(false).group.push_back([=] { memcpy(to, from, 16); });
    memset(to, 0xff, 16);
}
static void copy_8_bytes(void* to, const void* from) {
    background(false).group.push_back([=] { memcpy(to, from, 8); });
    memset(to, 0xff, 8);
}
static void end_of_copies() { background(false).end_of_group(); }
template <int LATER>
static void wait_for_copies() {
    background(false).wait(LATER);
}

// wgmma.m64nNk16 by the PTX manual, a warp's 16 rows of it: the fragments of A and C, B's descriptor and its 128-byte swizzle.
static unsigned shared_address(const void* p) { return (unsigned)((const char*)p - shared_memory); }
template <bool BF16, int SIZE>
static std::vector<float> products_of(const unsigned (&a)[4], unsigned long long b) {
    unsigned all[6][32];
    const int lane = threadIdx.x % 32;
    show_fragments(a, 0, 0, all);
    const auto value = [](unsigned short bits) { return BF16 ? __uint_as_float((unsigned)bits << 16) : from_half(bits); };
    const unsigned start = (b & 0x3fff) << 4, eight_apart = (b >> 32 & 0x3fff) << 4;
    require(b >> 62 == 1 && (b >> 49 & 7) == 0, "a matrix that is not swizzled by 128 bytes");
    std::vector<float> c(SIZE);
    for (int i = 0; i < SIZE; ++i) {
        const int row = lane / 4 + i % 4 / 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            unsigned address = start + token / 8 * eight_apart + token % 8 * 128 + 2 * k;
            address ^= (address >> 7 & 7) << 4;
            unsigned short x;
            memcpy(&x, shared_memory + address, 2);
            c[i] += value(all[k / 8 * 2 + row / 8][row % 8 * 4 + k % 8 / 2] >> 16 * (k % 2)) * value(x);
        }
    }
    return c;
}

template <bool BF16, int SIZE>
static void multiply_in_background(float (&c)[SIZE], const unsigned (&a)[4], unsigned long long b) {
    const auto early = products_of<BF16, SIZE>(a, b);
    background(true).group.push_back([=, &c, &a] {
        const auto late = products_of<BF16, SIZE>(a, b);
        require(!memcmp(early.data(), late.data(), SIZE * sizeof(float)), "a product's factors changed before it was waited for");
        for (int i = 0; i < SIZE; ++i) c[i] += late[i];
    });
}
static void wait_for_turn() {}
static void let_next_begin() {}
static void take_turn() {}
static void begin_products() {}
static void end_of_products() { background(true).end_of_group(); }
template <int LATER>
static void wait_for_products() {
    background(true).wait(LATER);
}
static void keep(float&) {}
static void keep(unsigned&) {}

// Barriers with phases, and copies that complete them.
typedef unsigned long long Barrier;
static host::PhaseBarrier& found(Barrier* barrier) {
    require(host::phase_barriers.count(barrier), "a barrier that was not started");
    return host::phase_barriers[barrier];
}
static void count_on(Barrier* barrier, int calls, long bytes) {
    auto& b = found(barrier);
    b.calls -= calls, b.bytes -= bytes;
    require(b.calls >= 0, "more arrive at a barrier than it has room for");
    if (b.calls == 0 && b.bytes == 0) ++b.phase, b.calls = b.all_calls;
    ++host::events;
}
static void start_barrier(Barrier* barrier, int arrivals) {
    memset(barrier, 0, sizeof *barrier);  // its memory must be the block's
    host::phase_barriers[barrier] = {arrivals, arrivals};
}
static void arrive(Barrier* barrier) { count_on(barrier, 1, 0); }
static void expect_bytes(Barrier* barrier, int bytes) { count_on(barrier, 1, -bytes); }
static void wait_for_phase(Barrier* barrier, int phase) {
    const auto& b = found(barrier);
    require(b.phase == phase || b.phase == phase + 1, "a phase that its parity does not tell");
    host::wait_until([&] { return b.phase > phase; });
    require(b.phase == phase + 1, "a phase that was missed");
}
static void copy_in_background(void* to, const void* from, int bytes, Barrier* barrier) {
    require(bytes % 16 == 0 && (size_t)from % 16 == 0 && (size_t)to % 16 == 0, "a copy of other than 16-byte units");
    host::block_copies.push_back([=] { memcpy(to, from, bytes), count_on(barrier, 0, bytes); });
    memset(to, 0xff, bytes);
}
static void show_to_copies() {}
