#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace fourscore {
namespace {

// One job at a time. `state` holds a job number, whether the job still takes helpers, and how many are in it: a helper that
// wakes late finds the job closed and sleeps again, so the caller never waits for a thread that has not begun.
constexpr std::uint64_t kJob = std::uint64_t{1} << 32;
constexpr std::uint64_t kOpen = std::uint64_t{1} << 31;
constexpr std::uint64_t kHelpers = kOpen - 1;

struct Pool {
    std::mutex one_caller;
    std::atomic<std::uint64_t> state{0};
    std::atomic<std::uint32_t> bell{0};
    std::atomic<std::uint32_t> left{0};
    std::atomic<std::int64_t> next{0};
    std::int64_t count = 0;
    Task task = nullptr;
    void* job = nullptr;
    std::atomic<int> places{0};
    int workers = 0;

    void work() {
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(job, i);
    }

    bool join() {
        std::uint64_t s = state.load(std::memory_order_acquire);
        while ((s & kOpen) && static_cast<int>(s & kHelpers) < places.load(std::memory_order_relaxed))
            if (state.compare_exchange_weak(s, s + 1, std::memory_order_acq_rel)) return true;
        return false;
    }

    void leave() {
        std::uint64_t before = state.fetch_sub(1, std::memory_order_acq_rel);
        if (!(before & kOpen) && (before & kHelpers) == 1) {
            left.fetch_add(1, std::memory_order_release);
            left.notify_one();
        }
    }

    void serve() {
        std::uint32_t heard = 0;
        for (;;) {
            std::uint32_t rung = bell.load(std::memory_order_acquire);
            if (rung == heard) {
                bell.wait(heard, std::memory_order_acquire);
                continue;
            }
            heard = rung;
            if (join()) {
                work();
                leave();
            }
        }
    }

    void run(int threads, std::int64_t n, Task t, void* j) {
        for (; workers < threads - 1; ++workers) std::thread([this] { serve(); }).detach();
        count = n, task = t, job = j;
        places.store(threads - 1, std::memory_order_relaxed);
        next.store(0, std::memory_order_relaxed);
        std::uint64_t s = state.load(std::memory_order_relaxed);
        state.store(((s / kJob + 1) * kJob) | kOpen, std::memory_order_release);
        bell.fetch_add(1, std::memory_order_release);
        if (threads == 2)
            bell.notify_one();
        else
            bell.notify_all();
        work();
        std::uint32_t seen = left.load(std::memory_order_acquire);
        std::uint64_t closed = state.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
        while (closed & kHelpers) {
            left.wait(seen, std::memory_order_acquire);
            seen = left.load(std::memory_order_acquire);
            closed = state.load(std::memory_order_acquire);
        }
    }
};

std::atomic<Pool*> pool{nullptr};

// A forked child has none of its parent's threads; it starts a pool of its own.
void forget() { pool.store(new Pool, std::memory_order_release); }

Pool& the_pool() {
    static const bool once = [] {
        forget();
        pthread_atfork(nullptr, nullptr, forget);
        return true;
    }();
    (void)once;
    return *pool.load(std::memory_order_acquire);
}

struct Scratch {
    void* memory[4] = {};
    std::size_t size[4] = {};
    ~Scratch() {
        for (void* m : memory) std::free(m);
    }
};

}  // namespace

void run(int threads, std::int64_t count, Task task, void* job) {
    if (threads > 1 && count > 1) {
        Pool& p = the_pool();
        // Two Python threads at once: the second computes alone.
        if (std::unique_lock lock(p.one_caller, std::try_to_lock); lock.owns_lock()) {
            p.run(threads < count ? threads : static_cast<int>(count), count, task, job);
            return;
        }
    }
    for (std::int64_t i = 0; i < count; ++i) task(job, i);
}

void* scratch(int slot, std::size_t bytes) {
    static thread_local Scratch s;
#ifdef __SANITIZE_ADDRESS__
    // A new piece of the exact size each time, so that no kernel reads past what it asked for, or what an earlier call left.
    std::free(s.memory[slot]);
    if (posix_memalign(&s.memory[slot], 64, bytes)) throw std::bad_alloc();
    std::memset(s.memory[slot], 0xff, bytes);
#else
    if (s.size[slot] < bytes) {
        std::free(s.memory[slot]);
        s.size[slot] = 0;
        std::size_t rounded = (bytes + 4095) / 4096 * 4096;
        s.memory[slot] = std::aligned_alloc(64, rounded);
        if (!s.memory[slot]) throw std::bad_alloc();
        s.size[slot] = rounded;
    }
#endif
    return s.memory[slot];
}

}  // namespace fourscore
