// csrc/cuda/device.h on the CPU: every CUDA thread is a fiber, and the unmodified .cuh files run as they are.
//
// A block's fibers take turns at collectives: barriers, shuffles, ldmatrix, mma, with the fragment layouts of the PTX
// manual; a collective that some thread never reaches ends the process with a message. What hardware leaves open is
// made to show: shared memory starts as NaN; an asynchronous copy fills its destination with NaN when it is started and
// is performed no earlier than the wait that guarantees it, so that a read before (or a write too early) gives NaN, and
// no second copy may go to a place while one is under way; and the order of a block's threads is reversed in every
// other block.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_set>
#include <vector>

#if !defined(SK_ARCH)
#define SK_ARCH 800
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#else
// Saves the registers that a call keeps and the stack in *from, and goes on where `to` was saved. (swapcontext enters
// the kernel twice for the signal mask, which takes ten times as long.)
extern "C" void sk_switch_stack(void** from, void* to);
asm(R"(
.weak sk_switch_stack
.hidden sk_switch_stack
.type sk_switch_stack, @function
sk_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size sk_switch_stack, . - sk_switch_stack
)");
#endif

#define SK_DEVICE inline
#define SK_BOTH inline
#define SK_KERNEL(threads) void
#define SK_GRID_CONSTANT
#define SK_UNROLL
#define SK_NO_UNROLL

namespace sk::gpu {

namespace emulation {

struct Copy {
    unsigned char* to;
    const unsigned char* from;
    int bytes;
};

constexpr size_t kStack = 256 << 10;

// Where a thread of execution left off.
#if defined(__x86_64__)
struct Context {
    void* top = nullptr;

    void start(unsigned char* stack, void (*entry)()) {
        auto** slots = reinterpret_cast<void**>(stack + kStack);
        *--slots = nullptr;  // the entry sees its stack as after a call: 8 below a multiple of 16
        *--slots = reinterpret_cast<void*>(entry);
        for (int saved = 0; saved < 6; ++saved) *--slots = nullptr;
        top = slots;
    }
    void switch_to(Context& other) { sk_switch_stack(&top, other.top); }
};
#else
struct Context {
    ucontext_t context;

    void start(unsigned char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStack;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Fiber {
    Context context;
    unsigned char* stack = nullptr;
    void* fake_stack = nullptr;
    bool done = false;
    std::vector<Copy> open;                // copies of the group that is not committed yet
    std::deque<std::vector<Copy>> groups;  // committed ones, oldest first
};

// Threads that meet: a warp or a block.
struct Meeting {
    int members = 0, arrived = 0;
    uint64_t rounds = 0;
    void* arguments[32] = {};
};

struct Block {
    int64_t x, y, z;
    int threads, current = 0, step = 1;
    int64_t idle = 0;  // turns since anything happened
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    std::vector<unsigned char> bytes;
    unsigned char* shared;
    std::unordered_set<const void*> copied_to;  // where copies of any thread are under way to
    Context main;
    void* main_stack = nullptr;
    size_t main_size = 0;
    std::function<void()> body;
};

inline thread_local Block* running = nullptr;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "emulation: %s\n", what);
    std::abort();
}

inline Fiber& fiber() { return running->fibers[static_cast<size_t>(running->current)]; }

// Leaves this fiber for the next one that is not done, or for the launcher.
inline void hand_over() {
    Block& block = *running;
    Fiber& from = fiber();
    int next = block.current;
    for (int tried = 0; tried < block.threads; ++tried) {
        next = (next + block.step + block.threads) % block.threads;
        if (!block.fibers[static_cast<size_t>(next)].done) break;
    }
    const bool last = block.fibers[static_cast<size_t>(next)].done;
    if (!last && &block.fibers[static_cast<size_t>(next)] == &from) return;
    if (++block.idle > 4 * int64_t{block.threads})
        fail("threads wait for one another: a collective was not reached by all");
    Fiber& to = block.fibers[static_cast<size_t>(next)];
    block.current = next;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, last ? block.main_stack : to.stack,
                                   last ? block.main_size : kStack);
#endif
    from.context.switch_to(last ? block.main : to.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// Waits until all members are here; the last one runs `action` on everybody's arguments.
template <class Action>
void meet(Meeting& meeting, int place, void* argument, const Action& action) {
    if (place >= 0) meeting.arguments[place] = argument;
    const uint64_t round = meeting.rounds;
    running->idle = 0;
    if (++meeting.arrived == meeting.members) {
        action(meeting.arguments);
        meeting.arrived = 0;
        ++meeting.rounds;
        return;
    }
    while (meeting.rounds == round) hand_over();
}

template <class T, class Action>
void meet_warp(T& mine, const Action& action) {
    meet(running->warps[static_cast<size_t>(running->current / 32)], running->current % 32, &mine,
         [&](void** all) { action(reinterpret_cast<T**>(all)); });
}

inline void perform(std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        std::memset(copy.to, 0, 16);
        if (copy.bytes) std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        running->copied_to.erase(copy.to);
    }
}

inline void start_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    const void* stack;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &stack, &size);
    if (!running->main_stack) running->main_stack = const_cast<void*>(stack), running->main_size = size;
#endif
    running->body();
    fiber().done = true;
    running->idle = 0;
    hand_over();
    fail("a finished thread was resumed");
}

