// Launches for Python: made once of plain tuples, then called with a stream and the addresses of tensors.
#pragma once
#include <tuple>
#include <utility>
#include <vector>

#include "common/bind.h"
#include "replay/replay.h"

namespace evaat {

struct Launches {
  LaunchKernel launch;
  std::vector<Launch> launches;
};

inline void bind_replay(py::module_& m) {
  using Known = std::tuple<Pointer, std::array<unsigned, 3>, unsigned, unsigned, std::vector<uint64_t>,
                           std::vector<std::tuple<uint32_t, uint32_t, uint64_t>>>;
  py::class_<Launches>(m, "Launches", py::module_local())
      .def(py::init([](Pointer launch, const std::vector<Known>& known) {
             Launches all{at<std::remove_pointer_t<LaunchKernel>>(launch), {}};
             for (const auto& [function, grid, threads, shared, values, addresses] : known) {
               all.launches.push_back({at<void>(function), grid, threads, shared, values, {}});
               for (const auto& [parameter, tensor, offset] : addresses)
                 all.launches.back().addresses.push_back({parameter, tensor, offset});
             }
             return all;
           }),
           "launch: the address of the driver's cuLaunchKernel; known: (function, grid, threads, bytes of shared memory, values, "
           "[(parameter, tensor, offset)]) of each launch.")
      .def("__call__", [](const Launches& all, Pointer stream, const std::vector<uint64_t>& tensors) {
        py::gil_scoped_release free;
        return replay(all.launch, all.launches, at<void>(stream), tensors.data());
      });
}

}  // namespace evaat
