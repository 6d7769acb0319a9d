// A GPU played by one CPU core, for the tests of clorae.cu: blocks run one after another, the
// threads of a block as fibers that take turns.  It is slow and knows nothing of memory models,
// but it is strict where a GPU is forgiving:
//   - shared memory is full of NaN when a block starts, and must not be written past its end;
//   - an asynchronous copy happens when it is waited for and not earlier: a missing wait reads NaN;
//   - a thread that leaves while others wait for it at a barrier stops the program;
//   - 16-byte copies and matrix loads must be aligned as the hardware demands;
//   - the order of the threads can be turned round: a race between barriers changes the result.
// Only what clorae.cu uses is here.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char* name = emulator::shared

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

namespace emulator {

constexpr size_t STACK = 64 * 1024, SHARED = 232448, GUARD = 256;  // bytes; SHARED as on an H200

struct Copy {
    void* to;
    const void* from;
    bool inside;
};

struct Fiber {
    jmp_buf at;  // where the thread goes on
    std::vector<char> stack = std::vector<char>(STACK);
    bool begun = false, done = false;
    int barriers = 0;
    std::vector<std::vector<Copy>> groups;  // oldest first; the last one is still open
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline int current, threads;
inline std::vector<int> arrived;  // threads that have come to each barrier of the block
inline int passed_by_leavers;     // the fewest barriers of a thread that has left
inline dim3 block, grid;
inline bool reversed;
inline unsigned char* shared;

inline void require(bool fact, const char* rule) {
    if (fact) return;
    std::fprintf(stderr, "emulator: block %u,%u thread %d: %s\n", block.x, block.y, current, rule);
    std::abort();
}

// The scheduler and the threads jump between their stacks: swapcontext would ask the system for the
// mask of signals at every turn.
inline void take_turns() {
    if (_setjmp(fibers[current].at) == 0) _longjmp(scheduler, 1);
}

// Goes on when all threads have come to the barrier that this thread has come to.
inline void barrier() {
    const size_t mine = fibers[current].barriers++;
    if (arrived.size() <= mine) arrived.push_back(0);
    ++arrived[mine];
    while (arrived[mine] < threads) {
        require(passed_by_leavers > static_cast<int>(mine),
                "waits at a barrier for a thread that has left");
        take_turns();
    }
}

inline void start() {
    while (true) {  // one block after another
        body();
        fibers[current].done = true;
        passed_by_leavers = std::min(passed_by_leavers, fibers[current].barriers);
        take_turns();
    }
}

// A stack of its own for a thread that begins for the first time.
inline void begin(Fiber& fiber) {
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack.data();
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, start, 0);
    setcontext(&context);
}

inline void go_on(Fiber& fiber) {
    if (_setjmp(scheduler) == 0) fiber.begun ? _longjmp(fiber.at, 1) : begin(fiber);
}

inline void run_block(int used) {
    static std::vector<uint64_t> memory((SHARED + 2 * GUARD) / 8);
    shared = reinterpret_cast<unsigned char*>(
        (reinterpret_cast<uintptr_t>(memory.data()) + 127) / 128 * 128);
    std::memset(shared, 0xff, used + GUARD / 2);  // NaN in every floating-point type
    arrived.clear();
    passed_by_leavers = INT_MAX;
    for (Fiber& fiber : fibers) {
        fiber.done = false;
        fiber.barriers = 0;
        fiber.groups.assign(1, {});
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (int i = 0; i < threads; ++i) {
            current = reversed ? threads - 1 - i : i;
            if (fibers[current].done) continue;
            go_on(fibers[current]);
            alive = true;
        }
    }
}

// The index that a thread finds in threadIdx: its place in the block.
struct ThreadIndex {
    struct {
        operator unsigned() const { return current; }
    } x;
};

struct BlockSize {
    struct {
        operator unsigned() const { return threads; }
    } x;
};

}  // namespace emulator

#define threadIdx emulator::ThreadIndex()
#define blockDim emulator::BlockSize()
#define blockIdx emulator::block

extern "C" inline __attribute__((used)) void emulator_reverse(int reversed) {
    emulator::reversed = reversed;
}