// Stacks are made once: most of a small launch would be spent on them.
inline unsigned char* stack_of(size_t fiber) {
    static thread_local std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (stacks.size() <= fiber) stacks.emplace_back(new unsigned char[kStack]);
    return stacks[fiber].get();
}

inline void run_block(Block& block) {
    running = &block;
    block.copied_to.clear();
    for (int i = 0; i < block.threads; ++i) {
        Fiber& fiber = block.fibers[static_cast<size_t>(i)];
        fiber.done = false;
        fiber.open.clear();
        fiber.groups.clear();
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(fiber.stack, kStack);  // of the frames that the last thread never left
#endif
        fiber.context.start(fiber.stack, start_fiber);
    }
    block.current = block.step > 0 ? 0 : block.threads - 1;
    Fiber& first = block.fibers[static_cast<size_t>(block.current)];
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, first.stack, kStack);
#endif
    block.main.switch_to(first.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    for (const Fiber& fiber : block.fibers)
        if (!fiber.done) fail("a thread did not finish");
    running = nullptr;
}

}  // namespace emulation

// Runs `body` as every thread of every block; what launch.h calls.
inline int run_grid(int64_t x, int64_t y, int64_t z, int threads, int64_t shared_bytes,
                    const std::function<void()>& body) {
    using namespace emulation;
    if (threads % 32 != 0 || threads > 1024 || shared_bytes > 227 << 10) return 1001;  // cudaErrorInvalidValue
    Block block{};
    block.threads = threads;
    block.body = body;
    block.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
    for (size_t i = 0; i < block.fibers.size(); ++i) block.fibers[i].stack = stack_of(i);
    for (int64_t i = 0; i < x * y * z; ++i) {
        block.x = i % x, block.y = i / x % y, block.z = i / x / y;
        block.step = i % 2 ? -1 : 1;
        block.warps.assign(static_cast<size_t>(threads / 32), Meeting{});
        for (Meeting& warp : block.warps) warp.members = 32;
        block.all = Meeting{};
        block.all.members = threads;
        // Exactly as large as asked for, so that the sanitizer sees an overrun.
        void* shared = nullptr;
        if (posix_memalign(&shared, 128, static_cast<size_t>(shared_bytes ? shared_bytes : 1))) fail("no memory");
        block.shared = static_cast<unsigned char*>(shared);
        std::memset(shared, 0xff, static_cast<size_t>(shared_bytes));
        run_block(block);
        std::free(shared);
    }
    return 0;
}

inline int thread_index() { return emulation::running->current; }
inline int block_threads() { return emulation::running->threads; }
inline int block_x() { return static_cast<int>(emulation::running->x); }
inline int block_y() { return static_cast<int>(emulation::running->y); }
inline int block_z() { return static_cast<int>(emulation::running->z); }
inline unsigned char* shared_memory() { return emulation::running->shared; }

inline void sync_block() {
    emulation::meet(emulation::running->all, -1, nullptr, [](void**) {});
}
inline void sync_warp() {
    int nothing = 0;
    emulation::meet_warp(nothing, [](int**) {});
}
inline int32_t shuffle(int32_t value, int lane) {
    struct Ask {
        int32_t value, lane, result;
    } mine{value, lane, 0};
    emulation::meet_warp(mine, [](Ask** all) {
        for (int i = 0; i < 32; ++i) all[i]->result = all[all[i]->lane & 31]->value;
    });
    return mine.result;
}
inline float shuffle_xor(float value, int mask) {
    struct Ask {
        float value, result;
        int mask;
    } mine{value, 0, mask};
    emulation::meet_warp(mine, [](Ask** all) {
        for (int i = 0; i < 32; ++i) all[i]->result = all[i ^ all[i]->mask]->value;
    });
    return mine.result;
}

inline void copy_16_async(void* shared, const void* global, int bytes) {
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
        emulation::fail("a 16-byte copy is not aligned");
    if (bytes < 0 || bytes > 16) emulation::fail("a 16-byte copy of another size");
    const emulation::Copy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes};
#if SK_ARCH >= 800
    if (!emulation::running->copied_to.insert(copy.to).second) emulation::fail("two copies under way to one place");
    std::memset(shared, 0xff, 16);
    emulation::fiber().open.push_back(copy);
#else
    std::vector<emulation::Copy> now{copy};
    emulation::perform(now);
