// Threads that go through the stages of one computation together. A stage is over when its tasks are done, not when all threads
// have come by: whoever is free takes the next task, and a thread that another program kept away finds its stages done and catches
// up. Waiting for the last task spins for some microseconds and then sleeps.
#pragma once

#include <atomic>
#include <cstdint>

namespace fourscore {

struct alignas(64) Stage {
    std::atomic<std::int64_t> next{0}, done{0};
    std::atomic<std::uint32_t> finished{0};

    // task(i) for 0 <= i < count, then after() once, by the thread that finished the last task.
    template <class Task, class After>
    void go(std::int64_t count, const Task& task, const After& after) {
        std::int64_t mine = 0;
        for (std::int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count; ++mine) task(i);
        if (mine && done.fetch_add(mine, std::memory_order_acq_rel) + mine == count) {
            after();
            finished.store(1, std::memory_order_release);
            finished.notify_all();
            return;
        }
        for (int spin = 0; spin < 1000; ++spin) {
            if (finished.load(std::memory_order_acquire)) return;
#if defined(__x86_64__)
            __builtin_ia32_pause();
#elif defined(__aarch64__)
            asm volatile("yield");
#endif
        }
        while (!finished.load(std::memory_order_acquire)) finished.wait(0, std::memory_order_acquire);
    }
};

}  // namespace fourscore
