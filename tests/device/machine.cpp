/* Lanes are fibers that one thread switches between: a lane runs until it asks for something of its
 * wave or its workgroup, and goes on when all lanes that it concerns have asked. So a kernel that
 * leaves out a barrier reads what another wave has not written yet, and LDS holds NaN before. */
#include "machine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define RF_ASAN 1
#endif

namespace {

constexpr size_t STACK = 256 << 10;
enum class State { ready, exchange, barrier, done };

struct Fiber {
    void *sp = nullptr; /* where its registers are, while it does not run */
    std::unique_ptr<char[]> stack{new char[STACK]};
    void *fake_stack = nullptr; /* the address sanitizer's */
    State state = State::done;
    int mask = 0, value[2] = {0, 0};
    unsigned asked = 0; /* exchanges so far */
    rf_sim_order order{};
};

struct Machine {
    std::vector<Fiber> fibers;
    Fiber main;
    Fiber *current = nullptr;
    const rf_sim_kernel *kernel = nullptr;
    const void *arguments = nullptr;
    unsigned threads = 0, wave_size = 0;
    void *lds = nullptr;
    size_t lds_size = 0;
    rf_sim_lane lane{};
    std::string error;
    std::mt19937_64 random;
    std::vector<unsigned>
        words[2]; /* of `publish`: 16 a lane, in turns as values of exchanges are */
};
Machine machine;

#if !defined(__x86_64__)
#error "the simulated device switches stacks in x86-64 assembly"
#endif
/* switch_stack(&from.sp, to.sp): registers that a callee keeps, on the stack that is left. */
extern "C" void rf_sim_switch(void **from, void *to);
__asm__(".text\n.hidden rf_sim_switch\n.type rf_sim_switch, @function\nrf_sim_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
        ".size rf_sim_switch, .-rf_sim_switch\n");

/* The address sanitizer wants to know which stack is in use. */
#ifdef RF_ASAN
const void *main_stack;
size_t main_stack_size;
void leaving(Fiber &from, const Fiber &to, bool ends) {
    bool home = &to == &machine.main;
    __sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack,
                                   home ? main_stack : to.stack.get(),
                                   home ? main_stack_size : STACK);
}
void arrived(Fiber &at) {
    const void *stack;
    size_t size;
    __sanitizer_finish_switch_fiber(at.fake_stack, &stack, &size);
    if (&at != &machine.main) main_stack = stack, main_stack_size = size;
}
#else
void leaving(Fiber &, const Fiber &, bool) {}
void arrived(Fiber &) {}
#endif

void enter(Fiber &to, Fiber &from, bool ends) {
    leaving(from, to, ends);
    rf_sim_switch(&from.sp, to.sp);
    arrived(from);
}

void lane_main() {
    arrived(*machine.current);
    machine.kernel->run(machine.arguments);
    machine.current->state = State::done;
    enter(machine.main, *machine.current, true);
    std::abort();
}

void prepare(Fiber &f) {
    auto top = reinterpret_cast<uintptr_t>(f.stack.get() + STACK) & ~uintptr_t{15};
    void **sp = reinterpret_cast<void **>(top);
    *--sp = nullptr; /* keeps the stack aligned as after a call */
    *--sp = reinterpret_cast<void *>(lane_main);
    for (int i = 0; i < 6; i++) *--sp = nullptr;
    f.sp = sp;
    f.fake_stack = nullptr;
    f.state = State::ready;
    f.asked = 0;
    f.order = {};
}

void wait(State state) {
    Fiber &f = *machine.current;
    f.state = state;
    enter(machine.main, f, false);
}

/* All lanes of the wave have a value of this exchange when it returns; the one before is read by
 * then, as everybody had to come here, so two places are enough. */