#endif
}
inline void store_16(void* global, const uint32_t (&words)[4]) {
    if (reinterpret_cast<uintptr_t>(global) % 16) emulation::fail("a 16-byte store is not aligned");
    std::memcpy(global, words, 16);
}
inline void commit_copies() {
    emulation::Fiber& fiber = emulation::fiber();
    fiber.groups.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int N>
inline void wait_copies() {
    auto& groups = emulation::fiber().groups;
    for (; groups.size() > N; groups.pop_front()) emulation::perform(groups.front());
}

struct Half {};
struct Bf16 {};

namespace emulation {

inline float to_float(Bf16, uint16_t bits) {
    const uint32_t word = uint32_t{bits} << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline float to_float(Half, uint16_t bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
    return sign * std::ldexp(static_cast<float>(1024 + fraction), static_cast<int>(exponent) - 25);
}
// Element `i` of a register array of pairs.
template <class T>
float element(const uint32_t* registers, int i) {
    return to_float(T{}, static_cast<uint16_t>(registers[i / 2] >> 16 * (i % 2)));
}

inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
    struct Ask {
        uint32_t* r;
        const void* row;
    } mine{r, row};
    meet_warp(mine, [&](Ask** all) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            uint16_t m[8][8];
            for (int i = 0; i < 8; ++i) {
                if (reinterpret_cast<uintptr_t>(all[8 * matrix + i]->row) % 16)
                    fail("a row of ldmatrix is not aligned");
                std::memcpy(m[i], all[8 * matrix + i]->row, 16);
            }
            for (int lane = 0; lane < 32; ++lane) {
                const int i = lane / 4, j = 2 * (lane % 4);
                const uint32_t low = transposed ? m[j][i] : m[i][j], high = transposed ? m[j + 1][i] : m[i][j + 1];
                all[lane]->r[matrix] = low | high << 16;
            }
        }
    });
}

// mma.m16n8kK.row.col, K = 8 or 16: PTX manual, fragments of .f16 and .bf16.
template <class T, int K>
void mma_16n8(float* d, const uint32_t* a, const uint32_t* b) {
    struct Ask {
        float* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    meet_warp(mine, [](Ask** all) {
        float left[16][K], right[K][8];
        for (int lane = 0; lane < 32; ++lane) {
            const int group = lane / 4, in_group = lane % 4;
            for (int i = 0; i < K / 2; ++i) {
                const int row = group + (i % 4 >= 2 ? 8 : 0), k = 2 * in_group + i % 2 + (i >= 4 ? 8 : 0);
                left[row][k] = element<T>(all[lane]->a, i);
            }
            for (int i = 0; i < K / 4; ++i)
                right[2 * in_group + i % 2 + (i >= 2 ? 8 : 0)][group] = element<T>(all[lane]->b, i);
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                const int row = lane / 4 + (i >= 2 ? 8 : 0), column = 2 * (lane % 4) + i % 2;
                for (int k = 0; k < K; ++k) all[lane]->d[i] += left[row][k] * right[k][column];
            }
    });
}

}  // namespace emulation

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulation::load_matrices(r, row, true); }
template <class T>
inline void mma_16816(T, float* d, const uint32_t* a, const uint32_t* b) {
    emulation::mma_16n8<T, 16>(d, a, b);
}
inline void mma_1688(float* d, const uint32_t* a, const uint32_t* b) { emulation::mma_16n8<Half, 8>(d, a, b); }

// mma.m8n8k4 in fp16: four quad pairs, each lanes 4 q .. 4 q + 3 and 16 + 4 q .. 16 + 4 q + 3.
template <bool A_COLUMNS>
inline void mma_884(float* d, const uint32_t* a, const uint32_t* b) {
    struct Ask {
        float* d;
        const uint32_t *a, *b;
    } mine{d, a, b};
    emulation::meet_warp(mine, [](Ask** all) {
        for (int pair = 0; pair < 4; ++pair) {
            float left[8][4], right[4][8];
            const auto lane_of = [&](int i) { return 4 * pair + i % 4 + 16 * (i / 4); };
            for (int thread = 0; thread < 8; ++thread)
                for (int i = 0; i < 4; ++i) {
                    const Ask& ask = *all[lane_of(thread)];
                    const int quad = thread % 4, high = 4 * (thread / 4);
                    left[A_COLUMNS ? i + high : quad + high][A_COLUMNS ? quad : i] = emulation::element<Half>(ask.a, i);
                    right[i][quad + high] = emulation::element<Half>(ask.b, i);
                }
            for (int thread = 0; thread < 8; ++thread)
                for (int i = 0; i < 8; ++i) {
                    const int lane = lane_of(thread), row = (lane & 1) + (i & 2) + (lane >= 16 ? 4 : 0);
                    const int column = (i & 4) + (lane & 2) + (i & 1);
                    for (int k = 0; k < 4; ++k) all[lane]->d[i] += left[row][k] * right[k][column];
                }
        }
    });
}

inline uint16_t to_bits(Bf16, float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if (value != value) return 0x7fff;
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}
inline uint16_t to_bits(Half, float value) {
    if (value != value) return 0x7fff;
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(size, &exponent);  // size = f 2^exponent, f in [1/2, 1)
    exponent = exponent < -13 ? -13 : exponent;
    // nearbyint rounds to even, as the conversion does.
    const auto units = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    // Subnormal below 1024 units; a carry into the next exponent comes out right by the addition.
    return static_cast<uint16_t>(sign | (units < 1024 ? units : (static_cast<uint32_t>(exponent + 13) << 10) + units));
}

inline float exponential(float x) { return std::exp(x); }
inline float error_function(float x) { return std::erf(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }

}  // namespace sk::gpu
