//! Memory for weights in pages of megabytes.
//!
//! Decoding reads every weight once for each token. Pages of 4 KiB cost it a quarter of the speed: the prefetchers stop
//! at the end of each, and the tables that find them do not fit any cache.

/// An empty vector with room for `len` elements, which the system is asked to back with huge pages. A system that has
/// none, or needs no asking, gives what it has.
pub(crate) fn vec<N>(len: usize) -> Vec<N> {
    let vec = Vec::<N>::with_capacity(len);
    #[cfg(target_os = "linux")]
    advise(vec.as_ptr().cast(), len * size_of::<N>());
    vec
}

#[cfg(target_os = "linux")]
fn advise(start: *const u8, len: usize) {
    use rustix::mm::{Advice, madvise};

    let page = rustix::param::page_size();
    let before = start.align_offset(page);
    let Some(len) = len.checked_sub(before).map(|len| len / page * page) else {
        return;
    };
    if len > 0 {
        let start = start.wrapping_add(before).cast_mut();
        // SAFETY: the range lies within one allocation, and this advice changes no byte of it.
        #[expect(unsafe_code, reason = "advice about a range of memory")]
        let advised = unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn vectors_of_any_size_are_empty_and_have_room() {
        for len in [0, 1, 4095, 4097, 5 << 20] {
            let mut vec = super::vec::<u8>(len);
            assert!(vec.is_empty() && vec.capacity() >= len);
            vec.resize(len, 7);
            assert!(vec.iter().all(|&byte| byte == 7));
        }
    }
}
