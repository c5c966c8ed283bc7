// The module evaat_fast._cpu: argument unpacking only. Python has checked everything; every function returns a Status.
#include "common/bind.h"
#include "common/cpu.h"
#include "norm/bind.h"
#include "pairwise/bind.h"
#include "patchify/bind.h"
#include "replay/bind.h"
#include "rope3d/bind.h"

PYBIND11_MODULE(_cpu, m, pybind11::mod_gil_not_used()) {
  m.doc() = "C++ kernels of evaat-fast for the CPU, free of torch";
  m.def("isa", &evaat::isa);
  m.def("set_isa", &evaat::set_isa, pybind11::arg("level"));
  evaat::bind_dtypes(m);
  evaat::bind_rope3d<int>(m, evaat::rope3d);
  evaat::bind_rope3d_freqs(m);
  evaat::bind_patchify<int>(m, evaat::patchify);
  evaat::bind_norm(m);
  evaat::bind_pairwise(m);
  evaat::bind_replay(m);
}
