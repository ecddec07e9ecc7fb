// All kernels for the CPU, and the one function that runs them by name. Each file in a namespace of its own, as they are
// modules of their own on a GPU.
#include "attention.cuh"

namespace adamw {
#include "adamw.cu"
}
namespace attention {
#include "attention.cu"
}
namespace attention_simple {
#include "attention_simple.cu"
}
namespace cast {
#include "cast.cu"
}
namespace columns {
#include "columns.cu"
}
namespace cross_entropy {
#include "cross_entropy.cu"
}
namespace embedding {
#include "embedding.cu"
}
namespace gathered {
#include "gathered.cu"
}
namespace noise {
#include "noise.cu"
}
namespace paged_attention {
#include "paged_attention.cu"
}
namespace paged_prefill {
#include "paged_prefill.cu"
}
namespace rms_norm {
#include "rms_norm.cu"
}
namespace rope {
#include "rope.cu"
}
namespace sampling {
#include "sampling.cu"
}
namespace swiglu {
#include "swiglu.cu"
}

extern "C" int updraft_emulator_launch(
    unsigned capability, const char* kernel, const unsigned* grid, unsigned threads, unsigned shared,
    void** arguments) {
    return emulator::launch(capability, kernel, grid, threads, shared, arguments);
}
