#include "replay/replay.h"

namespace evaat {

int replay(LaunchKernel launch, const std::vector<Launch>& launches, void* stream, const uint64_t* tensors) {
  std::vector<uint64_t> values;
  std::vector<void*> parameters;
  for (const Launch& of : launches) {
    values = of.values;
    for (const Address& a : of.addresses) values[a.parameter] = tensors[a.tensor] + a.offset;
    parameters.resize(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) parameters[i] = &values[i];
    const auto& grid = of.grid;
    const int status = launch(of.function, grid[0], grid[1], grid[2], of.threads, 1, 1, of.shared, stream, parameters.data(), nullptr);
    if (status) return status;
  }
  return 0;
}

}  // namespace evaat
