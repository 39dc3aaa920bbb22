// Uninitialised memory that starts on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace dspa::cpu {

template <class T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), alignment))) {}

  T* data() const { return data_.get(); }
  T& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, alignment); }
  };
  std::unique_ptr<T, Free> data_;
};

}  // namespace dspa::cpu
