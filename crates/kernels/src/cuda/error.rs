//! What can go wrong on a GPU.

/// An error of the GPU, its driver or its memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no NVIDIA driver.
    #[error(
        "no NVIDIA driver: libcuda is not installed here; install the driver, or run on the CPU"
    )]
    NoDriver,
    /// There is no cuBLAS of the version that this program was compiled for.
    #[error(
        "no cuBLAS: libcublas of the CUDA version that this program was compiled with is not on the library path; \
         install the CUDA runtime, or add its folder to LD_LIBRARY_PATH"
    )]
    NoBlas,
    /// There is no NCCL.
    #[error(
        "no NCCL: libnccl.so.2 is not on the library path; install it (libnccl2 of NVIDIA's repository, or the wheel \
         nvidia-nccl-cu13 with its folder in LD_LIBRARY_PATH), or build without the feature nccl, which goes over TCP"
    )]
    NoNccl,
    /// The driver knows no such device.
    #[error(
        "no GPU {ordinal}: the driver sees {count}; choose a lower number, or look at CUDA_VISIBLE_DEVICES"
    )]
    NoDevice {
        /// The device that was asked for.
        ordinal: usize,
        /// Devices there are.
        count: usize,
    },
    /// The driver cannot run what this program was compiled with.
    #[error(
        "the NVIDIA driver is too old for the CUDA toolkit that this program was compiled with; \
         update the driver, or compile with an older toolkit"
    )]
    OldDriver,
    /// The kernels were not compiled for such a GPU.
    #[error(
        "the GPU is of compute capability {found}, the kernels were compiled for {compiled}; \
         compile again with CUDA_COMPUTE_CAP={found}"
    )]
    Capability {
        /// The device's, as in `90`.
        found: u32,
        /// The kernels'.
        compiled: u32,
    },
    /// Too little memory is free.
    #[error(
        "out of GPU memory: {bytes} bytes more were asked for; ask less of it (a smaller micro-batch or KV cache), or free the GPU"
    )]
    OutOfMemory {
        /// What the failed call asked for.
        bytes: usize,
    },
    /// This program holds no kernels.
    #[error("the kernels were not compiled (UPDRAFT_SKIP_NVCC was set); compile again without it")]
    NotCompiled,
    /// Another error of the driver, in its words.
    #[error("the GPU failed: {0}")]
    Driver(String),
}
