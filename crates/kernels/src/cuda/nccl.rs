//! NCCL, which hands numbers from GPU to GPU; loaded when it is asked for, so that a program starts without it.
//!
//! cudarc has it too, but looks for `libnccl.so` alone: NVIDIA's runtime package and its wheel have `libnccl.so.2`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::ManuallyDrop;

use libloading::Library;

use super::device::Backend;
use super::driver::Driver;
use super::{Error, Gpu, Result, View, ViewMut};

/// What tells a group of workers from every other: one of them makes it, and all of them know it.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct UniqueId([u8; Self::BYTES]);

/// One worker of a group, each of which has a GPU of its own.
#[derive(Debug)]
pub struct Communicator {
    nccl: Nccl,
    comm: Comm,
    gpu: Gpu,
    num_workers: usize,
}

type Comm = *mut c_void;

/// As `ncclFloat32` in nccl.h.
const FLOAT32: c_int = 7;

/// The functions that are used here, as nccl.h declares them since 2.0. Nothing is ever unloaded: the library has threads
/// of its own.
#[derive(Debug)]
struct Nccl {
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int,
    all_gather:
        unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int,
    comm_abort: unsafe extern "C" fn(Comm) -> c_int,
    get_error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    _library: ManuallyDrop<Library>,
}

impl Nccl {
    fn load() -> Result<Self> {
        let names = ["libnccl.so.2", "libnccl.so"];
        let library = names.into_iter().find_map(|name| {
            // SAFETY: NCCL's initializers have no effect on this program.
            unsafe { Library::new(name) }.ok()
        });
        let library = ManuallyDrop::new(library.ok_or(Error::NoNccl)?);
        let missing = |error: libloading::Error| Error::Driver(format!("NCCL: {error}"));
        // SAFETY: the signatures are those of nccl.h, and the library is never unloaded.
        unsafe {
            Ok(Self {
                get_unique_id: *library.get("ncclGetUniqueId").map_err(missing)?,
                comm_init_rank: *library.get("ncclCommInitRank").map_err(missing)?,
                all_gather: *library.get("ncclAllGather").map_err(missing)?,
                comm_abort: *library.get("ncclCommAbort").map_err(missing)?,
                get_error_string: *library.get("ncclGetErrorString").map_err(missing)?,
                _library: library,
            })
        }
    }

    fn check(&self, status: c_int) -> Result<()> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: NCCL's words for any status are a constant string.
        let words = unsafe { CStr::from_ptr((self.get_error_string)(status)) };
        let words = words.to_string_lossy();
        Err(Error::Driver(format!(
            "NCCL: {words}; NCCL_DEBUG=WARN has it say more"
        )))
    }
}

impl UniqueId {
    /// Its length.
    pub const BYTES: usize = 128;

    /// A new one, for the first worker.
    ///
    /// # Errors
    /// [`Error::NoNccl`]; [`Error::Driver`] in NCCL's words.
    pub fn new() -> Result<Self> {
        let nccl = Nccl::load()?;
        let mut id = Self([0; Self::BYTES]);
        // SAFETY: as many bytes as nccl.h says.
        nccl.check(unsafe { (nccl.get_unique_id)(&raw mut id) })?;
        Ok(id)
    }

    /// For the other workers.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        self.0
    }

    /// As the first worker sent it.
    #[must_use]
    pub fn from_bytes(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }
}

impl std::fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("UniqueId")
    }
}

// SAFETY: a communicator may be used by one thread after the other.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins a group as its worker `rank` of `num_workers`, and waits until all have.
    ///
    /// # Errors
    /// [`Error::NoNccl`]; [`Error::Driver`] in NCCL's words.
    pub fn join(gpu: &Gpu, rank: usize, num_workers: usize, id: UniqueId) -> Result<Self> {
        let nccl = Nccl::load()?;
        driver_of(gpu)?.stream()?; // binds the device, which NCCL takes
        let mut comm = std::ptr::null_mut();
        let int = |number: usize| c_int::try_from(number).expect("workers fit in 31 bits");
        // SAFETY: the id is one of NCCL's, and the place for the communicator outlives the call.
        let status =
            unsafe { (nccl.comm_init_rank)(&raw mut comm, int(num_workers), id, int(rank)) };
        nccl.check(status)?;
        Ok(Self {
            nccl,
            comm,
            gpu: gpu.clone(),
            num_workers,
        })
    }

    /// Puts each worker's numbers into its place of everybody's `all`, in the order of ranks; on the device's stream, like
    /// a launch.
    ///
    /// # Errors
    /// [`Error::Driver`] in NCCL's words.
    ///
    /// # Panics
    /// If `all` has not as many places, or a view is of another device.
    pub fn all_gather(&mut self, mine: View<'_, f32>, all: &ViewMut<'_, f32>) -> Result<()> {
        assert_eq!(all.len(), mine.len() * self.num_workers, "a place for each");
        mine.check(&self.gpu);
        all.as_view().check(&self.gpu);
        let stream = driver_of(&self.gpu)?.stream()?;
        let (from, to) = (
            mine.address() as *const c_void,
            all.address() as *mut c_void,
        );
        // SAFETY: the views are of this device, lent for reading and for writing, and as long as the call needs.
        let status =
            unsafe { (self.nccl.all_gather)(from, to, mine.len(), FLOAT32, self.comm, stream) };
        self.nccl.check(status)
    }
}

impl Drop for Communicator {
    /// Also when another worker is gone, for whom the device would wait for ever.
    fn drop(&mut self) {
        // SAFETY: joined, and not yet left. There is nobody to tell that it failed.
        let _ = unsafe { (self.nccl.comm_abort)(self.comm) };
    }
}

fn driver_of(gpu: &Gpu) -> Result<&Driver> {
    match &gpu.backend {
        Backend::Driver(driver) => Ok(driver),
        #[cfg(feature = "cuda-emulator")]
        Backend::Emulator(_) => Err(Error::Driver(
            "NCCL joins GPUs, and this is their emulator".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there is no NCCL the program starts, and says what to install.
    #[test]
    fn what_is_missing_is_said() {
        match UniqueId::new() {
            Err(error @ Error::NoNccl) => assert!(error.to_string().contains("libnccl2")),
            Err(Error::Driver(words)) => assert!(words.contains("NCCL"), "{words}"),
            Err(error) => panic!("{error}"),
            Ok(id) => assert_ne!(id.to_bytes(), [0; UniqueId::BYTES]),
        }
    }
}