inline int shared_limit() { return emulator::SHARED; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void*,
                   Arguments... arguments) {
    if (threads > 1024 || shared > shared_limit() || grid.y > 65535) return "invalid configuration";
    emulator::threads = threads;
    emulator::grid = grid;
    emulator::body = [&] { kernel(static_cast<Parameters>(arguments)...); };
    if (emulator::fibers.size() != static_cast<size_t>(threads))
        emulator::fibers = std::vector<emulator::Fiber>(threads);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            emulator::block = dim3(x, y);
            emulator::run_block(shared);
            for (size_t i = 0; i < emulator::GUARD / 2; ++i)
                emulator::require(emulator::shared[shared + i] == 0xff,
                                  "the block wrote past the end of its shared memory");
        }
    return nullptr;
}

inline void __syncthreads() {
    emulator::barrier();
}

inline void copy_async(void* to, const void* from, bool inside) {
    const auto sum = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
    emulator::require(sum % 16 == 0, "a copy of 16 bytes is not aligned");
    emulator::fibers[emulator::current].groups.back().push_back({to, from, inside});
}

inline void __stcg(uint4* to, uint4 value) {
    emulator::require(reinterpret_cast<uintptr_t>(to) % 16 == 0, "a store is not aligned");
    *to = value;
}

inline void close_group() { emulator::fibers[emulator::current].groups.emplace_back(); }

template <int PENDING>
void wait_groups() {
    auto& groups = emulator::fibers[emulator::current].groups;
    while (static_cast<int>(groups.size()) > PENDING + 1) {
        for (const emulator::Copy& copy : groups.front())
            copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
        groups.erase(groups.begin());
    }
}

struct __nv_bfloat16 {
    uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

inline __nv_bfloat16 __float2bfloat16(float number) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    if (number != number) return {0x7fff};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Matrix fragments: a lane owns half a row of the 16 x 16 sum, and keeps of the factors what that
// half row needs.  (Which lane owns what is the hardware's secret; the kernels must not ask.)
namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major };

template <class Use, int, int, int, class E, class Order = void>
struct fragment {
    float value[std::is_same_v<Use, matrix_b> ? 128 : std::is_same_v<Use, matrix_a> ? 16 : 8];
};

inline int row() { return emulator::current % 32 / 2; }
inline int column() { return emulator::current % 2 * 8; }

inline void aligned(const void* matrix, int stride, int element) {
    emulator::require(reinterpret_cast<uintptr_t>(matrix) % 32 == 0 && stride * element % 16 == 0,
                      "a matrix in shared memory is not aligned");
}

template <class F>
void fill_fragment(F& to, float value) {
    for (float& v : to.value) v = value;
}

template <class E>
void load_matrix_sync(fragment<matrix_a, 16, 16, 16, E, row_major>& to, const E* from, int stride) {
    aligned(from, stride, sizeof(E));
    for (int k = 0; k < 16; ++k) to.value[k] = __bfloat162float(from[row() * stride + k]);
}

template <class E, class Order>
void load_matrix_sync(fragment<matrix_b, 16, 16, 16, E, Order>& to, const E* from, int stride) {
    aligned(from, stride, sizeof(E));
    const bool by_rows = std::is_same_v<Order, row_major>;
    for (int k = 0; k < 16; ++k)
        for (int j = 0, c = column(); j < 8; ++j, ++c)
            to.value[k * 8 + j] = __bfloat162float(from[by_rows ? k * stride + c : c * stride + k]);
}

template <class Sum, class A, class B>
void mma_sync(Sum& to, const A& a, const B& b, const Sum& plus) {
    Sum sum = plus;
    for (int k = 0; k < 16; ++k)
        for (int j = 0; j < 8; ++j) sum.value[j] += a.value[k] * b.value[k * 8 + j];
    to = sum;
}

template <class Sum>
void store_matrix_sync(float* to, const Sum& from, int stride, layout_t) {
    aligned(to, stride, sizeof(float));
    for (int j = 0; j < 8; ++j) to[row() * stride + column() + j] = from.value[j];
}

}  // namespace nvcuda::wmma
