// What the tests stand on: a check that counts, random numbers that are the same everywhere, and buffers with nothing behind them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

namespace fourscore::test {

using i64 = std::int64_t;
using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;

struct Tally {
    long checks = 0, failed = 0;
    std::string where;
};
inline Tally tally;

// Counts; says where the first failures are. The rest of the run goes on: one fault seldom comes alone.
#define CHECK(condition, ...)                                                                  \
    do {                                                                                       \
        ++fourscore::test::tally.checks;                                                       \
        if (!(condition) && ++fourscore::test::tally.failed <= 20) {                           \
            std::printf("FAILED %s: %s: ", fourscore::test::tally.where.c_str(), #condition);  \
            std::printf(__VA_ARGS__);                                                          \
            std::printf("\n");                                                                 \
        }                                                                                      \
    } while (false)

// splitmix64: the same numbers on every machine and with every standard library.
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}
    std::uint64_t bits() {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
    // Near enough to normal: 4 uniforms, variance 1.
    double normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.7320508075688772; }

  private:
    std::uint64_t state_;
};

#ifdef __SANITIZE_ADDRESS__
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

// Exactly `bytes` bytes. AddressSanitizer watches both ends; without it the memory ends where a page without access begins.
class Buffer {
  public:
    explicit Buffer(i64 bytes = 0) : bytes_(bytes) {
        std::size_t size = static_cast<std::size_t>(bytes);
        if (kSanitized) {
            data_ = static_cast<u8*>(std::malloc(size));
        } else {
            std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
            mapped_ = (size + page - 1) / page * page + page;
            void* base = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (base == MAP_FAILED || mprotect(static_cast<u8*>(base) + mapped_ - page, page, PROT_NONE) != 0) std::abort();
            base_ = base;
            data_ = static_cast<u8*>(base) + mapped_ - page - size;
        }
        if (size) std::memset(data_, 0xff, size);  // NaN in every type: what a kernel leaves out is seen
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(bytes_, other.bytes_), std::swap(data_, other.data_), std::swap(base_, other.base_), std::swap(mapped_, other.mapped_);
        return *this;
    }
    ~Buffer() {
        if (base_)
            munmap(base_, mapped_);
        else
            std::free(data_);
    }

    u8* data() { return data_; }
    const u8* data() const { return data_; }
    i64 bytes() const { return bytes_; }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data_);
    }
    template <class T>
    const T* as() const {
        return reinterpret_cast<const T*>(data_);
    }

  private:
    i64 bytes_ = 0;
    u8* data_ = nullptr;
    void* base_ = nullptr;
    std::size_t mapped_ = 0;
};

inline bool same(const Buffer& a, const Buffer& b) {
    return a.bytes() == b.bytes() && (a.bytes() == 0 || std::memcmp(a.data(), b.data(), static_cast<std::size_t>(a.bytes())) == 0);
}

}  // namespace fourscore::test
