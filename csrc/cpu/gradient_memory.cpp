// Memory for ∂w [C, D]. A fresh block of that size costs more in page faults than the whole loss (measured: 65 ms for
// 175 MB against 10 ms for writing it), so sface_kernels/backends/native.py keeps blocks for the next steps, and here
// they get huge pages, which fault 512 times less often.
#include <torch/csrc/stable/library.h>

#include <array>

#include "problem.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sface {

void use_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage,
                  last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor empty_kept(const Tensor& like) {
  constexpr int64_t kSmallest = 8 << 20;  // bytes; below it PyTorch's allocator does as well
  const std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  if (like.numel() * static_cast<int64_t>(like.element_size()) < kSmallest)
    return torch::stable::empty(sizes, like.scalar_type());
  std::array<StableIValue, 1> stack{torch::stable::detail::from(like)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("sface::native_empty_gradient", "", stack.data(), TORCH_ABI_VERSION));
  Tensor grad = torch::stable::detail::to<Tensor>(stack[0]);
  check_tensor("native_empty_gradient", grad, like.scalar_type(), sizes);
  use_huge_pages(grad.mutable_data_ptr(), grad.numel() * grad.element_size());
  return grad;
}

}  // namespace sface
