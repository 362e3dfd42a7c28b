// Worker threads that sleep between jobs, and scratch memory that outlives a call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fourscore {

using Task = void (*)(void* job, std::int64_t index);

// Runs task(job, i) for 0 <= i < count on up to `threads` threads, the calling one among them; returns when all are done.
// Whoever is free takes the next index, so a core lost to another program costs its share and no more. Nobody spins.
void run(int threads, std::int64_t count, Task task, void* job);

// `bytes` of 64-byte aligned memory of this thread, valid until its next call with the same slot (0 to 3).
void* scratch(int slot, std::size_t bytes);

}  // namespace fourscore