Fiber *meet(int value, int mask) {
    Fiber *f = machine.current;
    f->mask = mask;
    f->value[f->asked++ % 2] = value;
    wait(State::exchange);
    return f;
}
int exchange(int value, int mask) {
    Fiber *f = meet(value, mask);
    size_t index = static_cast<size_t>(f - machine.fibers.data());
    Fiber &other = machine.fibers[index ^ static_cast<unsigned>(mask)];
    if (other.asked < f->asked && machine.error.empty())
        machine.error = "a shuffle reads from a lane that has ended";
    return other.value[(f->asked - 1) % 2];
}
bool any(bool value) {
    Fiber *f = meet(value, -1);
    size_t index = static_cast<size_t>(f - machine.fibers.data());
    size_t first = index / machine.wave_size * machine.wave_size;
    for (size_t i = first; i < first + machine.wave_size; i++) {
        const Fiber &other = machine.fibers[i];
        if (other.asked >= f->asked && other.value[(f->asked - 1) % 2]) return true;
    }
    return false;
}
const unsigned *publish(const unsigned *words, int count) {
    Fiber *f = machine.current;
    size_t index = static_cast<size_t>(f - machine.fibers.data()), turn = f->asked % 2;
    std::copy_n(words, count, &machine.words[turn][16 * index]);
    meet(0, -2);
    size_t first = index / machine.wave_size * machine.wave_size;
    for (size_t i = first; i < first + machine.wave_size; i++)
        if (machine.fibers[i].asked < f->asked && machine.error.empty())
            machine.error = "a matrix instruction needs a lane that has ended";
    return &machine.words[turn][16 * first];
}
void barrier() { wait(State::barrier); }
unsigned fetch_add(unsigned *p, unsigned x) {
    for (unsigned i = 0; i < machine.threads; i++) {
        rf_sim_order &order = machine.fibers[i].order;
        if (order.stored && machine.error.empty())
            machine.error = "a workgroup arrives before its lanes have released what they stored";
        order.stale = true;
    }
    unsigned before = *p;
    *p += x;
    return before;
}
void too_early() {
    if (machine.error.empty()) machine.error = "a lane reads before it has acquired";
}
void *shared(size_t size) {
    if (!machine.lds) {
        machine.lds = std::malloc(size); /* exactly: the address sanitizer knows where it ends */
        machine.lds_size = size;
        std::memset(machine.lds, 0xff, size);
    }
    if (size != machine.lds_size) machine.error = "two different LDS objects";
    return machine.lds;
}

/* Lets the lanes go on that have all met. False: none can. */
bool release() {
    bool progress = false, at_barrier = true, alive = false;
    for (size_t first = 0; first < machine.threads; first += machine.wave_size) {
        bool meets = true, waits = false;
        int mask = 0;
        for (size_t i = first; i < first + machine.wave_size; i++) {
            const Fiber &f = machine.fibers[i];
            if (f.state == State::done) continue;
            alive = true;
            at_barrier &= f.state == State::barrier;
            meets &= f.state == State::exchange && (!waits || f.mask == mask);
            waits = true;
            mask = f.mask;
        }
        if (waits && meets) {
            for (size_t i = first; i < first + machine.wave_size; i++)
                if (machine.fibers[i].state == State::exchange)
                    machine.fibers[i].state = State::ready;
            progress = true;
        }
    }
    if (alive && at_barrier) {
        for (unsigned i = 0; i < machine.threads; i++)
            if (machine.fibers[i].state == State::barrier) machine.fibers[i].state = State::ready;
        return true;
    }
    if (alive && !progress && machine.error.empty())
        machine.error = "lanes of a wave wait at different places";
    return progress;
}

void run_group(bool shuffled) {
    std::vector<unsigned> order(machine.threads);
    std::iota(order.begin(), order.end(), 0u);
    for (unsigned i = 0; i < machine.threads; i++) prepare(machine.fibers[i]);
    do {
        if (shuffled) std::shuffle(order.begin(), order.end(), machine.random);
        for (unsigned i : order) {
            Fiber &f = machine.fibers[i];
            if (f.state != State::ready) continue;
            machine.current = &f;
            machine.lane.thread = static_cast<int>(i);
            machine.lane.order = &f.order;
            enter(f, machine.main, false);
        }
    } while (machine.error.empty() && release());
    std::free(machine.lds);
    machine.lds = nullptr;
}

} // namespace

std::string rf_sim_run(const rf_sim_kernel &kernel, rf_sim_lane **lane_of_kernel,
                       const unsigned grid[3], unsigned threads, unsigned wave_size,
                       const void *arguments, uint64_t seed) {
    if (threads % wave_size) return "a workgroup of a part of a wave";
    while (machine.fibers.size() < threads) machine.fibers.emplace_back();
    for (auto &words : machine.words) words.resize(16 * machine.fibers.size());
    machine.kernel = &kernel;
    machine.arguments = arguments;
    machine.threads = threads;
    machine.wave_size = wave_size;
    machine.error.clear();
    machine.random.seed(seed);
    machine.lane = {0,       nullptr, {0, 0, 0}, exchange,  any,
                    publish, barrier, shared,    fetch_add, too_early};
    *lane_of_kernel = &machine.lane;
    std::vector<uint64_t> groups(uint64_t{grid[0]} * grid[1] * grid[2]);
    std::iota(groups.begin(), groups.end(), uint64_t{0});
    if (seed) std::shuffle(groups.begin(), groups.end(), machine.random);
    for (uint64_t i : groups) {
        machine.lane.group[0] = static_cast<int>(i % grid[0]);
        machine.lane.group[1] = static_cast<int>(i / grid[0] % grid[1]);
        machine.lane.group[2] = static_cast<int>(i / grid[0] / grid[1]);
        run_group(seed != 0);
        if (!machine.error.empty()) break;
    }
    return machine.error;
}

/* For tests: the split (grid z) of the workgroup that ran last. */
extern "C" __attribute__((visibility("default"))) int rf_sim_last_split() {
    return machine.lane.group[2];
}
